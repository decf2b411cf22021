"""The learner: samples decisions, takes the loss's gradient with respect to the masks, and steps the generator.

It knows a space, an attachment and a schedule, and no Trainer. Both modes share one update (ATP, arXiv 2412.14426):
with g = dLoss/dmask gathered at the masks, the generator follows sum(s * g) + lambda * R, whose gradient is that of the
straight-through estimator. `joint` gathers g in the LoRA step's own backward under hard masks; `alternating` in a pass
of its own under soft masks. With `decision="criterion"` nothing is learned: all is kept until the freeze, where the
formula decides.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from atp.config import ATPConfig
from atp.errors import DivergedError, UnsupportedModelError
from atp.generator.network import DecisionGenerator, FreeLogits
from atp.generator.sampling import add_noise, soften, straight_through, threshold
from atp.layers import Attachment
from atp.ops.implementation import uses_triton
from atp.passes import slopes, without_dropout
from atp.processes import averaged, from_first
from atp.structure.budget import budget_note, project
from atp.structure.space import Space
from atp.training.compensation import Compensation
from atp.training.losses import budget_loss
from atp.training.proximal import proximal_step, pruned_share
from atp.training.schedule import Schedule
from atp.training.state import under
from atp.transfers import together

Masks = dict[str, Tensor]

COMPENSATED = "compensated."
"""Prefix of changed base weights in saved state."""

GONE = 1e4
"""Taken off the logits of groups that an earlier shot removed: they never come back."""


class DecisionLearner:
    """Owns the generator, its optimizer and random stream, and writes the masks.

    Args:
        attachment: the live model's masks.
        schedule: what each step uses.
        draw: gives logits of `config.init` for the model as it is, `(size,)` per group set, or None for all ones
            (`config.logit_bias`).
        compensation: applied when the decision becomes final.

    Raises:
        UnsupportedModelError: where `impl="compact"` or `"triton"` is asked of a model that it does not cover, or of a
            machine without kernels.
    """

    def __init__(
        self,
        config: ATPConfig,
        attachment: Attachment,
        schedule: Schedule,
        draw: Callable[[], Masks | None],
        compensation: Compensation,
    ) -> None:
        self.config, self.attachment, self.schedule = config, attachment, schedule
        self.space = attachment.space
        if config.impl == "compact" and (path := attachment.not_plain()):
            raise UnsupportedModelError(
                f"impl='compact' needs frozen linear layers, or plain LoRA on them, not quantised nor ZeRO-3's, but "
                f"{path} is none: use impl='auto'"
            )
        if config.impl != "eager":
            attachment.fuse_adapters()
        if config.impl == "triton":
            _use_kernels(attachment)
        self.generator = _emitter(config, self.space)  # small, and wanted where decisions are put on the budget
        self._draw, self._compensation = draw, compensation
        trained = [p for p in self.generator.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.generator_lr, weight_decay=0.0)
        self._asks_at: int | None = None
        self._random = torch.Generator().manual_seed(config.seed)
        self._noisy: Masks | None = None
        self._decision: Masks = attachment.decision()
        self._first: Masks = {}
        self._started = False
        self.step = 0
        self.frozen_at: int | None = None
        self._reached = 0.0
        self.metrics: dict[str, float] = {}

    def start(self) -> None:
        """What comes before the first step; not called when a run is resumed."""
        if self.config.decision == "criterion" or self.schedule.start_step == 0:
            self._require_start()
            self.show_decision()

    @property
    def frozen(self) -> bool:
        """Whether the decision is final."""
        return self.frozen_at is not None

    def begin_step(self, step: int) -> None:
        """Put this optimizer step's hard masks in place; in `joint` mode backward will gather their gradients."""
        self.step = step
        if self.frozen:
            self.metrics["churn"] = 0.0
            if step == self._asks_at:
                self._compute_only_kept(final=True)
            return
        if step >= self.schedule.freeze_step:
            self.freeze()
            return
        if self.config.decision == "criterion":
            self._take_shot()
            self._compensation.forget()
        if not self.schedule.learns(step):
            self._record()
            return
        self._require_start()
        joint = self.config.mode == "joint" and step % self.config.generator_every == 0
        with torch.set_grad_enabled(joint):
            self._noisy = self._sample()
        self.attachment.set_masks(from_first(self._harden(self._noisy)))
        self.attachment.require_gradients(joint)
        if not joint:
            self._compute_only_kept(final=False)
        self._record()

    def alternate(self, step: int, loss: Callable[[], Tensor]) -> None:
        """The paper's generator step: `loss()` under soft masks, then one update. Call before `begin_step`.

        Args:
            loss: this process's part: its mean over processes counts.
        """
        self.step = step
        self._require_start()
        self._noisy = self._sample()
        self.attachment.require_gradients(True)
        self.attachment.set_masks({k: v.detach() for k, v in soften(self._noisy, self._temperature).items()})
        leaves = list(self.attachment.masks.values())
        with without_dropout(self.attachment.lm):
            value = loss()
            gradients = slopes(value, leaves)
        self.attachment.require_gradients(False)
        self.metrics["generator_loss"] = averaged({"loss": value.detach()[None]})["loss"].item()
        self._update(dict(zip(self.attachment.masks, gradients, strict=True)))

    def update_from_step(self, loss_scale: float = 1.0) -> None:
        """The joint generator step: call after backward, before the LoRA optimizer's step.

        Args:
            loss_scale: what a gradient scaler (fp16) multiplied the loss by.
        """
        if self.frozen or self.config.mode != "joint" or self._noisy is None:
            return
        if not any(z.requires_grad for z in self._noisy.values()):
            return
        gradients = {k: leaf.grad for k, leaf in self.attachment.masks.items() if leaf.grad is not None}
        self._update({k: gradient / loss_scale for k, gradient in gradients.items()}, loss_scale)
        self.attachment.require_gradients(False)

    def proximal_step(self, learning_rate: float) -> None:
        """Shrink LoRA weights of pruned groups: call after the LoRA optimizer's step, with the rate that it used."""
        beta = self.schedule.lasso(self.step)
        if self.frozen or beta == 0:
            return
        masks = {name: leaf.detach() for name, leaf in self.attachment.masks.items()}
        rho = pruned_share(self.space, self._decision)
        proximal_step(self.space, self.attachment.modules, masks, rho, learning_rate, beta)

    def freeze(self) -> None:
        """Make the noise-free decision on budget final; a criterion decides by the weights as they are now."""
        self.attachment.require_gradients(False)
        if self.config.decision == "criterion":
            self._take_shot(final=True)
        else:
            self._require_start()
            self.attachment.set_masks(from_first(self.decision(final=True)))
            self._compensation.apply(self.attachment.decision(), self.space.full())
        self.frozen_at = self.step
        self._noisy = None
        self._compute_only_kept(final=True)
        self._record()

    @torch.no_grad()
    def decision(self, final: bool = False) -> Masks:
        """The noise-free decision on this step's budget (or on the final one)."""
        if self.frozen or not (final or self.schedule.learns(self.step)):
            return self.attachment.decision()
        sparsity = self.config.sparsity if final else self.schedule.sparsity(self.step)
        return project(self.generator(), self.space, sparsity)

    def show_decision(self) -> None:
        """Put the noise-free decision in place, for evaluation."""
        if not self.frozen:
            self.attachment.set_masks(from_first(self.decision()))

    @torch.no_grad()
    def entropy(self) -> float | None:
        """Mean entropy of the groups' keep probabilities sigmoid(z / tau), in bits; None where none are learned now."""
        if self.frozen or not self._started or not self.schedule.learns(self.step):
            return None
        soft = torch.cat(list(soften(self.generator(), self._temperature).values())).double()
        return (torch.special.entr(soft) + torch.special.entr(1.0 - soft)).mean().item() / math.log(2.0)

    def overlap(self) -> dict[str, float] | None:
        """Share of the groups that `init` pruned when it was first asked which the decision prunes too, per kind."""
        if not self._first:
            return None
        decision = self.decision(final=True)
        shares = {}
        for kind in self.space.kinds:
            first = torch.cat([self._first[s.name] == 0 for s in self.space.sets if s.kind == kind])
            now = torch.cat([decision[s.name] == 0 for s in self.space.sets if s.kind == kind])
            shares[kind] = (first & now).sum().item() / first.sum().item() if first.any() else 1.0
        return shares

    def note(self) -> str | None:
        """One line where the asked sparsity is not reachable exactly."""
        return budget_note(self.space, self.decision(final=True), self.config.sparsity)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a bit-exact resume needs: tensors, and plain values."""
        tensors = {f"generator.{k}": v for k, v in self.generator.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in moments.items()}
        tensors |= {f"decision.{k}": v for k, v in self._decision.items()}
        tensors |= {f"first.{k}": v for k, v in self._first.items()}
        tensors |= {f"{COMPENSATED}{k}": v for k, v in self._compensation.state().items()}
        tensors["random"] = self._random.get_state()
        values = {"step": self.step, "started": self._started, "frozen_at": self.frozen_at, "reached": self._reached}
        return tensors, values

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Continue from what `state` gave."""
        self.generator.load_state_dict(under(tensors, "generator."))
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in under(tensors, "optimizer.").items():
            index, name = key.split(".", 1)
            moments.setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self._random.set_state(tensors["random"])
        self._decision = under(tensors, "decision.")
        self._first = under(tensors, "first.")
        self._compensation.load_state(under(tensors, COMPENSATED))
        self.step, self._started = values["step"], values["started"]
        self.frozen_at, self._reached = values["frozen_at"], values["reached"]
        self._noisy = None
        self.attachment.require_gradients(False)
        self.attachment.set_masks(self._decision)
        if self.frozen:
            self._compute_only_kept(final=True)
            self._asks_at = self.step + 2  # when a step has shown how much room there is for copies

    def _require_start(self) -> None:
        """Draw the decision of `config.init`, once, and make up for what it takes."""
        if self._started:
            return
        self._started = True
        self._set_start()
        if self.config.init == "ones":
            return
        self._first = project(self.generator(), self.space, self.config.sparsity)
        if self.schedule.learns(self.step):
            self._compensation.apply(self._first, self.space.full(), final=False)

    def _compute_only_kept(self, final: bool) -> None:
        """Nobody asks what removed groups would have been worth: they need not be computed.

        They are where that is faster: a GPU's matrix products want widths that are multiples of 8, or 16, which
        decisions that are not put on the budget know nothing of.
        """
        any_widths = self._on_gpu and not final and not self.config.on_budget and self.config.impl != "compact"
        if self.config.impl != "eager" and not any_widths:
            self.attachment.compact(final)

    def _take_shot(self, final: bool = False) -> None:
        """Where a criterion's next decision is due: draw it among what is left, and compensate for what goes."""
        sparsity = self.config.sparsity if final else self.schedule.sparsity(self.step)
        if sparsity <= self._reached:
            return
        left = self.attachment.decision()
        if self.step > 0:
            self._set_start()
        logits = {k: torch.where(left[k] > 0, z, z - GONE) for k, z in self.generator().items()}
        decision = project(logits, self.space, sparsity)
        self._compensation.apply(decision, left, final)
        self.attachment.set_masks(decision)
        self._reached = sparsity

    def _set_start(self) -> None:
        kept = {s.name: torch.full((s.size,), self.config.logit_bias) for s in self.space.sets}
        with self.attachment.plainly(), without_dropout(self.attachment.lm):
            drawn = self._draw()
        self.generator.set_start(from_first(drawn or kept))

    @property
    def _on_gpu(self) -> bool:
        return self.attachment.device.type == "cuda"

    @property
    def _temperature(self) -> float:
        return self.schedule.temperature(self.step)

    def _sample(self) -> Masks:
        return add_noise(self.generator(), self.schedule.noise(self.step), self._random)

    def _harden(self, noisy: Masks) -> Masks:
        if self.config.on_budget:
            return project(noisy, self.space, self.schedule.sparsity(self.step))
        return threshold(noisy)

    def _update(self, gradients: Mapping[str, Tensor | None], loss_scale: float = 1.0) -> None:
        assert self._noisy is not None
        soft = soften(self._noisy, self._temperature)
        present = averaged({k: g for k, g in gradients.items() if g is not None})
        present = dict(zip(present, together(list(present.values()), torch.device("cpu")), strict=True))
        task = torch.stack([(soft[k] * g).sum() for k, g in present.items()]).sum()
        if not task.isfinite():  # the same on all processes
            self._noisy = None
            if loss_scale == 1.0:
                raise DivergedError(
                    f"the loss's gradient in the masks is NaN or infinite at step {self.step}: the decision stays as "
                    "it was; lower the learning rate or check the data, then resume from the last checkpoint"
                )
            return  # too large a scale, which its owner will lower
        masks = straight_through(threshold(self._noisy), soft)
        budget = budget_loss(masks, self.space, self.schedule.sparsity(self.step))
        self.optimizer.zero_grad(set_to_none=True)
        (task + self.config.budget_weight * budget).backward()
        self.optimizer.step()
        self.metrics["budget_loss"] = budget.item()
        self._noisy = None

    def _record(self) -> None:
        """Note the decision in force, and how far it has moved."""
        decision = self.attachment.decision()
        changed = sum((decision[k] != self._decision[k]).sum().item() for k in decision)
        self.metrics |= {
            "sparsity": self.space.sparsity(decision),
            "churn": changed / sum(s.size for s in self.space.sets),
            "temperature": self._temperature,
            "frozen": float(self.frozen),
            **{f"kept_{kind}": share for kind, share in self.space.kept_share(decision).items()},
        }
        self._decision = decision


def _use_kernels(attachment: Attachment) -> None:
    try:
        uses_triton(next(iter(attachment.masks.values())), "triton")
    except ValueError as error:
        raise UnsupportedModelError(f"{error}: use impl='auto'") from None
    if not attachment.fuse_blocks("triton"):
        raise UnsupportedModelError(
            f"impl='triton' has kernels for blocks like Llama's, and {type(attachment.lm).__name__} has none: "
            "use impl='auto'"
        )


def _emitter(config: ATPConfig, space: Space) -> DecisionGenerator | FreeLogits:
    """What emits the logits."""
    if config.decision != "generator":
        return FreeLogits(space)
    return DecisionGenerator(
        space, config.generator_hidden_size, config.generator_layers, config.generator_heads, config.seed
    )
