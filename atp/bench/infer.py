"""Inference of a dense model and of what an export at random decisions gives: reading a prompt, and writing tokens."""

import inspect
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from atp.bench.copies import mask_at_random, on_the_same_tensors
from atp.bench.timing import Case
from atp.config import ATPConfig
from atp.evaluation import flops_per_token
from atp.export import export, load


def pruned_copy(base: PreTrainedModel, config: ATPConfig) -> PreTrainedModel:
    """What `config.space` and `config.sparsity` leave of `base` by random decisions, exported and loaded again."""
    model = on_the_same_tensors(base)
    mask_at_random(model, config)
    with tempfile.TemporaryDirectory() as folder:
        return load(export(model, Path(folder) / "pruned"), dtype=base.dtype).to(base.device).eval()


def infer_cases(dense: PreTrainedModel, pruned: PreTrainedModel, tokens: int, written: int) -> dict[str, list[Case]]:
    """Cases of `prefill` (one prompt of `tokens`, logits of the last) and of `decode` (`written` tokens after it).

    The limit of prefill is the linear layers' share of FLOPs, the head left out; that of decoding is the share of
    bytes, each weight that a token needs being read once.
    """
    before, after = (flops_per_token(model) // 2 for model in (dense, pruned))
    head_before, head_after = (model.get_output_embeddings().weight.numel() for model in (dense, pruned))
    ids = torch.randint(dense.config.get_text_config().vocab_size, (1, tokens)).to(dense.device)
    return {
        "prefill": [
            Case("dense", _Prefill(dense, ids)),
            Case("pruned", _Prefill(pruned, ids), (after - head_after) / (before - head_before)),
        ],
        "decode": [
            Case("dense", _Decode(dense, ids, written)),
            Case("pruned", _Decode(pruned, ids, written), after / before),
        ],
    }


class _Prefill:
    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self._model, self._ids = model, ids

    @torch.no_grad()
    def __call__(self) -> None:
        self._model(self._ids, use_cache=True, logits_to_keep=1)


class _Decode:
    """Greedy; every call begins where the prompt ends."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, ids: Tensor, written: int) -> None:
        self._model, self._written = model, written
        self._cache = DynamicCache()
        # transformers 5.24 calls it by another name
        named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self._cached = {named: self._cache}
        output = model(ids, logits_to_keep=1, **self._cached)
        self._first = output.logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def __call__(self) -> None:
        token = self._first
        for _ in range(self._written):
            token = self._model(token, **self._cached).logits[:, -1:].argmax(-1)
        self._cache.crop(-self._written)
