"""Pruned once, exported, loaded, and pruned again.

Oracle: the second masked float32 model's logits; the first export's config for what the original was.
"""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from atp import load
from atp.errors import UnsupportedModelError
from atp.export import export
from atp.export.layout import is_plain
from atp.layers import attachment_of
from tests import families, runs, tiny
from tests.export.cases import PACKED, exported, masked

FIRST = 0.27
"""With which random decisions in `width` leave every family ragged."""

ROUNDS = [("uniform", "uniform"), ("width", "width"), ("width", "disp")]
CASES = [(family, *names) for family in families.FAMILIES for names in ROUNDS]
CASES += [(f, first, "values") for f in families.FAMILIES if f not in PACKED for first in ("uniform", "width")]
CASES += [(family, "uniform", other) for family in ("llama", "olmo2", "gpt_neox") for other in ("width", "disp")]
OTHERS = [("width", "all"), ("hidden", "all"), ("blocks", "hidden"), ("uniform", "depth"), ("width", "hidden")]
CASES += [(family, *names) for family in ("llama", "gemma3", "olmo2", "phi3") for names in OTHERS]


@pytest.mark.parametrize(("family", "first", "second"), CASES)
def test_a_second_export_computes_what_the_second_masked_model_does(family, first, second, tmp_path):
    once = exported(family, first, FIRST)
    assert ("blocks" in once.loaded.config.atp) == (first not in ("uniform", "hidden", "blocks"))
    model = masked(families.with_lora(copy.deepcopy(once.loaded), seed=5), second, 0.2)
    plain = "blocks" not in once.loaded.config.atp and is_plain(
        attachment_of(model).space, attachment_of(model).decision()
    )
    twice = load(export(model, tmp_path / "out")).eval()
    assert families.relative_error(families.logits(twice), families.logits(model)) <= 1e-5

    entry, space = twice.config.atp, attachment_of(model).space
    removed = space.sparsity(attachment_of(model).decision())
    earlier = once.loaded.config.atp
    assert entry["sparsity"] == pytest.approx(1 - (1 - earlier["sparsity"]) * (1 - removed), abs=2e-6)
    assert [run["sparsity"] for run in entry["runs"]] == pytest.approx([earlier["sparsity"], removed], abs=1e-6)
    assert entry["parameters"]["before"] == families.build(family).num_parameters()
    assert entry["parameters"]["after"] == twice.num_parameters() < earlier["parameters"]["after"]
    if "mlp" in entry["widths"]:
        assert entry["widths"]["mlp"]["full"] == once.space.structure.blocks[0].mlp.intermediate_size
    assert (type(twice) is type(families.build(family))) == plain
    assert ("blocks" in entry) != plain


@pytest.mark.parametrize("space", ["width", "values", "disp"])
def test_label_smoothing_looks_at_the_next_token_of_a_pruned_model_too(space, tmp_path):
    """The Trainer knows causal LMs by their classes' names. Oracle: torch's own smoothed cross-entropy."""
    model = copy.deepcopy(exported("llama", space).loaded)
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to="none")
    tokens = families.tokens()
    for tuned in (model, families.with_lora(model)):
        found = Trainer(tuned, arguments).compute_loss(tuned.eval(), {"input_ids": tokens, "labels": tokens})
        logits = tuned(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        expected = cross_entropy(logits, tokens[:, 1:].flatten(), label_smoothing=0.1)
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_third_run_goes_on_from_the_second(tmp_path):
    model = copy.deepcopy(exported("llama", "width", FIRST).loaded)
    for number in range(2):
        model = masked(families.with_lora(model, seed=number), "width", 0.2)
        expected = families.logits(model)
        model = load(export(model, tmp_path / str(number))).eval()
        assert families.relative_error(families.logits(model), expected) <= 1e-5
    assert len(model.config.atp["runs"]) == 3
    assert model.config.atp["blocks"]["full"] == exported("llama", "width", FIRST).loaded.config.atp["blocks"]["full"]
    assert model.config.atp["sparsity"] == pytest.approx(1 - (1 - FIRST) * 0.8**2, abs=0.02)


@pytest.mark.parametrize("uniform", [False, True])
def test_a_callback_prunes_what_a_callback_has_pruned(uniform, tmp_path):
    config = runs.config(sparsity=0.2, uniform=uniform, refit_rows=8)
    runs.trainer(tmp_path / "one", config, model=runs.peft_model()).train()
    first = load(tmp_path / "one" / "pruned")
    again = runs.trainer(
        tmp_path / "two", config, model=families.with_lora(first, target_modules="all-linear"), max_steps=6
    )
    again.train()
    second = load(tmp_path / "two" / "pruned").eval()
    ids = torch.arange(2, 26).reshape(2, 12)
    with torch.no_grad():
        masked_logits = again.model.eval()(input_ids=ids).logits
        assert families.relative_error(second(input_ids=ids).logits, masked_logits) <= 1e-5
    assert second.config.atp["parameters"]["before"] == tiny.model().num_parameters()
    assert 0.36 <= second.config.atp["sparsity"] <= 0.42


def test_an_entry_that_is_not_ours_is_refused(tmp_path):
    model = families.build("llama")
    model.config.atp = {"sparsity": "much"}
    with pytest.raises(UnsupportedModelError, match="`atp` entry of its config does not say what was pruned"):
        export(masked(model, "width"), tmp_path / "out")
