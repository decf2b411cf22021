"""What a run is watched by: figures beyond those that a step makes anyway, the journal, and alerts.

It knows no Trainer: `ATPCallback` calls it at the Trainer's events. Figures are worked out where they are logged, not
at every step.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from atp.structure.live import base_layer, is_adapters
from atp.structure.sharding import is_sharded, shape_of
from atp.training.alerts import Alert, Plan, Seen, alerts
from atp.training.held_out import HeldOut
from atp.training.journal import Journal
from atp.training.learner import DecisionLearner
from atp.training.proximal import group_norms

logger = logging.getLogger(__name__)


class Monitor:
    """Watches one run.

    Args:
        folder: where the journal goes.
        writes: whether this process writes it, and warns.
        prefix: of our figures in the Trainer's log.
    """

    def __init__(self, learner: DecisionLearner, folder: Path, writes: bool, prefix: str) -> None:
        self._learner, self._writes, self._prefix = learner, writes, prefix
        self._journal = Journal(folder, writes)
        self._parameters, self._on_stream = _base_parameters(learner)
        lm: Any = learner.attachment.lm
        self._head = shape_of(lm.get_output_embeddings().weight).numel()
        self._plan = _plan(learner)
        self._seen: list[Seen] = []
        self._said: set[str] = set()
        self._figures: dict[str, float] = {}
        self._figures_at: tuple[int, bool] | None = None
        self._held_out_at: tuple[int, bool] | None = None
        self._fresh: dict[str, float] = {}
        self.held_out: HeldOut | None = None

    def begin(self, step: int) -> None:
        """Before the first step of a run, or of the rest of one."""
        for entry in self._journal.begin(step):
            if "alert" in entry:
                self._said.add(entry["alert"]["name"])
            if "log" in entry:
                self._seen.append(self._as_seen(entry["step"], entry["log"]))
        if step == 0:
            plan, learner = self._plan, self._learner
            self._journal.write(
                0,
                "run",
                {
                    "sizes": plan.sizes,
                    "blocks": plan.blocks,
                    "total_steps": learner.schedule.total_steps,
                    "start_step": plan.start_step,
                    "freeze_step": plan.freeze_step,
                    "sparsity": plan.sparsity,
                    "space": learner.space.name,
                    "parameters": self._parameters,
                    "prunable_parameters": learner.space.prunable_parameters,
                },
            )

    def figures(self) -> dict[str, float]:
        """All that is known of the last step, and of held-out rows since the last log, without a prefix."""
        learner = self._learner
        now = (learner.step, learner.frozen)
        if self._figures_at != now:
            self._figures, self._figures_at = self._worked_out(), now
        return learner.metrics | self._figures | self._fresh

    @torch.no_grad()
    def _worked_out(self) -> dict[str, float]:
        learner, space = self._learner, self._learner.space
        decision = learner.attachment.decision()
        kept, whole = space.kept_parameters(space.kept_counts(decision)).item(), space.prunable_parameters
        stream = 1.0 if space.stream is None else decision[space.stream.set].float().mean().item()
        found = {
            "budget": 0.0 if learner.step < self._plan.start_step else learner.schedule.sparsity(learner.step),
            "parameters": float(self._parameters - whole + kept - round((1.0 - stream) * self._on_stream)),
            "flops_share": (kept + stream * self._head) / (whole + self._head),
        }
        if (entropy := learner.entropy()) is not None:
            found["entropy"] = entropy
        modules = learner.attachment.modules
        if not any(is_sharded(p) for module in modules.values() for p in module.parameters()):
            for kind, norms in group_norms(space, modules, decision).items():
                found |= {f"lora_norm_{kind}_{which}": value for which, value in norms.items()}
        return found

    def measure_held_out(self, step: int, dense: bool, pruned: bool) -> None:
        """Log-perplexity of the held-out rows after so many steps; nothing where there are none."""
        if self.held_out is None or not self.held_out.rows:
            return
        found = {
            "dense": self.held_out.dense() if dense else None,
            "pruned": self.held_out.pruned() if pruned else None,
        }
        self._held_out_at = (step, self._learner.frozen)
        self._fresh |= {f"held_out_{name}": value for name, value in found.items() if value is not None}
        self._journal.write(step, "held_out", found | {"rows": self.held_out.rows})

    def log(self, step: int, logs: Mapping[str, Any]) -> list[Alert]:
        """Note what the Trainer has logged.

        Returns:
            What is alarming about it and has not been said before, to the process that writes; it has been said now.
        """
        learner = self._learner
        self._journal.write(step, "log", logs)
        decided = "loss" in logs and (learner.frozen or step > self._plan.start_step)
        kept = self._kept() if decided else {}
        self._fresh = {} if "loss" in logs else self._fresh
        if kept:
            self._journal.write(step, "kept", kept)
        if not self._writes:
            return []
        self._seen.append(self._as_seen(step, logs, kept))
        new = [alert for alert in alerts(self._plan, self._seen) if alert.name not in self._said]
        for alert in new:
            self._said.add(alert.name)
            self._journal.write(step, "alert", {"name": alert.name, "message": alert.message, "value": alert.value})
            logger.warning("atp: %s", alert.message)
        return new

    def _as_seen(self, step: int, logs: Mapping[str, Any], kept: Mapping[str, Sequence[int]] | None = None) -> Seen:
        figures = {name.removeprefix(self._prefix): v for name, v in logs.items() if isinstance(v, int | float)}
        return Seen(step, figures, kept or {})

    def end(self, step: int) -> None:
        """After the last step, under the final decision."""
        if self._held_out_at != (step, True):
            self.measure_held_out(step, dense=False, pruned=True)
        self._journal.write(step, "kept", self._kept())

    def kept_by_block(self) -> dict[str, list[float]]:
        """Share that every set keeps, by kind."""
        kept = self._kept()
        return {
            kind: [k / n for k, n in zip(kept[kind], sizes, strict=True)] for kind, sizes in self._plan.sizes.items()
        }

    def _kept(self) -> dict[str, list[int]]:
        learner = self._learner
        effect = learner.space.in_effect(learner.attachment.decision())
        kept: dict[str, list[int]] = {kind: [] for kind in self._plan.sizes}
        for group_set in learner.space.sets:
            kept[group_set.kind].append(int(effect[group_set.name].sum()))
        return kept


def _plan(learner: DecisionLearner) -> Plan:
    space, config = learner.space, learner.config
    members = {kind: [s for s in space.sets if s.kind == kind] for kind in space.kinds}
    return Plan(
        start_step=learner.schedule.start_step,
        freeze_step=learner.schedule.freeze_step,
        sparsity=config.sparsity,
        sizes={kind: [s.size for s in sets] for kind, sets in members.items()},
        blocks={kind: [s.block for s in sets] for kind, sets in members.items()},
        learned=config.decision != "criterion",
        uniform=config.uniform,
        on_budget=config.on_budget,
    )


def _base_parameters(learner: DecisionLearner) -> tuple[int, int]:
    """Of the model without adapters, and how many of them `hidden` makes fewer uncounted: embedding, head and norms.

    Quantised weights do not tell how many they are, the space does.
    """
    stream = learner.space.structure.stream
    paths = (stream.embedding, stream.head, stream.last_norm, *stream.norms_before, *stream.norms_writing)
    counted = {id(base_layer(module).weight) for module in learner.attachment.modules.values()}
    named = learner.attachment.lm.named_parameters()
    rest = {name: shape_of(p).numel() for name, p in named if id(p) not in counted and not is_adapters(name)}
    on_stream = sum(size for name, size in rest.items() if name.startswith(tuple(f"{path}." for path in paths)))
    return learner.space.prunable_parameters + sum(rest.values()), on_stream
