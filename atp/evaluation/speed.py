"""Speed and size of a model: tokens per second of prefill and greedy generation, parameters, bytes on disk.

Each speed is the median of several timed calls after a warm-up, on random token ids, with the 20th and 80th percentile
of the calls. Not covered: memory, serving engines, latency under load.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from atp.passes import evaluating
from atp.structure.live import is_quantised

_SHARES = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)


@dataclass(frozen=True)
class Speed:
    """Median `tokens_per_second`; `latency_ms` of the median call, `p20_ms` and `p80_ms`; `calls` that were timed."""

    tokens_per_second: float
    latency_ms: float
    p20_ms: float
    p80_ms: float
    calls: int


@torch.no_grad()
def prefill_speed(
    model: PreTrainedModel, batch_size: int = 1, prompt_tokens: int = 256, calls: int = 5, warmup_calls: int = 1
) -> Speed:
    """Tokens per second of one forward over `(batch_size, prompt_tokens)`, with the cache filled."""
    ids = _random_ids(model, batch_size, prompt_tokens)
    seconds = _timed(model, lambda: model(input_ids=ids, use_cache=True), calls, warmup_calls)
    return _speed(batch_size * prompt_tokens, seconds)


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

    return _speed(batch_size * generated_tokens, _timed(model, generate, calls, warmup_calls))


def count_parameters(model: nn.Module) -> int:
    """Parameters of `model`; tied weights count once, and packed ones for what they hold."""
    return sum(parameter_sizes(model).values())


def parameter_sizes(model: nn.Module) -> dict[int, int]:
    """How many numbers each parameter of `model` stands for, by its `id`."""
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    for module in model.modules():
        if isinstance(module, nn.Linear) and is_quantised(module):
            sizes[id(module.weight)] = module.in_features * module.out_features
    return sizes


def folder_bytes(path: str | Path) -> int:
    """Bytes of all files in a folder, and of those below unless it is a model's, which reads none of them."""
    files = "*" if (Path(path) / "config.json").is_file() else "**/*"
    return sum(file.stat().st_size for file in Path(path).glob(files) if file.is_file())


def _random_ids(model: PreTrainedModel, batch_size: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (batch_size, tokens), generator=generator).to(model.device)


def _speed(tokens: int, seconds: Sequence[float]) -> Speed:
    low, median, high = torch.tensor(seconds, dtype=torch.float64).quantile(_SHARES).tolist()
    return Speed(tokens / median, median * 1e3, low * 1e3, high * 1e3, len(seconds))


def _timed(model: PreTrainedModel, call: Callable[[], object], calls: int, warmup_calls: int) -> list[float]:
    with evaluating(model):
        for _ in range(warmup_calls):
            call()
        return [_seconds(model, call) for _ in range(calls)]


def _seconds(model: PreTrainedModel, call: Callable[[], object]) -> float:
    _synchronise(model)
    start = time.perf_counter()
    call()
    _synchronise(model)
    return time.perf_counter() - start


def _synchronise(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
