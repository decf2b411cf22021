"""torch.export and ONNX of exported folders, by the very code of `configs/DEPLOY.md`, for any batch and length.

Oracle: the same model run by torch; `logits` of the masked model for the shape that was traced.
"""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests import families
from tests.export.cases import SPACES, exported

PAGE = Path(__file__).parents[2] / "configs" / "DEPLOY.md"
needs_onnx = pytest.mark.skipif(
    any(find_spec(package) is None for package in ("onnxscript", "onnxruntime")),
    reason="needs onnxscript and onnxruntime: pip install 'atp[onnx]'",
)
EVERY = [("llama", space) for space in SPACES] + [("gemma3", "uniform"), ("gemma3", "disp"), ("gemma3", "values")]
every_case = pytest.mark.parametrize(("family", "space"), EVERY)
some_cases = pytest.mark.parametrize(
    ("family", "space"), [("gemma3", "uniform"), *(("llama", space) for space in ("uniform", "width", "disp", "depth"))]
)
ALLOWED = 1e-5


def run(title: str, names: dict) -> dict:
    """The first Python block of that section, run with `names` at hand."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1), names)
    return names


def batches():
    """Token ids and masks: the traced shape, another one, and one with padding on the left."""
    ids = families.tokens()
    padded = torch.ones_like(ids)
    padded[1, :5] = 0
    return {"traced": (ids, torch.ones_like(ids)), "short": (ids[:1, :7], padded[:1, :7]), "padded": (ids, padded)}


def check(computed, case) -> None:
    for name, (ids, mask) in batches().items():
        with torch.no_grad():
            expected = case.logits if name == "traced" else case.loaded(ids, attention_mask=mask).logits
        error = families.relative_error(computed(ids, mask)[mask.bool()], expected[mask.bool()])
        assert error <= ALLOWED, name


def test_the_page_loads_a_folder_and_its_code_is_python():
    case = exported("llama", "uniform")
    model = run("transformers", {"folder": str(case.folder)})["model"]
    assert torch.equal(families.logits(model.eval()), families.logits(case.loaded))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        compile(block, PAGE.name, "exec")


@every_case
def test_torch_export_computes_the_same_for_any_batch_and_length(family, space):
    case = exported(family, space)
    program = run("torch.export", {"folder": str(case.folder)})["program"]
    check(program.module(), case)


@needs_onnx
@some_cases
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch 2.13's own
def test_onnx_runtime_computes_the_same_for_any_batch_and_length(family, space, tmp_path):
    case = exported(family, space)
    names = run("torch.export", {"folder": str(case.folder)})
    session = run("ONNX Runtime", names | {"out": str(tmp_path / "model.onnx")})["session"]
    inputs = [value.name for value in session.get_inputs()]

    def computed(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, dict(zip(inputs, (ids.numpy(), mask.numpy()), strict=True)))[0])

    check(computed, case)
