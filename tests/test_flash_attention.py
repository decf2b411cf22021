"""FlashAttention in a run with our callback, and of what it exports. Oracle: the same without it.

Transformers' own way to the kernel, which needs a GPU: PyTorch's attention stands for it, and takes what it would be
given. Not covered: windows of packed rows, which it keeps apart.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, Trainer
from transformers.integrations import flash_attention
from transformers.masking_utils import flash_attention_mask

from atp import load
from atp.layers import attachment_of
from tests import runs

FLASH = "stand_in"
"""What transformers calls `flash_attention_2`; names with "flash" in them it looks for in packages and on the hub."""

AttentionInterface.register(FLASH, flash_attention.flash_attention_forward)
AttentionMaskInterface.register(FLASH, flash_attention_mask)


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Query and key heads of every call of what stands for the kernel."""
    seen: list[tuple[int, int]] = []

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        is_causal: bool,
        softmax_scale: float,
        target_dtype: torch.dtype | None,
        **_: Any,
    ) -> Tensor:
        assert attention_mask is None or attention_mask.all()
        dtype = query.dtype if target_dtype is None else target_dtype
        q, k, v = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
        seen.append((q.shape[1], k.shape[1]))
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=softmax_scale, enable_gqa=True
        ).transpose(1, 2)

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", kernel)
    return seen


def ended(folder: Path, attention: str = "sdpa", **changes: Any) -> Trainer:
    """A run with that attention."""
    model = runs.peft_model()
    model.get_base_model().set_attn_implementation(attention)
    run = runs.trainer(folder, runs.config(**(runs.LATE | changes)), model=model)
    run.train()
    return run


@pytest.mark.parametrize("changes", [{}, {"mode": "alternating", "impl": "eager"}, {"space": "disp"}], ids=str)
def test_nothing_that_is_decided_changes(changes: dict[str, Any], heads: list[tuple[int, int]], tmp_path: Path) -> None:
    flash = ended(tmp_path / "flash", FLASH, **changes)
    called = len(heads)
    plain = ended(tmp_path / "plain", **changes)
    assert called > 0
    assert len(heads) == called
    assert runs.losses(flash) == pytest.approx(runs.losses(plain), abs=1e-5)
    assert runs.same(attachment_of(flash.model).decision(), attachment_of(plain.model).decision())


def test_heads_that_are_pruned_reach_the_kernel_no_more(heads: list[tuple[int, int]], tmp_path: Path) -> None:
    """In the exported model; its logits are those that other attention gives."""
    ended(tmp_path, sparsity=0.6, init_floor=0.0)
    ids = torch.arange(2, 22)[None]
    flash, plain = (load(tmp_path / "pruned", attn_implementation=name).eval() for name in (FLASH, "eager"))
    with torch.no_grad():
        torch.testing.assert_close(flash(ids).logits, plain(ids).logits)
    kept = [block.self_attn.k_proj.out_features // block.self_attn.head_dim for block in flash.model.layers]
    whole = runs.peft_model().config.num_key_value_heads
    assert min(kept) < whole
    assert [keys for _, keys in heads] == [keys for keys in kept if keys]
