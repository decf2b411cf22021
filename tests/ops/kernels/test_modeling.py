"""Exported models whose blocks gather and scatter in kernels. Oracle: the same model without them."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload

from atp.export import export, load, modeling_atp
from tests import families
from tests.export.cases import exported, masked
from tests.export.test_folder import STRANGER, tokenizer
from tests.ops.kernels import in_the_interpreter

pytestmark = in_the_interpreter

LIKE_LLAMA = ("llama", "mistral", "qwen3", "llama_biases")


@pytest.fixture
def launched(monkeypatch):
    """Launches of the kernel."""
    calls = []
    assert modeling_atp._builds(torch.device("cpu"))  # a launch of its own, once
    boundary = modeling_atp._boundary
    monkeypatch.setattr(modeling_atp, "_boundary", lambda *a: calls.append(a) or boundary(*a))
    return calls


def plainly(function, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(modeling_atp, "_kernels_can", lambda *_: False)
        return function()


@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_logits_are_those_without_kernels(family, monkeypatch, launched):
    model = load(exported(family, "disp").folder).eval()
    expected = plainly(lambda: families.logits(model), monkeypatch)
    assert not launched
    found = families.logits(model)
    assert len(launched) == 3 * model.config.num_hidden_layers
    assert families.relative_error(found, expected) < 1e-5


def test_without_a_compiler_there_are_no_kernels_and_one_warning(monkeypatch):
    model = load(exported("llama", "disp").folder).eval()
    expected = plainly(lambda: families.logits(model), monkeypatch)

    def launch(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(modeling_atp, "_boundary", launch)
    modeling_atp._builds.cache_clear()
    with pytest.warns(UserWarning, match="cannot build kernels here .Failed to find C compiler") as warned:
        assert torch.equal(families.logits(model), expected)
    modeling_atp._builds.cache_clear()
    assert len(warned) == 1


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generates_the_same_tokens(cache, monkeypatch, launched):
    model = load(exported("llama", "disp").folder).eval()
    settings = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    prompt = families.tokens()[:, :4]
    expected = plainly(lambda: model.generate(prompt, **settings), monkeypatch)
    assert torch.equal(model.generate(prompt, **settings), expected)
    assert launched


def test_attentions_and_hooks_are_given_what_they_ask_for(launched):
    model = load(exported("llama", "disp").folder, attn_implementation="eager").eval()
    seen = []
    with torch.no_grad():
        assert len(model(families.tokens(), output_attentions=True).attentions) == model.config.num_hidden_layers
        hooks = [block.mlp.register_forward_hook(lambda *a: seen.append(a)) for block in model.model.layers]
        launched.clear()
        model(families.tokens())
        assert len(seen) == model.config.num_hidden_layers
        assert not launched
        for hook in hooks:
            hook.remove()


def test_float64_and_weights_that_lie_elsewhere_are_left_to_pytorch(monkeypatch, launched):
    model = load(exported("llama", "disp").folder).eval()
    expected = plainly(lambda: families.logits(model), monkeypatch)
    assert torch.allclose(families.logits(cpu_offload(model)), expected)
    assert not launched
    model = load(exported("llama", "disp").folder).eval().double()
    families.logits(model)
    assert not launched


def test_gradients_come_without_kernels(launched):
    model = load(exported("llama", "disp").folder)
    model(input_ids=families.tokens(), labels=families.tokens()).loss.backward()
    assert not launched
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_other_dimensions_are_seen_at_once(monkeypatch):
    model = load(exported("llama", "disp").folder).eval()
    families.logits(model)
    attention = model.model.layers[0].self_attn
    gone = torch.ones(attention.residual_size, dtype=torch.bool)
    gone[attention.residual_out] = False
    attention.residual_out[-1] = torch.nonzero(gone).flatten()[-1]
    expected = plainly(lambda: families.logits(model), monkeypatch)
    assert families.relative_error(families.logits(model), expected) < 1e-5


def test_pickled_models_compute_the_same():
    model = load(exported("llama", "disp").folder).eval()
    found = families.logits(pickle.loads(pickle.dumps(model)))
    assert families.relative_error(found, families.logits(model)) < 1e-5


def test_works_where_atp_cannot_be_imported(tmp_path):
    """Saved by this process, by kernels; loaded and run, by kernels, in one that has but torch and transformers."""
    live = masked(families.with_lora(families.build("llama")), "disp")
    folder = export(live, tmp_path / "disp" / "pruned", processing_class=tokenizer())
    saved = {"tokens": families.tokens(), "logits": families.logits(load(folder).eval())}
    torch.save(saved, folder.parent / "logits.pt")
    script = STRANGER.replace(
        "for folder, flag in ((sys.argv[1], False), (sys.argv[2], True), (sys.argv[3], True)):",
        "for folder, flag in ((sys.argv[1], True),):",
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
