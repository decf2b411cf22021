"""Schedules: pure functions of the optimizer step."""

from dataclasses import dataclass

from atp.config import ATPConfig


@dataclass(frozen=True)
class Schedule:
    """What each step uses. Steps count optimizer steps from 0; the decision is final from `freeze_step` on."""

    total_steps: int
    freeze_step: int
    config: ATPConfig

    @classmethod
    def of(cls, config: ATPConfig, total_steps: int) -> "Schedule":
        """The schedule of a run of `total_steps` optimizer steps."""
        return cls(total_steps, round(config.freeze_at * total_steps), config)

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
        ramp = self.config.budget_ramp * self.freeze_step
        if self.config.init != "ones" or step >= ramp:
            return self.config.sparsity
        return self.config.sparsity * (step + 1) / (ramp + 1)

    def lasso(self, step: int) -> float:
        """beta_t of the group lasso: grows linearly over training."""
        return self.config.lasso * step / max(self.total_steps, 1)

    def _shots_due(self, step: int) -> int:
        """How many of a criterion's decisions have been drawn by `step`, this one included."""
        last = self.config.shots - 1
        if step >= self.freeze_step or last == 0:
            return self.config.shots if step >= self.freeze_step else 0
        return 1 + step * last // self.freeze_step

    def _until_freeze(self, step: int) -> float:
        return min(step / max(self.freeze_step, 1), 1.0)


def _between(start: float, end: float, share: float) -> float:
    return start + (end - start) * share
