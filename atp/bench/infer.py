"""Inference of a dense model and of what an export at random decisions gives: reading a prompt, and writing tokens."""

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

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


def infer_cases(
    dense: PreTrainedModel, pruned: PreTrainedModel, tokens: int, written: int, compiled: bool = False
) -> dict[str, list[Case]]:
    """Cases of `prefill` (one prompt of `tokens`, logits of the last) and of `decode` (`written` tokens after it).

    The limit of prefill is the linear layers' share of FLOPs, the head left out; that of decoding is the share of
    bytes, each weight that a token needs being read once.

    Args:
        compiled: decode with both models compiled, each with a cache of fixed size: on a GPU a token is a CUDA graph
            then, where launching every operation by itself takes longer than the operations. Prompts are read as they
            are, as `generate` does: compiled, attention would have a mask in place of flash attention.
    """
    before, after = (flops_per_token(model) // 2 for model in (dense, pruned))
    head_before, head_after = (model.get_output_embeddings().weight.numel() for model in (dense, pruned))
    ids = torch.randint(dense.config.get_text_config().vocab_size, (1, tokens)).to(dense.device)
    length = tokens + written if compiled else None
    return {
        "prefill": [
            Case("dense", _Prefill(_Reader(dense), ids)),
            Case("pruned", _Prefill(_Reader(pruned), ids), (after - head_after) / (before - head_before)),
        ],
        "decode": [
            Case("dense", _Decode(_Reader(dense, length), ids, written)),
            Case("pruned", _Decode(_Reader(pruned, length), ids, written), after / before),
        ],
    }


class _Reader:
    """A model that reads tokens into a cache of its own.

    Args:
        length: tokens that a cache of fixed size holds, for which the model is compiled; None for one that grows.
    """

    def __init__(self, model: PreTrainedModel, length: int | None = None) -> None:
        self._model = self._compiled = model
        self._cache: Cache = DynamicCache()
        if length is not None:
            self._cache = StaticCache(config=model.config, max_cache_len=length)
            self._compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
        # transformers 5.24 calls it by another name
        named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self._cached = {named: self._cache}

    @torch.no_grad()
    def begin(self, ids: Tensor) -> Tensor:
        """Read a prompt as the model does uncompiled, which is how a cache gets its tensors; gives what `read` does."""
        return self._next(self._model, ids)

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """Read `ids`, `(1, tokens)`, and choose the next token, `(1, 1)`."""
        if isinstance(self._cache, StaticCache):
            torch.compiler.cudagraph_mark_step_begin()
        return self._next(self._compiled, ids)

    def forget(self, tokens: int) -> None:
        """Take the last `tokens` out of the cache.

        What has slid out of a fixed window does not come back: other tokens are chosen then, in the same time.
        """
        if isinstance(self._cache, StaticCache):
            for layer in self._cache.layers:  # transformers 5.17 cannot crop them, and no version all of them
                if layer.is_sliding:
                    layer.cumulative_length_int -= tokens
                    layer.cumulative_length.fill_(layer.cumulative_length_int)
                else:
                    layer.cumulative_length.sub_(tokens)
        else:
            self._cache.crop(-tokens)

    def _next(self, model: Callable[..., Any], ids: Tensor) -> Tensor:
        return model(ids, use_cache=True, logits_to_keep=1, **self._cached).logits[:, -1:].argmax(-1)


class _Prefill:
    def __init__(self, reader: _Reader, ids: Tensor) -> None:
        self._reader, self._ids = reader, ids

    def __call__(self) -> None:
        self._reader.read(self._ids)
        self._reader.forget(self._ids.shape[1])


class _Decode:
    """Greedy; every call begins where the prompt ends."""

    def __init__(self, reader: _Reader, ids: Tensor, written: int) -> None:
        self._reader, self._written = reader, written
        self._first = reader.begin(ids)

    def __call__(self) -> None:
        token = self._first
        for _ in range(self._written):
            token = self._reader.read(token)
        self._reader.forget(self._written)
