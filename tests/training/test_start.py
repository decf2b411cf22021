"""Where a run starts from."""

import copy

import pytest
import torch
from transformers import default_data_collator

from atp.data import IGNORED
from atp.layers import attach
from atp.structure.budget import project
from atp.structure.building import build_space
from atp.structure.discovery import discover
from atp.training.calibration import Calibration
from atp.training.start import start
from tests import runs, tiny


@pytest.mark.parametrize("rows_a_pass", [1, 2])
def test_scores_do_not_depend_on_how_many_rows_a_pass_has(rows_a_pass: int) -> None:
    """Of the default, the surgeon, where some rows have one label and others all."""
    rows = [
        row | {"labels": [IGNORED] * (11 * (index % 3 > 0)) + row["labels"][11 * (index % 3 > 0) :]}
        for index, row in enumerate(runs.dataset(8))
    ]
    model = tiny.model().eval()
    attachment = attach(model, build_space(discover(model), "width", round_to=1))

    def logits(batch_size: int) -> torch.Tensor:
        calibration = Calibration(rows, default_data_collator, batch_size)
        drawn = start(runs.config(), attachment, calibration, lambda batch: model(**batch).loss, quiet=True)
        assert drawn is not None
        return torch.cat(list(drawn.values()))

    torch.testing.assert_close(logits(rows_a_pass), logits(4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("space", ["width", "disp", "hidden"])
@pytest.mark.parametrize("init", ["magnitude", "activation", "flap", "surgeon", "taylor"])
def test_what_lora_has_learned_counts(init: str, space: str) -> None:
    """Oracle: the same model, its adapters merged."""
    tuned = runs.peft_model().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.03, generator=generator)
    untuned, merged = runs.peft_model().eval(), copy.deepcopy(tuned).merge_and_unload().eval()

    def decision(model: torch.nn.Module) -> torch.Tensor:
        attachment = attach(model, build_space(discover(model), space, round_to=1))
        calibration = Calibration(list(runs.dataset(8)), default_data_collator, 4)
        drawn = start(runs.config(init=init), attachment, calibration, lambda batch: model(**batch).loss, quiet=True)
        assert drawn is not None
        return torch.cat(list(project(drawn, attachment.space, 0.4).values()))

    found = decision(tuned)
    assert torch.equal(found, decision(merged))
    assert not torch.equal(found, decision(untuned))


def test_attention_is_favoured_as_the_settings_say() -> None:
    attachment = attach(tiny.model().eval(), build_space(discover(tiny.model()), "width", round_to=1))

    def kept(favour: float) -> float:
        settings = runs.config(init="magnitude", init_ranking="global", init_attention=favour)
        drawn = start(settings, attachment, None, lambda _: torch.zeros(()), quiet=True)
        assert drawn is not None
        return attachment.space.kept_share(project(drawn, attachment.space, 0.4))["kv"]

    assert kept(-2.0) < kept(2.0)
