"""What a plan counts. Oracles: a real step under the same watch, PyTorch's own sizes, arithmetic by hand."""

import json
import sys
from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from atp.bench import ENGINES, plan, seconds_here
from atp.bench.copies import attached
from atp.bench.plan import _Alive
from atp.bench.train_step import adapted, learning_step
from atp.cli import main
from atp.config import ATPConfig
from atp.structure.live import is_quantised
from tests import families, tiny

ROWS, LENGTH, RANK = 2, 16, 4


def on_meta(config, dtype=torch.float32):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def planned(engine="ddp", devices=2, base=None, **changes):
    base = on_meta(tiny.model().config) if base is None else base
    return plan(base, ATPConfig(round_to=1), engine, devices, ROWS, LENGTH, RANK, **changes)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "engine"), [("llama", "ddp"), ("gemma3", "ddp"), ("phi3", "ddp"), ("llama", "zero3")]
)
def test_activations_are_those_of_a_real_step(
    family: str, engine: str, dtype: torch.dtype, checkpointing: bool
) -> None:
    base = families.build(family).to(dtype)
    model = adapted(base, RANK, checkpointing)
    attachment = attached(model, ATPConfig(round_to=1))
    if engine != "zero3":
        attachment.fuse_adapters()
    attachment.require_gradients(True)
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    there = (*model.parameters(), *model.buffers(), *attachment.masks.values(), ids)
    with _Alive(there) as alive:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()  # where training runs it
    found = planned(engine, base=on_meta(base.config, dtype), checkpointing=checkpointing)
    assert found.memory["activations"] == pytest.approx(alive.peak, rel=0.01)


def test_gradients_lie_twice_where_there_is_somebody_to_send_them_to() -> None:
    alone, two = planned(devices=1), planned(devices=2)
    assert two.memory["gradients"] == 2 * alone.memory["gradients"]


def test_what_engines_share_is_shared() -> None:
    model = adapted(tiny.model(), RANK)
    adapters = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(4 * p.numel() for p in model.parameters() if not p.requires_grad)
    by_engine = {engine: planned(engine, 4).memory for engine in ENGINES}
    for engine, memory in by_engine.items():
        shares = 4 if engine in ("fsdp2", "zero3") else 1
        assert memory["base weights"] == weights // shares
        assert memory["adapters"] == adapters // shares
    assert by_engine["ddp"]["optimizer"] == 2 * adapters
    assert by_engine["fsdp2"]["optimizer"] == 2 * adapters // 4
    assert by_engine["zero2"]["optimizer"] == by_engine["zero3"]["optimizer"] == 3 * adapters // 4


def test_rows_of_the_refit_are_shared() -> None:
    one, four, many = (planned(devices=devices).refit for devices in (1, 4, 300))
    assert one == 4 * four == 256 * many


def test_quantised_weights_take_their_bits() -> None:
    whole, quarter = planned().memory["base weights"], planned(bits=4).memory["base weights"]
    prunable = attached(tiny.model(), ATPConfig(round_to=1)).space.prunable_parameters
    assert whole - quarter == prunable * 4 - prunable // 2


def test_messages_of_pruning_do_not_grow_with_tokens() -> None:
    base = on_meta(tiny.model().config)
    short, long = (plan(base, ATPConfig(round_to=1), "fsdp2", 2, ROWS, n, RANK) for n in (16, 64))
    assert short.messages == long.messages
    assert short.flops < long.flops / 4


@pytest.mark.parametrize(("engine", "again"), [("zero3", True), ("fsdp2", False), ("zero2", False)])
def test_only_zero3_gathers_blocks_again_to_recompute_them(engine: str, again: bool) -> None:
    """By its calls in two processes a step gathered 480,512 bytes with checkpointing, and 331,904 without."""
    blocks = adapted(tiny.model(), RANK).base_model.model.model.layers
    sent = sum(4 * p.numel() for p in blocks.parameters()) // 2  # by each of two
    without, with_it = (planned(engine, checkpointing=checkpointing).messages for checkpointing in (False, True))
    assert with_it["lora"] - without["lora"] == (sent if again else 0)
    assert with_it["atp"] == without["atp"]


def test_command_prints_and_writes(tmp_path, capsys) -> None:
    words = ["plan", "--model", "smollm2-135m", "--gpus", "2", "--engine", "zero3", "--rows", "1", "--length", "128"]
    assert main([*words, "--tflops", "0.1", "--gpu-gib", "0.5", "--json", str(tmp_path / "plan.json")]) == 0
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["total"] == sum(found["memory"].values())
    assert found["seconds"] == pytest.approx(found["flops"] / 1e11)
    assert found["fits"] is False


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_what_is_timed_here_computes_as_training_does(bits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if bits is not None:
        pytest.importorskip("bitsandbytes")
    timed = []

    def seen(base: PreTrainedModel, config: ATPConfig, *rest: object) -> Callable[[], None]:
        weight = base.model.layers[-1].mlp.up_proj.weight
        timed.append((base.config.num_hidden_layers, is_quantised(base.model.layers[-1].mlp.up_proj), config.impl))
        assert weight.dtype == {None: torch.float32, 4: torch.uint8, 8: torch.int8}[bits]
        return learning_step(base, config, *rest)

    monkeypatch.setattr(sys.modules[seconds_here.__module__], "learning_step", seen)
    config = ATPConfig(round_to=1)
    seconds_here(shallow, 30, config, "ddp", ROWS, LENGTH, RANK, bits=bits, calls=1)
    assert timed == [(n, bits is not None, "eager" if bits else config.impl) for n in (1, 3)]


def shallow(blocks: int) -> LlamaForCausalLM:
    """The tiny model, in sizes that can be quantised."""
    return tiny.model(hidden_size=64, intermediate_size=128, num_hidden_layers=blocks)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--rows", "0"), "--rows must be more than 0"),
        (("--gb-per-s", "3"), "give one of them too"),
        (("--engine", "ddp", "--model", "./nothing"), "no such folder"),
        (("--engine", "zero3", "--bits", "4"), "ZeRO-3 takes none"),
        (("--engine", "fsdp2", "--bits", "8"), "FSDP2 does not share quantised weights out"),
    ],
)
def test_nonsense_is_one_line(words, reason, capsys) -> None:
    assert main(["plan", "--model", "smollm2-135m", *words]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
