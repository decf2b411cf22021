"""What is timed. Oracles: the base model's own tensors, the callback's run, and what FLOPs are left."""

import tempfile

import pytest
import torch
from datasets import Dataset

from atp.bench import export_cases, infer_cases, pruned_copy, train_step_cases
from atp.config import ATPConfig
from atp.evaluation import flops_per_token
from atp.export import export, load
from tests import families, runs, tiny


@pytest.fixture
def base():
    return tiny.model()


@pytest.mark.parametrize("space", ["width", "disp"])
def test_every_step_trains_adapters_of_its_own_on_the_same_base(base, space):
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    cases = train_step_cases(base, ATPConfig(space=space, sparsity=0.5, round_to=1), lora_rank=2, rows=2, length=8)
    models = [case.call._model for case in cases]
    lora = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in models]
    starts = [{n: p.detach().clone() for n, p in parameters.items()} for parameters in lora]
    for case in cases:
        case.call()
    for model, parameters, start in zip(models, lora, starts, strict=True):
        assert model.get_input_embeddings().weight is base.get_input_embeddings().weight
        assert any(not torch.equal(p, start[n]) for n, p in parameters.items() if "lora_B" in n)
        assert all(p.grad is None for p in base.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_steps_are_what_their_names_say(base):
    cases = train_step_cases(base, ATPConfig(sparsity=0.5, round_to=1), lora_rank=2, rows=2, length=8)
    dense, learning, between, eager, frozen = (case.call for case in cases)
    for step in (dense, learning, between, eager, frozen):
        step()
    assert dense.learner is None
    generator = {k: v.clone() for k, v in learning.learner.generator.state_dict().items()}
    learning()
    assert not learning.learner.frozen
    assert any(not torch.equal(v, generator[k]) for k, v in learning.learner.generator.state_dict().items())
    generator = {k: v.clone() for k, v in between.learner.generator.state_dict().items()}
    between()
    assert not between.learner.frozen
    assert between.learner.attachment.is_compact
    assert all(torch.equal(v, generator[k]) for k, v in between.learner.generator.state_dict().items())
    for step, compact in ((eager, False), (frozen, True)):
        assert step.learner.frozen
        assert step.learner.attachment.is_compact is compact
        assert step.learner.space.sparsity(step.learner.decision()) == pytest.approx(0.5, abs=0.05)
    assert cases[2].limit == cases[4].limit
    assert cases[4].limit == pytest.approx(
        flops_per_token(pruned_copy(base, ATPConfig(sparsity=0.5, round_to=1))) / flops_per_token(base), abs=0.02
    )


def test_steps_before_the_freeze_are_those_of_the_callback(base, tmp_path, monkeypatch):
    monkeypatch.setattr("atp.bench.train_step._STEPS", 3)
    settings = {"sparsity": 0.5, "round_to": 1, "lasso": 50.0, "noise": 0.2, "noise_end": 0.2}
    step = train_step_cases(base, ATPConfig(**settings), lora_rank=2, rows=2, length=8)[1].call
    model = runs.peft_model(r=2, lora_alpha=4)
    model.load_state_dict(step._model.state_dict())
    rows = Dataset.from_dict({name: step._batch[name].tolist() for name in ("input_ids", "labels")})
    config = ATPConfig(**settings, init="random", compensate="none", start_at=0.0, freeze_at=1.0, export=False)
    trainer = runs.trainer(
        tmp_path,
        config,
        model=model,
        train=rows,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    trainer.train()
    for _ in range(3):
        step()
    assert runs.worst(adapter_of(step._model), runs.adapter(trainer)) < 1e-4


def adapter_of(model):
    return {k: v.detach() for k, v in model.state_dict().items() if "lora_" in k}


def test_export_writes_the_smaller_model_and_leaves_nothing(base, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    written = []
    monkeypatch.setattr("atp.bench.export.export", lambda model, out: written.append(load(export(model, out))))
    dense, pruned = (case.call for case in export_cases(base, ATPConfig(sparsity=0.5, round_to=1), lora_rank=2))
    dense()
    pruned()
    assert written[0].config.atp["sparsity"] == pytest.approx(0.5, abs=0.05)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("space", ["width", "disp", "hidden"])
def test_inference_is_of_an_export_and_its_limits_are_shares_of_weights(base, space):
    pruned = pruned_copy(base, ATPConfig(space=space, sparsity=0.5, round_to=1))
    cases = infer_cases(base.eval(), pruned, tokens=8, written=3)
    before, after = (
        sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)) for model in (base, pruned)
    )
    heads = [model.lm_head.weight.numel() for model in (base, pruned)]
    assert (heads[0] > heads[1]) == (space == "hidden")
    assert cases["prefill"][1].limit == pytest.approx((after - heads[1]) / (before - heads[0]))
    assert cases["decode"][1].limit == pytest.approx(after / before)
    for pair in cases.values():
        for case in pair:
            case.call()
            case.call()


importing_inductor = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


@importing_inductor
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_call_leaves_the_cache_as_it_found_it(family, compiled, monkeypatch):
    """Gemma's window is six tokens here."""
    monkeypatch.setattr(torch, "compile", without_building(torch.compile))
    base = families.build(family).eval()
    cases = infer_cases(base, base, tokens=8, written=3, compiled=compiled)
    for bench, left in (("prefill", 0), ("decode", 8)):
        call = cases[bench][0].call
        for _ in range(3):
            call()
            assert call._reader._cache.get_seq_length() == left


@importing_inductor
@pytest.mark.parametrize("space", ["width", "disp"])
def test_compiled_models_choose_the_same_tokens(base, space, monkeypatch):
    built = []
    monkeypatch.setattr(torch, "compile", without_building(torch.compile, built))
    pruned = pruned_copy(base, ATPConfig(space=space, sparsity=0.5, round_to=1))
    chosen = []
    for compiled in (False, True):
        torch.manual_seed(0)
        call = infer_cases(base.eval(), pruned, tokens=8, written=3, compiled=compiled)["decode"][1].call
        call()  # what it leaves in the cache counts no more
        tokens = [call._first]
        for _ in range(3):
            tokens.append(call._reader.read(tokens[-1]))
        chosen.append(torch.cat(tokens, 1))
    assert torch.equal(*chosen)
    assert built == [{"mode": "reduce-overhead", "fullgraph": True}] * 2


def without_building(compile, asked=None):
    """`torch.compile` that traces, and computes what it has traced as it is."""

    def traced(call, **settings):
        if asked is not None:
            asked.append(settings)
        torch.compiler.reset()
        return compile(call, backend="eager", **settings | {"mode": None})

    return traced
