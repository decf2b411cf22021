"""Folders: loaded by strangers, never half-written, clear when damaged.

Oracle: the file system before the call; logits saved by this process for the process that cannot import atp.
"""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from atp.errors import ATPError, CheckpointError, UnsupportedModelError
from atp.export import export, load
from atp.export.layout import is_plain
from atp.layers import attachment_of
from atp.weights import _write
from tests import families
from tests.export.cases import SPACES, exported, masked

STRANGER = """
import sys
import torch
sys.modules["atp"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder, flag in ((sys.argv[1], False), (sys.argv[2], True), (sys.argv[3], True)):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=flag).eval()
    AutoTokenizer.from_pretrained(folder, trust_remote_code=flag)
    saved = torch.load(folder + "/../logits.pt")
    with torch.no_grad():
        actual = model(input_ids=saved["tokens"]).logits
    assert torch.equal(actual, saved["logits"]), folder
for folder in sys.argv[2:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise AssertionError(f"{folder} loaded without the flag")
"""


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(families.VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0")


@pytest.fixture
def model():
    return masked(families.with_lora(families.build("llama")), "width")


def test_folders_load_where_atp_cannot_be_imported(tmp_path):
    folders = []
    for space in ("uniform", "width", "disp"):
        live = masked(families.with_lora(families.build("phi3")), space)
        folder = export(live, tmp_path / space / "pruned", processing_class=tokenizer())
        saved = {"tokens": families.tokens(), "logits": families.logits(load(folder).eval())}
        torch.save(saved, tmp_path / space / "logits.pt")
        folders.append(str(folder))
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STRANGER, *folders]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("space", ["width", "values", "disp"])
def test_the_stock_class_never_takes_a_ragged_folder_silently(space):
    with pytest.raises(RuntimeError, match="size mismatch|ignore_mismatched_sizes"):
        LlamaForCausalLM.from_pretrained(exported("llama", space).folder)


@pytest.mark.parametrize("space", SPACES)
def test_the_config_says_what_was_done(space):
    case = exported("llama", space)
    values = json.loads((case.folder / "config.json").read_text())
    assert values["atp"]["format"] == 1
    assert values["atp"]["space"] == case.space.name
    assert values["atp"]["sparsity"] == pytest.approx(case.space.sparsity(case.masks), abs=1e-6)
    plain = is_plain(case.space, case.masks)
    assert values["model_type"] == ("llama" if plain else "atp")
    assert (case.folder / "generation_config.json").exists()


def test_the_tokenizer_comes_along(model, tmp_path):
    folder = export(model, tmp_path / "out", processing_class=tokenizer())
    assert AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens([5]) == ["w5"]


def test_an_existing_folder_is_an_error_unless_overwritten(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(ATPError, match="exists"):
        export(model, out)
    assert (out / "mine.txt").read_text() == "kept"
    export(model, out, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert load(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def fails_at_the_fifth_tensor(monkeypatch, error):
    calls = []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise error
        _write(*arguments)

    monkeypatch.setattr(sys.modules[_write.__module__], "_write", failing)


@pytest.mark.parametrize("old", [False, True])
def test_a_full_disk_leaves_nothing_behind_and_the_old_folder_whole(model, tmp_path, monkeypatch, old):
    out = tmp_path / "out"
    if old:
        out.mkdir()
        (out / "mine.txt").write_text("kept")
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    fails_at_the_fifth_tensor(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(CheckpointError, match="No space left") as caught:
        export(model, out, overwrite=True)
    assert "\n" not in str(caught.value)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_swapped_stays(model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    real = type(out).rename

    def rename(self, target):
        if self.name.endswith(".tmp"):
            raise OSError(errno.EACCES, "Permission denied")
        return real(self, target)

    monkeypatch.setattr(type(out), "rename", rename)
    with pytest.raises(CheckpointError, match="Permission denied"):
        export(model, out, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "mine.txt").read_text() == "kept"


def test_an_interrupt_leaves_nothing_behind(model, tmp_path, monkeypatch):
    fails_at_the_fifth_tensor(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_the_class_does_not_have_is_named(model, tmp_path):
    model.model.register_buffer("extra", torch.zeros(2))
    with pytest.raises(UnsupportedModelError, match=r"extra: .* has no such tensor"):
        export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_values_too_large_for_the_dtype_are_named_and_nothing_is_left(model, tmp_path):
    with torch.no_grad():
        attachment_of(model).lm.get_input_embeddings().weight[0, 0] = 1e5
    with pytest.raises(UnsupportedModelError, match=r"embed_tokens.weight: holds values too large for torch.float16: "):
        export(model, tmp_path / "out", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    assert export(model, tmp_path / "out", dtype=torch.bfloat16).is_dir()


def test_no_bar_counts_shards_of_nothing(model, tmp_path, capfd):
    shown = hf_logging.is_progress_bar_enabled()
    for on in (False, True):
        (hf_logging.enable_progress_bar if on else hf_logging.disable_progress_bar)()
        export(model, tmp_path / str(on))
        assert hf_logging.is_progress_bar_enabled() == on
    if not shown:
        hf_logging.disable_progress_bar()
    assert "Writing model shards" not in capfd.readouterr().err


def test_a_model_without_masks_is_refused(tmp_path):
    with pytest.raises(ATPError, match="no masks attached"):
        export(families.build("llama"), tmp_path / "out")


def test_soft_empty_and_foreign_masks_are_refused(model, tmp_path):
    masks = attachment_of(model).decision()
    for bad in (masks["0.mlp"] * 0.5, masks["0.mlp"] * 0, masks["0.mlp"][:-1]):
        with pytest.raises(ATPError, match=r"0\.mlp"):
            export(model, tmp_path / "out", masks=masks | {"0.mlp": bad})


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="not a folder"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_an_unreadable_config_is_said(model, tmp_path, text):
    out = export(model, tmp_path / "out")
    (out / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(out)


@pytest.mark.parametrize("keep", [0, 100, 20_000])
@pytest.mark.parametrize("space", ["uniform", "disp"])
def test_truncated_weights_are_said(space, keep, tmp_path):
    out = export(masked(families.build("llama"), space), tmp_path / "out")
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="export the model again") as caught:
        load(out)
    assert "\n" not in str(caught.value)


def test_missing_weights_are_said(tmp_path):
    out = export(masked(families.build("llama"), "uniform"), tmp_path / "out")
    (out / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="export the model again"):
        load(out)


@pytest.mark.parametrize("space", ["uniform", "disp"])
@pytest.mark.parametrize("lost", ["q_proj.weight", "residual_in"])
def test_a_missing_tensor_is_named(space, lost, tmp_path):
    out = export(masked(families.build("llama"), space), tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    dropped = [name for name in tensors if name.endswith(lost)]
    if not dropped:
        pytest.skip(f"{space} has no {lost}")
    save_file({k: v for k, v in tensors.items() if k != dropped[0]}, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=dropped[0].replace(".", r"\.")):
        load(out)


def test_generation_settings_that_are_not_saved_cost_no_export(tmp_path, caplog):
    model = masked(families.with_lora(families.build("llama")), "width")
    settings = model.get_base_model().generation_config
    settings.do_sample, settings.temperature, settings.eos_token_id = False, 0.6, [1, 2]
    folder = export(model, tmp_path / "out")
    assert "generation settings are not saved" in caplog.text
    found = GenerationConfig.from_pretrained(folder)
    assert (found.eos_token_id, found.temperature) == ([1, 2], GenerationConfig().temperature)
    assert settings.temperature == 0.6
