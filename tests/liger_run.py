"""A run under Liger, in a process of its own, for Liger changes classes: `python -m tests.liger_run FOLDER SETTINGS`.

The fused loss is Liger's kernel, in Triton's interpreter. That takes most of a minute a step for RoPE, and refuses
RMSNorm and SwiGLU, so these are Liger's functions around PyTorch's arithmetic, which overwrites what their kernels do:
RoPE the projections and the gradients it turns, SwiGLU what it was given, RMSNorm the gradient it is given.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from liger_kernel.ops import fused_linear_cross_entropy, rms_norm, rope, swiglu
from torch import Tensor

from atp.layers import attachment_of
from tests import runs

PARTS = ("rope", "swiglu", "rms_norm", "fused_linear_cross_entropy")

used: Counter[str] = Counter()


def swiglu_forward(a: Tensor, b: Tensor, gate_multiplier: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    used["swiglu"] += 1
    assert gate_multiplier == 1
    return a, b, torch.nn.functional.silu(a) * b


def swiglu_backward(a: Tensor, b: Tensor, dc: Tensor, gate_multiplier: float = 1.0) -> tuple[Tensor, Tensor]:
    s = a.sigmoid()
    da, db = dc * b * (s + a * s * (1 - s)), dc * a * s
    return a.copy_(da), b.copy_(db)


def rms_norm_forward(x: Tensor, w: Tensor, eps: float, offset: float, casting_mode: str, _row_mode: Any) -> tuple:
    used["rms_norm"] += 1
    assert (offset, casting_mode) == (0.0, "llama")
    scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * scale * w, x, scale, None, None, None


def rms_norm_backward(dy: Tensor, x: Tensor, w: Tensor, scale: Tensor, *_: Any, needs_dw: bool = False) -> tuple:
    assert not needs_dw
    g = dy * w
    return dy.copy_(scale * (g - x * scale.square() * (g * x).mean(-1, keepdim=True))), None


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: int) -> None:
    for x in (q, k):
        a, b = x.chunk(2, -1)
        x.copy_(x * cos[:, None] + sign * torch.cat((-b, a), -1) * sin[:, None])


def rope_forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    used["rope"] += 1
    _turn(q, k, cos, sin, 1)
    return q, k, cos, sin


def rope_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    _turn(dq, dk, cos, sin, -1)
    return dq, dk


def fused_forward(*args: Any, **kwargs: Any) -> Any:
    used["fused_linear_cross_entropy"] += 1
    return own_fused_forward(*args, **kwargs)


own_fused_forward = fused_linear_cross_entropy.fused_linear_cross_entropy_forward
fused_linear_cross_entropy.fused_linear_cross_entropy_forward = fused_forward
swiglu.swiglu_forward, swiglu.swiglu_backward = swiglu_forward, swiglu_backward
rms_norm.rms_norm_forward, rms_norm.rms_norm_backward = rms_norm_forward, rms_norm_backward
rope.rope_forward, rope.rope_backward = rope_forward, rope_backward

if __name__ == "__main__":
    settings = dict.fromkeys(PARTS, True) | {"cross_entropy": False}
    changes = runs.LATE | json.loads(sys.argv[2])
    run = runs.trainer(Path(sys.argv[1]), runs.config(**changes), use_liger_kernel=True, liger_kernel_config=settings)
    run.train()
    masks = {name: mask.tolist() for name, mask in attachment_of(run.model).masks.items()}
    print(json.dumps({"losses": runs.losses(run), "masks": masks, "used": used}))
