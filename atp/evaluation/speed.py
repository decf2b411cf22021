"""Speed and size of a model: tokens per second of prefill and greedy generation, parameters, bytes on disk.

Each speed is the median of several timed calls after a warm-up, on random token ids. Not covered: memory, serving
engines, percentiles of latency under load.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Speed:
    """Median `tokens_per_second`; `latency_ms` of the median call; `calls` that were timed."""

    tokens_per_second: float
    latency_ms: float
    calls: int


@torch.no_grad()
def prefill_speed(
    model: PreTrainedModel, batch_size: int = 1, prompt_tokens: int = 256, calls: int = 5, warmup_calls: int = 1
) -> Speed:
    """Tokens per second of one forward over `(batch_size, prompt_tokens)`, with the cache filled."""
    ids = _random_ids(model, batch_size, prompt_tokens)
    seconds = _median_seconds(model, lambda: model(input_ids=ids, use_cache=True), calls, warmup_calls)
    return Speed(batch_size * prompt_tokens / seconds, seconds * 1e3, calls)


@torch.no_grad()
def generation_speed(
    model: PreTrainedModel,
    batch_size: int = 1,
    prompt_tokens: int = 32,
    generated_tokens: int = 32,
    calls: int = 3,
    warmup_calls: int = 1,
) -> Speed:
    """Generated tokens per second of greedy decoding with a cache, prefill included."""
    ids = _random_ids(model, batch_size, prompt_tokens)

    def generate() -> None:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=generated_tokens,
            max_new_tokens=generated_tokens,
            pad_token_id=0,
        )

    seconds = _median_seconds(model, generate, calls, warmup_calls)
    return Speed(batch_size * generated_tokens / seconds, seconds * 1e3, calls)


def count_parameters(model: nn.Module) -> int:
    """Parameters of `model`; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def folder_bytes(path: str | Path) -> int:
    """Bytes of all files in a folder and its sub-folders."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())


def _random_ids(model: PreTrainedModel, batch_size: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (batch_size, tokens), generator=generator).to(model.device)


def _median_seconds(model: PreTrainedModel, call: Callable[[], object], calls: int, warmup_calls: int) -> float:
    was_training = model.training
    model.eval()
    try:
        for _ in range(warmup_calls):
            call()
        return statistics.median(_seconds(model, call) for _ in range(calls))
    finally:
        model.train(was_training)


def _seconds(model: PreTrainedModel, call: Callable[[], object]) -> float:
    _synchronise(model)
    start = time.perf_counter()
    call()
    _synchronise(model)
    return time.perf_counter() - start


def _synchronise(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
