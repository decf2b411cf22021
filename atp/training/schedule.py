"""Schedules: pure functions of the optimizer step."""

from dataclasses import dataclass

from atp.config import ATPConfig


@dataclass(frozen=True)
class Schedule:
    """What each step uses. Steps count optimizer steps from 0; a decision is learned from `start_step` on, before which
    nothing is pruned, and final from `freeze_step` on.
    """

    total_steps: int
    start_step: int
    freeze_step: int
    config: ATPConfig

    @classmethod
    def of(cls, config: ATPConfig, total_steps: int) -> "Schedule":
        """The schedule of a run of `total_steps` optimizer steps."""
        start_at = config.freeze_at / 2 if config.start_at is None else config.start_at
        return cls(total_steps, round(start_at * total_steps), round(config.freeze_at * total_steps), config)

    def learns(self, step: int) -> bool:
        """Whether a decision is learned at this step."""
        return self.config.decision != "criterion" and self.start_step <= step < self.freeze_step

    def temperature(self, step: int) -> float:
        """tau."""
        return _between(self.config.temperature, self.config.temperature_end, self._until_freeze(step))

    def noise(self, step: int) -> float:
        """Scale of the Gumbel noise."""
        return _between(self.config.noise, self.config.noise_end, self._until_freeze(step))

    def sparsity(self, step: int) -> float:
        """The sparsity asked at this step; it grows from nothing in `shots`, or when starting from all ones."""
        if self.config.decision == "criterion":
            return self.config.sparsity * self._shots_due(step) / self.config.shots
        learned, ramp = step - self.start_step, self.config.budget_ramp * (self.freeze_step - self.start_step)
        if self.config.init != "ones" or learned >= ramp:
            return self.config.sparsity
        return self.config.sparsity * (learned + 1) / (ramp + 1)

    def lasso(self, step: int) -> float:
        """beta_t of the group lasso: grows linearly over training."""
        return self.config.lasso * step / max(self.total_steps, 1)

    def _shots_due(self, step: int) -> int:
        """How many of a criterion's decisions have been drawn by `step`, this one included."""
        if step >= self.freeze_step:
            return self.config.shots
        last = self.config.shots - 1
        return 1 + step * last // self.freeze_step if last else 0

    def _until_freeze(self, step: int) -> float:
        learned, steps = step - self.start_step, self.freeze_step - self.start_step
        return min(max(learned, 0) / max(steps, 1), 1.0)


def _between(start: float, end: float, share: float) -> float:
    return start + (end - start) * share
