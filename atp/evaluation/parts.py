"""Where a model's parameters and a prefill's time are: embedding, attention, MLP, norms, head.

A module is told by its class and its name, as transformers names them in all families; inner norms of attention count
there, and embeddings tied to the head count as embedding. Time is that of whole modules one after the other: what the
model does between them (residual sums, rotary tables, the mask) is in none. A model with anything else that holds
parameters, such as a state-space mixer or a projection beside the blocks, gets no parts rather than wrong ones.
"""

import re
import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.evaluation.speed import parameter_sizes
from atp.passes import evaluating, removed_after

PARTS = ("embedding", "attention", "mlp", "norms", "head")

_NORM = re.compile(r"norm|^ln_", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|^fc\d|moe", re.IGNORECASE)


@torch.no_grad()
def parts(model: PreTrainedModel, prompt_tokens: int = 256, calls: int = 3) -> dict[str, dict[str, float]] | None:
    """By part, `parameters` and `ms` of one prefill of one row (median of `calls`); None where they are not known."""
    found = _modules(model)
    if found is None:
        return None
    sizes = parameter_sizes(model)
    counted = _parameters(found, sizes)
    if sum(counted.values()) != sum(sizes.values()):
        return None
    took = _milliseconds(model, found, prompt_tokens, calls)
    return {name: {"parameters": counted[name], "ms": took[name]} for name in PARTS}


def _modules(model: PreTrainedModel) -> dict[str, list[nn.Module]] | None:
    """The modules of each part, none inside another."""
    head, blocks = model.get_output_embeddings(), _blocks(model)
    if head is None or blocks is None:
        return None
    found: dict[str, list[nn.Module]] = {name: [] for name in PARTS}
    found["head"].append(head)
    inside = {id(module) for block in blocks for module in block.modules()} | {id(m) for m in head.modules()}
    for module in model.modules():
        if id(module) not in inside and isinstance(module, nn.Embedding):
            found["embedding"].append(module)
        elif id(module) not in inside and _NORM.search(type(module).__name__):
            found["norms"].append(module)
    for block in blocks:
        for name, child in block.named_children():
            if (part := _part(name, child)) is not None:
                found[part].append(child)
            elif any(True for _ in child.parameters()):
                return None
    return found


def _blocks(model: PreTrainedModel) -> nn.ModuleList | None:
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next((module for module in lists if len(module) == wanted), None)


def _part(name: str, child: nn.Module) -> str | None:
    kind = type(child).__name__
    if _NORM.search(kind) or _NORM.search(name):
        return "norms"
    if _ATTENTION.search(kind) or _ATTENTION.search(name):
        return "attention"
    return "mlp" if _MLP.search(kind) or _MLP.search(name) else None


def _parameters(found: dict[str, list[nn.Module]], sizes: dict[int, int]) -> dict[str, int]:
    """Each parameter once, in the first part that has it."""
    seen: set[int] = set()
    counted = dict.fromkeys(PARTS, 0)
    for name in PARTS:
        for module in found[name]:
            for parameter in module.parameters():
                counted[name] += 0 if id(parameter) in seen else sizes[id(parameter)]
                seen.add(id(parameter))
    return counted


def _milliseconds(
    model: PreTrainedModel, found: dict[str, list[nn.Module]], prompt_tokens: int, calls: int
) -> dict[str, float]:
    spent: dict[str, float] = defaultdict(float)
    started: dict[int, float] = {}

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter()

    def begin(module: nn.Module, _: Any) -> None:
        started[id(module)] = now()

    def ending(part: str) -> Any:
        def end(module: nn.Module, _: Any, output: Any) -> None:
            del output
            spent[part] += now() - started[id(module)]

        return end

    handles = [
        handle
        for part, modules in found.items()
        for module in modules
        for handle in (module.register_forward_pre_hook(begin), module.register_forward_hook(ending(part)))
    ]
    ids: Tensor = torch.zeros(1, prompt_tokens, dtype=torch.long, device=model.device)
    rounds = []
    with evaluating(model), removed_after(handles):
        for _ in range(calls + 1):
            spent.clear()
            model(input_ids=ids, use_cache=True)
            rounds.append(dict(spent))
    timed = rounds[1:]  # the first warms up
    return {part: 1e3 * statistics.median(each.get(part, 0.0) for each in timed) for part in PARTS}
