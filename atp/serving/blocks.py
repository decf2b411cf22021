"""What an engine with models of transformers' own needs to know of a ragged or `disp` config: sizes per block."""

import copy
from collections.abc import Hashable
from functools import cache
from typing import Any

from transformers import MODEL_MAPPING, PreTrainedConfig

from atp.export.modeling_atp import resize


def block_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Per block, `config` with the head counts of that block, and a `head_dim` that does not depend on them.

    Raises:
        ValueError: where a block has no attention, or values have fewer dimensions than keys.
    """
    blocks = config.atp["blocks"]
    if "value" in blocks["kept"]:
        raise ValueError(
            "values have fewer dimensions than keys, which vLLM has no place for: prune in another space than `values`"
        )
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    results = []
    for index in range(config.num_hidden_layers):
        block = copy.copy(config)
        block.head_dim = head_dim
        if "kv" in blocks["kept"]:
            full, kept = blocks["full"]["kv"][index], blocks["kept"]["kv"][index]
            if kept == 0:
                raise ValueError(
                    f"block {index} has no attention, which vLLM has no place for: prune in `depth` with uniform=True, "
                    "so that whole blocks go"
                )
            block.num_attention_heads, block.num_key_value_heads = heads // full * kept, kept
        results.append(block)
    return results


@cache
def headless_class(config_class: Hashable) -> Any:
    """The family's model without its language-modelling head, its blocks resized.

    Args:
        config_class: one of `modeling_atp`'s, as `PrunedLlamaConfig`.
    """
    stock: Any = MODEL_MAPPING[config_class.__base__]  # type: ignore[attr-defined]

    class Headless(stock):
        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            blocks = config.atp["blocks"]
            resize(self, blocks | {"container": blocks["container"].removeprefix(f"{self.base_model_prefix}.")})

    Headless.__name__, Headless.config_class = stock.__name__, config_class
    return Headless
