"""Distillation: what is left learns from the model as it was before anything was pruned.

The teacher costs no second model (ATP's own weights with the masks lifted): what compensation has changed is put back
for its forward pass, and adapters are those that it had when pruning began, a copy of LoRA's size. Added to the loss:

    weight * mean over learned tokens of KL(p || q),    p, q: next-token distributions of teacher and student

(Hinton et al., arXiv 1503.02531, at temperature 1). It comes in by its gradient alone, at the logits: whoever computes
the loss (the model, the Trainer's label smoothing, TRL's fused head) knows nothing of it, and the loss that is logged
stays the task's. Teacher logits exist for `CHUNK` tokens at a time. Where no logits are made, as under TRL's fused
head, they are made here, from the last hidden states, a chunk at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import log_softmax
from torch.utils.hooks import RemovableHandle

from atp.data import IGNORED
from atp.errors import UnsupportedModelError
from atp.layers import Attachment
from atp.passes import evaluating
from atp.training.compensation import Compensation

CHUNK = 256
"""Tokens whose distributions are held at a time."""


class Distillation:
    """Teacher and loss of one run, from the first step that prunes on, until `remove`.

    Args:
        model: what the Trainer calls (a `PeftModel`).
        attachment: its masks, lifted for the teacher.
        compensation: undone for the teacher.
        weight: of the KL divergence, beside a task loss of weight 1.
        micro_batches: forward passes whose gradients one optimizer step adds up.
        ranks: processes over which the task loss's token count is summed (1 where each counts its own).

    Raises:
        UnsupportedModelError: where adapters are sharded over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        attachment: Attachment,
        compensation: Compensation,
        weight: float,
        micro_batches: int = 1,
        ranks: int = 1,
    ) -> None:
        self._attachment, self._compensation, self._weight = attachment, compensation, weight
        self._micro_batches, self._ranks = micro_batches, ranks
        self._adapters = {name: p for name, p in attachment.lm.named_parameters() if p.requires_grad}
        if sharded := next((n for n, p in self._adapters.items() if isinstance(p, DTensor) or not p.numel()), None):
            raise UnsupportedModelError(
                f"{sharded} is sharded over processes and cannot be exchanged: set distill to 0"
            )
        self._teacher: dict[str, Tensor] = {}
        self._lesson: _Lesson | None = None
        self._busy = False
        self._learned: Mapping[str, Any] = {}
        self._divergences: list[float] = []
        self._loss_scale = 1.0
        lm: Any = attachment.lm
        of_head = {id(p) for p in lm.get_output_embeddings().parameters()}
        self._of_head = {name: p for name, p in self._adapters.items() if id(p) in of_head}
        self._hooks: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._see_labels, with_kwargs=True),
            lm.base_model.register_forward_pre_hook(self._teach, with_kwargs=True),
            lm.base_model.register_forward_hook(self._at_hidden_states),
            lm.get_output_embeddings().register_forward_hook(self._at_logits),
        ]

    def begin_step(self, begins: bool, loss_scale: float = 1.0) -> None:
        """Before an optimizer step.

        Args:
            begins: whether pruning has begun: the first time, the model as it is becomes the teacher.
            loss_scale: what the loss will be multiplied by before backward (fp16).
        """
        self._loss_scale = loss_scale
        if begins and not self._teacher:
            self._teacher = {name: p.detach().clone() for name, p in self._adapters.items()}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, passes are nobody's lessons."""
        busy, self._busy = self._busy, True
        try:
            yield
        finally:
            self._busy = busy

    def remove(self) -> None:
        """Take every hook off."""
        for hook in self._hooks:
            hook.remove()

    def state(self) -> dict[str, Tensor]:
        """The teacher's adapters; nothing before pruning begins."""
        return dict(self._teacher)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        self._teacher = {name: tensors[name].to(p.device) for name, p in self._adapters.items()} if tensors else {}

    def metrics(self) -> dict[str, float]:
        """`teacher_kl`: mean divergence, nats a token, of the passes since the last call, if there were any."""
        seen, self._divergences = self._divergences, []
        return {"teacher_kl": sum(seen) / len(seen)} if seen else {}

    # -- hooks, in the order in which they run ----------------------------------------------------------------------

    @torch.compiler.disable
    def _see_labels(self, _model: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        self._learned = {k: kwargs.get(k) for k in ("labels", "attention_mask", "num_items_in_batch")}

    @torch.compiler.disable
    def _teach(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the student's pass: the teacher's, on the same inputs."""
        if self._busy or not self._teacher:
            return
        self._lesson = None
        if not (backbone.training and torch.is_grad_enabled()):
            return
        with torch.no_grad(), self._as_teacher(backbone):
            hidden = backbone(*args, **(kwargs | {"use_cache": False})).last_hidden_state
        labels = self._learned["labels"]
        learned = _learned_positions(hidden, labels, self._learned["attention_mask"])
        # of labels, which the Trainer keeps to itself where it smooths them or has a loss of its own
        items = None if labels is None else self._learned["num_items_in_batch"]
        count = learned.sum().clamp_min(1) * self._micro_batches if items is None else items / self._ranks or 1
        self._lesson = _Lesson(hidden, learned, self._weight * self._loss_scale / float(count))

    @torch.compiler.disable
    def _at_hidden_states(self, _backbone: nn.Module, _args: tuple, output: Any) -> Any:
        if self._busy or (lesson := self._lesson) is None:
            return output
        output.last_hidden_state = _Pulled.apply(
            output.last_hidden_state, lambda h: None if lesson.given else self._pull(lesson, h, self._logits)
        )
        return output

    @torch.compiler.disable
    def _at_logits(self, _head: nn.Module, _args: tuple, logits: Tensor) -> Tensor:
        lesson = self._lesson
        if self._busy or lesson is None or logits.shape[:-1] != lesson.hidden.shape[:-1]:
            return logits
        lesson.given = True
        return _Pulled.apply(logits, lambda z: self._pull(lesson, z, self._finished))

    # -- the steps behind them --------------------------------------------------------------------------------------

    @contextmanager
    def _as_teacher(self, backbone: nn.Module) -> Iterator[None]:
        with (
            evaluating(backbone),
            self.paused(),
            self._attachment.lifted(),
            self._compensation.undone(),
            self._exchanged(self._adapters),
        ):
            yield

    @contextmanager
    def _exchanged(self, adapters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Within it, `adapters` hold what the teacher's hold."""
        student = {name: p.data for name, p in adapters.items()}
        try:
            for name, p in adapters.items():
                p.data = self._teacher[name]
            yield
        finally:
            for name, p in adapters.items():
                p.data = student[name]

    def _pull(self, lesson: "_Lesson", x: Tensor, to_logits: Callable[[Tensor], Tensor]) -> Tensor:
        """The gradient of the distillation loss with respect to `x`, `(rows, tokens, features)`."""
        gradient, total = torch.zeros_like(x), 0.0
        rows, features = torch.nonzero(lesson.learned.flatten()).flatten(), x.shape[-1]
        flat, hidden = x.reshape(-1, features), lesson.hidden.flatten(0, -2)
        for chosen in rows.split(CHUNK):
            with self.paused(), torch.no_grad(), self._exchanged(self._of_head):
                p = log_softmax(self._logits(hidden[chosen]).float(), -1)
            with self.paused(), torch.enable_grad():
                own = flat[chosen].detach().requires_grad_()
                logits = to_logits(own)
            with self.paused(), torch.no_grad():
                q, likely = log_softmax(logits.float(), -1), p.exp()
                total += torch.dot(likely.flatten(), p.sub_(q).flatten()).item()
                slope = q.exp_().sub_(likely).mul_(lesson.scale).to(logits.dtype)
            gradient.view(-1, features)[chosen] = torch.autograd.grad(logits, own, slope)[0]
        self._divergences.append(total / max(len(rows), 1))
        return gradient

    def _logits(self, hidden: Tensor) -> Tensor:
        lm: Any = self._attachment.lm
        return self._finished(lm.get_output_embeddings()(hidden))

    def _finished(self, logits: Tensor) -> Tensor:
        """What the model makes of its head's output: Granite and Cohere scale it, Gemma 2 caps it."""
        config = self._attachment.lm.config
        if scale := getattr(config, "logit_scale", None):
            logits = logits * scale
        if scaling := getattr(config, "logits_scaling", None):
            logits = logits / scaling
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap


@dataclass(eq=False)
class _Lesson:
    """What the teacher says of one batch: last hidden states, `(rows, tokens, hidden)`, which of its tokens count,
    `(rows, tokens)`, and the factor of the sum over them; `given` once it has been tied to the student's logits.
    """

    hidden: Tensor
    learned: Tensor
    scale: float
    given: bool = False


class _Pulled(torch.autograd.Function):
    """The identity, whose backward adds `pull(x)` (None: nothing) to the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pull: Callable[[Tensor], Tensor | None]) -> Tensor:
        ctx.pull = pull
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        pulled = ctx.pull(ctx.saved_tensors[0])
        return gradient if pulled is None else gradient + pulled, None


def _learned_positions(hidden: Tensor, labels: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """Positions whose next token is learned, bool, `(rows, tokens)`; without labels, every token that is no padding."""
    if labels is None:
        if attention_mask is not None and attention_mask.dim() == 2:
            return attention_mask.bool()
        return torch.ones_like(hidden[..., 0], dtype=torch.bool)
    learned = torch.zeros_like(labels, dtype=torch.bool)
    learned[:, :-1] = labels[:, 1:] != IGNORED
    return learned
