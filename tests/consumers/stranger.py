"""What somebody does with exported folders who has never heard of atp: a script, run in a process of its own.

    python stranger.py CASES.json RESULTS.json SCRATCH

`CASES.json` holds a list of `{"name", "folder", "trust"}`; `<folder>.safetensors` holds `tokens` and the `logits` of
the masked model that was exported. `RESULTS.json` gets, per case and behaviour, "" or what went wrong; behaviours whose
package is not installed are left out. Needs torch, transformers and safetensors; `import atp` is made to fail first.
"""

import copy
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
EXACT, INT8 = 1e-5, 8e-2


class Case:
    """A folder, what it should compute, and a model loaded from it."""

    def __init__(self, folder: str, trust: bool, scratch: Path) -> None:
        self.folder, self.trust, self.scratch = folder, trust, scratch
        expected = load_file(f"{folder}.safetensors")
        self.tokens, self.expected = expected["tokens"], expected["logits"]
        self.model = self.load(folder)

    def load(self, folder: str | Path, **settings: object) -> PreTrainedModel:
        """As the model card says."""
        flag = {"trust_remote_code": True} if self.trust else {}
        return AutoModelForCausalLM.from_pretrained(folder, **flag, **settings).eval()

    def logits(self, model: torch.nn.Module) -> Tensor:
        """Of the case's tokens, `(rows, length, vocabulary)`."""
        with torch.no_grad():
            return model(input_ids=self.tokens).logits

    def close(self, model: torch.nn.Module, expected: Tensor, tolerance: float) -> None:
        """Relative error in float32."""
        error = ((self.logits(model).float() - expected).norm() / expected.norm()).item()
        assert error <= tolerance, f"relative error {error:.1e} > {tolerance:.0e}"


def needs_the_flag(case: Case) -> None:
    """Plain folders load without it and hold no code; others name it when they are refused."""
    if not case.trust:
        assert not list(Path(case.folder).glob("*.py"))
        return
    try:
        AutoModelForCausalLM.from_pretrained(case.folder, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
    else:
        raise AssertionError("loaded without the flag")


def logits(case: Case) -> None:
    """Equal those of the masked model."""
    case.close(case.model, case.expected, EXACT)


def generate_with_and_without_cache(case: Case) -> None:
    """The same greedy tokens, with a static cache too."""
    prompt = case.tokens[:, :9]
    plain = case.model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **GREEDY)
    for cache in ({"use_cache": True}, {"cache_implementation": "static"}):
        found = case.model.generate(prompt, attention_mask=torch.ones_like(prompt), **cache, **GREEDY)
        assert torch.equal(found, plain), cache


def batch_with_left_padding(case: Case) -> None:
    """Rows of a padded batch go on as each does alone."""
    rows = [case.tokens[0, :9], case.tokens[1, :4]]
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, -len(row) :], mask[i, -len(row) :] = row, 1
    together = case.model.generate(ids, attention_mask=mask, **GREEDY)[:, 9:]
    for i, row in enumerate(rows):
        alone = case.model.generate(row[None], attention_mask=torch.ones_like(row[None]), **GREEDY)[0, len(row) :]
        assert torch.equal(together[i], alone), f"row {i}: {together[i].tolist()} in a batch, {alone.tolist()} alone"


def save_and_reload(case: Case) -> None:
    """Bit for bit, from a folder written by `save_pretrained`, twice."""
    first, second = case.scratch / "first", case.scratch / "second"
    case.model.save_pretrained(first)
    again = case.load(first)
    again.save_pretrained(second)
    assert torch.equal(case.logits(again), case.logits(case.model))
    assert torch.equal(case.logits(case.load(second)), case.logits(case.model))


def tune_with_peft(case: Case) -> None:
    """LoRA on all linears learns a batch; the adapter, saved and put on the base again or merged, computes the same."""
    import peft  # noqa: PLC0415  # optional

    settings = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(copy.deepcopy(case.model), settings).train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(3):
        loss = tuned(input_ids=case.tokens, labels=case.tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    expected = case.logits(tuned.eval())
    tuned.save_pretrained(case.scratch / "adapter")
    case.close(peft.PeftModel.from_pretrained(case.load(case.folder), case.scratch / "adapter").eval(), expected, EXACT)
    case.close(tuned.merge_and_unload(), expected, EXACT)


def bitsandbytes_int8(case: Case) -> None:
    """Loaded in 8 bits, by the flag of `from_pretrained`."""
    settings = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = case.load(case.folder, quantization_config=settings, device_map="cpu", dtype=torch.float32)
    assert any(p.dtype == torch.int8 for p in model.parameters())
    case.close(model, case.expected, INT8)


def torchao_int8(case: Case) -> None:
    """Weights in 8 bits, by torchao's own call and by the flag of `from_pretrained`."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # noqa: PLC0415  # optional

    model = copy.deepcopy(case.model)
    quantize_(model, Int8WeightOnlyConfig())
    case.close(model, case.expected, INT8)
    settings = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    loaded = case.load(case.folder, quantization_config=settings, dtype=torch.float32)
    names = [type(p.data).__name__ for p in loaded.parameters()]
    assert any(name != "Tensor" for name in names), "nothing was quantised"
    case.close(loaded, case.expected, INT8)


BEHAVIOURS: dict[str, Callable[[Case], None]] = {
    behaviour.__name__: behaviour
    for behaviour in (
        needs_the_flag,
        logits,
        generate_with_and_without_cache,
        batch_with_left_padding,
        save_and_reload,
        tune_with_peft,
        bitsandbytes_int8,
        torchao_int8,
    )
}
OPTIONAL = {"tune_with_peft": "peft", "bitsandbytes_int8": "bitsandbytes", "torchao_int8": "torchao"}


def missing(behaviour: str) -> str | None:
    """The package that a behaviour needs and this environment lacks."""
    package = OPTIONAL.get(behaviour)
    return package if package and importlib.util.find_spec(package) is None else None


def check(folder: str, trust: bool, scratch: Path) -> dict[str, str]:
    """Per behaviour that can be run here, "" or the last line of what went wrong."""
    try:
        case = Case(folder, trust, scratch)
    except Exception as error:
        return {name: f"load: {type(error).__name__}: {error}" for name in BEHAVIOURS}
    results = {}
    for name, behaviour in BEHAVIOURS.items():
        if missing(name):
            continue
        try:
            torch.manual_seed(0)
            behaviour(case)
            results[name] = ""
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error} ({traceback.extract_tb(error.__traceback__)[-1]})"
    return results


def main(cases: str, out: str, scratch: str) -> None:
    """Check all cases, and write down what was found."""
    sys.modules["atp"] = None  # type: ignore[assignment]  # importing it raises now
    torch.set_num_threads(1)
    results = {
        case["name"]: check(case["folder"], case["trust"], Path(scratch) / str(i))
        for i, case in enumerate(json.loads(Path(cases).read_text()))
    }
    Path(out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
