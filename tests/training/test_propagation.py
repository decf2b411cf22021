"""Propagation. Oracles: the dense model's stream; the normal equations in float64; what refitting alone gives."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention

from atp.layers import attach
from atp.structure.building import build_space
from atp.structure.discovery import discover
from atp.structure.live import causal_lm
from atp.training import propagation, refitting
from atp.training.compensation import Compensation
from tests import families, runs
from tests.export.cases import CASES, random_masks

IDS = [families.tokens(rows=8, seed=seed) for seed in range(6)]
EVERYWHERE = (
    *("llama", "llama_mqa", "llama_biases", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "starcoder2", "stablelm"),
    *("gpt_neox", "gpt_neox_serial", "gemma2", "gemma3", "olmo2", "granite"),
)
SPACES_EVERYWHERE = [(f, s) for f, s in CASES if f in EVERYWHERE and s in ("width", "disp", "values")]


def compensated(
    how: str, family: str = "llama", space: str = "width", batches: list = IDS, compact: bool = True, **changes: object
) -> tuple:
    model = families.with_lora(families.build(family, **changes))
    table = build_space(discover(model), space)
    attachment = attach(model, table)
    decision = random_masks(table, 0.3)
    compensation = Compensation(how, attachment, lambda ids: model(input_ids=ids), batches, compact=compact)
    compensation.apply(decision, table.full())
    return model, attachment, decision, compensation


def last_stream(model: torch.nn.Module, batches: list = IDS) -> torch.Tensor:
    """What the last block gives, before the final norm."""
    return outputs(model, discover(model).blocks[-1].path, batches)


def outputs(model: torch.nn.Module, path: str, batches: list = IDS) -> torch.Tensor:
    """What a module gives, of all batches."""
    found = []
    module = causal_lm(model).get_submodule(path)
    handle = module.register_forward_hook(lambda _m, _a, y: found.append(y[0] if isinstance(y, tuple) else y))
    with torch.no_grad():
        for ids in batches:
            model(input_ids=ids)
    handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize(("family", "space"), SPACES_EVERYWHERE)
def test_the_pruned_stream_follows_the_dense_one_better_than_by_refitting_alone(family: str, space: str) -> None:
    errors = {}
    for how in ("weights", "follow"):
        model, attachment, decision, _ = compensated(how, family, space)
        pruned = families.with_lora(families.build(family))
        dense = last_stream(pruned)
        attachment.set_masks(decision)
        errors[how] = families.relative_error(last_stream(model), dense)
    assert errors["follow"] < 0.97 * errors["weights"]


@pytest.mark.filterwarnings("ignore:.*lora_bias=True")
def test_a_bias_of_the_adapter_counts_as_one_of_the_layer() -> None:
    """Whether it is merged before the refit or not."""
    streams = []
    for merged in (False, True):
        targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
        model = families.with_lora(families.build("llama_biases"), lora_bias=True, target_modules=targets)
        model = model.merge_and_unload() if merged else model
        attachment = attach(model, build_space(discover(model), "width"))
        decision = random_masks(attachment.space, 0.3)
        compensation = Compensation("follow", attachment, lambda ids, lm=model: lm(input_ids=ids), IDS)
        compensation.apply(decision, attachment.space.full())
        attachment.set_masks(decision)
        streams.append(last_stream(model))
    assert families.relative_error(*streams) < 1e-4


@pytest.mark.parametrize(("family", "space"), SPACES_EVERYWHERE)
def test_computing_only_what_is_kept_gives_the_same_weights(family: str, space: str) -> None:
    found, truth = (dict(compensated("follow", family, space, compact=c)[3].state()) for c in (True, False))
    assert found.keys() == truth.keys()
    for name, weight in truth.items():
        assert families.relative_error(found[name], weight) <= 1e-3, name


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_padding_is_not_refitted_to(family: str, monkeypatch) -> None:
    monkeypatch.setattr(refitting, "READER_TOKENS", 10**6)  # none are drawn, all are taken
    rows = [ids[i : i + 1, : 4 + 2 * i] for ids in IDS for i in range(4)]
    found = []
    for batches in ([families.padded([row]) for row in rows], [families.padded(rows[:9]), families.padded(rows[9:])]):
        model = families.with_lora(families.build(family))
        table = build_space(discover(model), "width")
        attachment = attach(model, table)
        compensation = Compensation("follow", attachment, lambda batch, model=model: model(**batch), batches)
        compensation.apply(random_masks(table, 0.3), table.full())
        found.append(dict(compensation.state()))
    for name, weight in found[0].items():
        assert families.relative_error(found[1][name], weight) <= 1e-3, name


def test_attention_of_the_pruned_stream_runs_once_a_batch(monkeypatch) -> None:
    calls = []
    own = LlamaAttention.forward
    monkeypatch.setattr(LlamaAttention, "forward", lambda self, *a, **k: (calls.append(self), own(self, *a, **k))[1])
    _, attachment, _, _ = compensated("follow")
    blocks = len(attachment.space.structure.blocks)
    first_batch_and_look = 2 * blocks - 1  # the last block is not computed when streams are captured
    assert len(calls) == first_batch_and_look + 2 * len(IDS) * blocks


def test_where_blocks_do_more_than_add_writers_give_what_the_dense_ones_do(monkeypatch) -> None:
    monkeypatch.setattr(propagation, "ADDITIVE", -1.0)  # whatever a block does counts as more
    path = discover(families.build("llama")).blocks[-1].mlp.writer.path
    errors = {}
    for how in ("none", "follow"):
        model, attachment, decision, _ = compensated(how)
        dense = families.with_lora(families.build("llama"))
        attachment.set_masks(decision)
        errors[how] = families.relative_error(*(outputs(m, path) for m in (model, dense)))
    assert errors["follow"] < 0.95 * errors["none"]


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2"])
def test_a_norm_after_the_writer_gives_the_stream_what_it_lacks(family: str) -> None:
    model = families.build(family)
    block = causal_lm(model).get_submodule(discover(model).blocks[0].path)
    generator = torch.Generator().manual_seed(0)
    hidden = discover(model).hidden_size
    norm = block.post_attention_layernorm
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
    way = propagation._Way(norm, torch.nn.Identity(), norm, factor=0.5, beside=None)
    written = torch.randn(2, 5, hidden, generator=generator)
    missing = 1e-3 * torch.randn(2, 5, hidden, generator=generator)
    with torch.no_grad():
        wanted, weight = way.wanted(written, written, missing)
        assert families.relative_error(weight, 1 / written.square().mean(-1, keepdim=True).sqrt()) <= 1e-5
        brought = way.brings(wanted) - way.brings(written)
    along = written / written.norm(dim=-1, keepdim=True)  # what no output of the norm can have: another size
    gain = norm(torch.ones(1, 1, hidden)).detach()
    left = (brought - missing) / gain
    left -= (left * along).sum(-1, keepdim=True) * along
    assert left.norm() <= 0.02 * (missing / gain).norm()


def test_a_channel_that_the_norm_shuts_is_asked_for_nothing() -> None:
    norm = torch.nn.RMSNorm(8)
    with torch.no_grad():
        norm.weight[3] = 0.0
    written = torch.ones(1, 1, 8)
    way = propagation._Way(norm, torch.nn.Identity(), norm, 1.0, None)
    wanted, _ = way.wanted(written, written, torch.ones(1, 1, 8))
    assert wanted[0, 0, 3] == 1.0
    assert torch.isfinite(wanted).all()


def test_the_last_writer_solves_the_normal_equations(monkeypatch) -> None:
    monkeypatch.setattr(refitting, "PRIOR", 1e-6)
    model, attachment, decision, _ = compensated("follow")
    dense = last_stream(families.with_lora(families.build("llama"))).double().flatten(0, 1)
    attachment.set_masks(decision)
    path = discover(model).blocks[-1].mlp.writer.path
    inputs = []
    handle = attachment.modules[path].register_forward_pre_hook(lambda _m, args: inputs.append(args[0].detach()))
    stream = last_stream(model).double().flatten(0, 1)
    handle.remove()
    keep = decision[[s.name for s in attachment.space.sets if s.kind == "mlp"][-1]] > 0
    x = torch.cat(inputs).double().flatten(0, 1)[:, keep]
    left = x.T @ (dense - stream)
    assert left.norm() <= 1e-3 * x.norm() * (dense - stream).norm()


def test_a_strong_prior_leaves_layers_as_they_were(monkeypatch) -> None:
    monkeypatch.setattr(refitting, "PRIOR", 1e9)
    monkeypatch.setattr(refitting, "READER_PRIOR", 1e9)
    untouched = families.with_lora(families.build("llama")).state_dict()
    changed = {k.rsplit(".", 1)[0]: v for k, v in compensated("follow")[3].state().items()}
    assert changed
    for path, weight in changed.items():
        (name,) = (k for k in untouched if k.endswith((f"{path}.base_layer.weight", f"{path}.weight")))
        assert families.relative_error(weight, untouched[name]) <= 1e-5, name


def test_first_tokens_that_the_refit_has_seen_keep_what_the_dense_model_does_with_them() -> None:
    ones = [torch.arange(64)[:, None]]
    dense = last_stream(families.with_lora(families.build("llama")), ones)
    errors = []
    for batches in (IDS, IDS + ones):
        model, attachment, decision, _ = compensated("follow", batches=batches)
        attachment.set_masks(decision)
        errors.append(families.relative_error(last_stream(model, ones), dense))
    assert errors[1] < 0.95 * errors[0]


def test_where_nothing_goes_nothing_changes() -> None:
    model, attachment, _, _ = compensated("none")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    full = attachment.space.full()
    Compensation("follow", attachment, lambda ids: model(input_ids=ids), IDS).apply(full, full)
    for name, tensor in model.state_dict().items():
        assert families.relative_error(tensor, before[name]) <= 1e-4, name


def test_another_decision_follows_from_the_original_weights() -> None:
    model, attachment, decision, compensation = compensated("follow")
    first = {name: tensor.clone() for name, tensor in compensation.state().items()}
    compensation.apply(random_masks(attachment.space, 0.3, seed=3), attachment.space.full())
    assert not runs.same(first, dict(compensation.state()))
    compensation.apply(decision, attachment.space.full())
    for name, tensor in compensation.state().items():
        assert families.relative_error(tensor, first[name]) <= 1e-4, name
    compensation.load_state({})
    untouched = families.with_lora(families.build("llama")).state_dict()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in model.state_dict().items())


def test_what_an_earlier_shot_made_of_the_weights_does_not_matter() -> None:
    _, attachment, decision, compensation = compensated("none")
    space = attachment.space
    first = {
        name: torch.maximum(mask, other)
        for (name, mask), other in zip(decision.items(), random_masks(space, 0.3, seed=3).values(), strict=True)
    }
    twice = Compensation("follow", attachment, compensation._forward, IDS)
    twice.apply(first, space.full(), final=False)
    twice.apply(decision, first)
    assert runs.same(dict(twice.state()), dict(compensated("follow")[3].state()))


def test_the_model_is_entered_once_a_batch_and_left_before_its_head() -> None:
    model, attachment, decision, _ = compensated("none")
    entered, left = [], []

    def forward(ids: torch.Tensor) -> None:
        entered.append(ids)
        left.append(model(input_ids=ids))

    Compensation("follow", attachment, forward, IDS).apply(decision, attachment.space.full())
    assert (len(entered), len(left)) == (len(IDS), 0)


def test_it_leaves_masks_mode_and_hooks_as_they_were() -> None:
    model, attachment, decision, compensation = compensated("none")
    model.train()
    families.checkpoint(model)
    attachment.set_masks(attachment.space.full())
    Compensation("follow", attachment, compensation._forward, IDS).apply(decision, attachment.space.full())
    assert model.training
    assert all(mask.all() for mask in attachment.decision().values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in attachment.modules.values())
    blocks = [attachment.lm.get_submodule(block.path) for block in attachment.space.structure.blocks]
    assert not any(block._forward_pre_hooks for block in blocks)


def test_it_runs_in_the_precision_of_the_forward_pass() -> None:
    model, attachment, decision, _ = compensated("none")
    seen = set()

    def forward(ids: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids)

    path = discover(model).blocks[0].attention.readers[0].path
    attachment.modules[path].register_forward_hook(lambda _m, _a, y: seen.add(y.dtype))
    Compensation("follow", attachment, forward, IDS).apply(decision, attachment.space.full())
    assert seen == {torch.bfloat16}


def test_a_refit_gives_modules_their_own_modes_back() -> None:
    model = families.with_lora(families.build("llama")).train()
    attachment = attach(model, build_space(discover(model), "width"))
    attachment.lm.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    compensation = Compensation("follow", attachment, lambda ids: model(input_ids=ids), IDS)
    compensation.apply(random_masks(attachment.space, 0.3), attachment.space.full())
    assert [module.training for module in model.modules()] == before
