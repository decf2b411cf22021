"""Causal LMs whose blocks have sizes of their own: stock transformers models, resized as `config.atp["blocks"]` says.

Self-contained on purpose: it imports torch and transformers only. `atp` copies this very file into each exported
folder that no stock class can hold; `trust_remote_code=True` finds it there. Where `atp` is imported no flag is needed.

`PrunedLlamaForCausalLM` and `PrunedLlamaConfig`, and likewise for every family, are subclasses of transformers'
`LlamaForCausalLM` and `LlamaConfig`. They are made when first asked for, by this module's `__getattr__`.

`config.atp["blocks"]` holds:
    container: path of the list of blocks.        attention: path of the attention inside a block.
    full, kept: per kind of group, how many each block had and has: {"kv": [3, 3], "mlp": [96, 96]}.
    linears: per linear layer, which kind owns its rows (outputs) and its columns (inputs).
    biases: linear layers that have a bias although the family's have none.
    norms: per norm over all heads, the kind that owns its features.
    selections: per attention or MLP, the kinds of residual dimensions it reads and writes. It then sees only the
        dimensions in its buffer `residual_in`, and adds to those in `residual_out`; the others get zeros.
"""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

MODEL_TYPE = "atp"
PREFIX = "Pruned"


def __getattr__(name: str) -> type:
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stock = getattr(transformers, name.removeprefix(PREFIX))
    globals()[name] = _config_class(stock) if issubclass(stock, PreTrainedConfig) else _model_class(stock)
    return globals()[name]


def _config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    body = {"model_type": MODEL_TYPE, "_auto_class": "AutoConfig", "__module__": __name__}
    return type(f"{PREFIX}{stock.__name__}", (stock,), body)


def _model_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    name = f"{PREFIX}{stock.config_class.__name__}"
    config_class = globals()[name] if name in globals() else __getattr__(name)

    def init(self: PreTrainedModel, config: PreTrainedConfig) -> None:
        stock.__init__(self, config)
        resize(self, config.atp["blocks"])

    body = {
        "__init__": init,
        "__module__": __name__,
        "_auto_class": "AutoModelForCausalLM",
        "config_class": config_class,
    }
    return type(f"{PREFIX}{stock.__name__}", (stock,), body)


def resize(model: PreTrainedModel, layout: dict) -> None:
    """Give every block of a stock `model` its own sizes, in place; module names stay those of the family."""
    for index, block in enumerate(model.get_submodule(layout["container"])):
        kept = {kind: counts[index] for kind, counts in layout["kept"].items()}
        full = {kind: counts[index] for kind, counts in layout["full"].items()}

        def size(features: int, kind: str | None, kept: dict = kept, full: dict = full) -> int:
            return features if kind is None else features // full[kind] * kept[kind]

        for path, owner in layout["linears"].items():
            linear = block.get_submodule(path)
            _shrink_linear(
                linear, size(linear.out_features, owner.get("rows")), size(linear.in_features, owner.get("cols"))
            )
        for path in layout.get("biases", ()):
            linear = block.get_submodule(path)
            linear.bias = nn.Parameter(torch.zeros(linear.out_features, device=linear.weight.device))
        for path, kind in layout["norms"].items():
            norm = block.get_submodule(path)
            norm.weight = nn.Parameter(norm.weight.detach()[: size(len(norm.weight), kind)].clone())
        if "kv" in full:
            _set_heads(block.get_submodule(layout["attention"]), full["kv"], kept["kv"])
        for path, (read, written) in layout["selections"].items():
            _select_residual(block.get_submodule(path), kept[read], kept[written], full[written])


def _shrink_linear(linear: nn.Linear, out_features: int, in_features: int) -> None:
    linear.weight = nn.Parameter(linear.weight.detach()[:out_features, :in_features].clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[:out_features].clone())
    linear.out_features, linear.in_features = out_features, in_features


class _BlockConfig:
    """A model's config as one attention sees it: `own` values first, everything else read through."""

    def __init__(self, config: PreTrainedConfig, own: dict[str, int]) -> None:
        self.__dict__.update(own, _config=config)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") or name == "_config":  # absent while being copied or unpickled
            raise AttributeError(name)
        return getattr(self._config, name)


def _set_heads(attention: Any, full: int, kept: int) -> None:
    """Head counts for attentions that split packed projections by them (Phi-3); others go by shapes."""
    heads = attention.config.num_attention_heads // full * kept
    attention.config = _BlockConfig(attention.config, {"num_attention_heads": heads, "num_key_value_heads": kept})
    for name, count in (("num_heads", heads), ("num_key_value_heads", kept)):
        if name in vars(attention):
            setattr(attention, name, count)


def _select_residual(module: Any, read: int, written: int, hidden_size: int) -> None:
    device = next(module.parameters()).device
    module.register_buffer("residual_in", torch.arange(read, device=device))
    module.register_buffer("residual_out", torch.arange(written, device=device))
    module.residual_size = hidden_size
    module.register_forward_pre_hook(_gather, with_kwargs=True)
    module.register_forward_hook(_scatter)


def _gather(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return (_kept(args[0], module.residual_in), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": _kept(kwargs["hidden_states"], module.residual_in)}


def _scatter(module: Any, _args: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
    written = output[0] if isinstance(output, tuple) else output
    residual = written.new_zeros(*written.shape[:-1], module.residual_size)
    residual.scatter_(-1, module.residual_out.expand_as(written), written)
    return (residual, *output[1:]) if isinstance(output, tuple) else residual


def _kept(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`x[..., index]`; on CPUs `gather` takes less than half the time of `index_select`."""
    return x.gather(-1, index.expand(*x.shape[:-1], -1))
