"""How often a step waits for the device: as often whatever the model's depth. Oracle: a count of what crosses over."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from atp.bench import train_step_cases
from atp.config import ATPConfig
from atp.layers import Attachment
from atp.structure.building import build_space
from atp.structure.discovery import discover
from tests.device import in_its_own_process, second

pytestmark = in_its_own_process

aten = torch.ops.aten
_READING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}


class Waits(TorchDispatchMode):
    """Counts what comes to the device or from it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (aten._to_copy.default, aten.copy_.default):
            source = args[1] if func is aten.copy_.default else args[0]
            target = args[0].device if func is aten.copy_.default else kwargs.get("device") or source.device
            if source.device.type != torch.device(target).type:
                self.found[f"to {torch.device(target).type}"] += 1
        elif func in _READING and args[0].device.type == second.NAME:
            self.found[str(func)] += 1
        elif func is aten.index.Tensor and args[0].device.type == second.NAME:
            self.found["index"] += sum(i is not None and i.device.type != second.NAME for i in args[1])
        return func(*args, **kwargs)


def llama(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=layers, **sizes)).to(second.DEVICE)


def waits(space: str, layers: int) -> dict[str, Counter]:
    """Of the third step of each kind."""
    found = {}
    for case in train_step_cases(llama(layers), ATPConfig(space=space, sparsity=0.5, round_to=1), 2, 2, 8):
        case.call()
        case.call()
        with Waits() as counted:
            case.call()
        found[case.name] = counted.found
    return found


@pytest.mark.parametrize("space", ["width", "disp"])
def test_depth_makes_no_step_wait_more_often(space, device):
    """Masks go there and their gradients come back, each together; what is kept goes there by three dtypes."""
    for layers in (2, 4):
        found = waits(space, layers)
        dense = found.pop("dense LoRA")
        assert {name: +(counted - dense) for name, counted in found.items()} == {
            "before the freeze": {"to second": 1, "to cpu": 2},
            "between generator steps": {"to second": 4, "to cpu": 2},
            "after the freeze, eager": {},
            "after the freeze": {},
        }


def test_fused_blocks_learn_together_what_is_kept(device):
    """Kept features of layers and of blocks, each by two dtypes, and the decision back."""
    for layers in (2, 4):
        model = llama(layers)
        space = build_space(discover(model), "disp", round_to=1)
        attachment = Attachment(model, space)
        assert attachment.fuse_blocks("eager")
        model.requires_grad_(False)
        attachment.set_masks({s.name: torch.arange(s.size) % 2.0 for s in space.sets})
        with Waits() as counted:
            attachment.compact()
        assert counted.found == {"to cpu": 1, "to second": 5}
