"""Optimizer steps of a run: plain LoRA, under masks that are being learned, and under the final decision.

Every case is a model of its own on the same base weights, and takes the steps that `ATPCallback` makes the Trainer
take: generator, LoRA, proximal step. Between generator steps (`generator_every`; every LoRA step of
`mode="alternating"`) a decision is drawn, but nobody asks for its gradient. Not covered: the Trainer's own bookkeeping
and gradient clipping; distillation; passes over calibration data; scoring and refitting, which a run does once.
"""

import warnings
from collections.abc import Mapping
from functools import partial

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from atp.bench.copies import attached, on_the_same_tensors
from atp.bench.timing import Case
from atp.config import ATPConfig
from atp.evaluation import flops_per_token
from atp.structure.budget import project
from atp.structure.space import Space
from atp.training.compensation import Compensation
from atp.training.learner import DecisionLearner
from atp.training.schedule import Schedule
from atp.training.start import start

_STEPS = 1_000_000
"""Of a run that is timed far from its end."""

_LEARNING_RATE = 1e-4


class OptimizerStep:
    """Forward, backward and AdamW on one random batch; with a learner, all that pruning adds to it.

    Args:
        batch: what the model is called with, labels among it.

    Attributes:
        learner: as given.
        index: which step of its run comes next.
    """

    def __init__(
        self, model: PeftModel, batch: Mapping[str, Tensor], autocast: bool, learner: DecisionLearner | None = None
    ) -> None:
        self._model, self._batch, self._autocast, self.learner = model, batch, autocast, learner
        trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=_LEARNING_RATE, weight_decay=0.0)
        self.index = 0

    def __call__(self) -> None:
        """Take the step."""
        learner = self.learner
        if learner is not None:
            learner.begin_step(self.index)
        with torch.autocast(self._model.device.type, torch.bfloat16, enabled=self._autocast):
            loss = self._model(**self._batch).loss
        loss.backward()
        if learner is not None:
            learner.update_from_step()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if learner is not None:
            learner.proximal_step(_LEARNING_RATE)
        self.index += 1


def train_step_cases(
    base: PreTrainedModel, config: ATPConfig, lora_rank: int, rows: int, length: int, checkpointing: bool = False
) -> list[Case]:
    """Steps of `rows` times `length` tokens; in bfloat16 autocast where `base` is in that format.

    Args:
        config: `space`, `sparsity` and the generator's settings count; decisions start at random and are learned in
            the LoRA step itself (`mode="joint"`).
        checkpointing: gradient checkpointing, in all cases alike.
    """
    batch = _random_batch(base, rows, length)

    def pruned(**settings: object) -> OptimizerStep:
        return _pruned_step(base, config, lora_rank, batch, checkpointing, settings)

    learning = pruned(freeze_at=1.0)
    assert learning.learner is not None
    left = flops_left(base, learning.learner.space, config.sparsity)
    return [
        Case("dense LoRA", OptimizerStep(adapted(base, lora_rank, checkpointing), batch, _in_autocast(base))),
        Case("before the freeze", learning, 1.0),
        Case("between generator steps", pruned(freeze_at=1.0, generator_every=_STEPS), left),
        Case("after the freeze, eager", pruned(freeze_at=0.0, impl="eager"), 1.0),
        Case("after the freeze", pruned(freeze_at=0.0), left),
    ]


def learning_step(
    base: PreTrainedModel, config: ATPConfig, lora_rank: int, rows: int, length: int, checkpointing: bool = False
) -> OptimizerStep:
    """The step before the freeze, by itself; arguments as of `train_step_cases`."""
    batch = _random_batch(base, rows, length)
    return _pruned_step(base, config, lora_rank, batch, checkpointing, {"freeze_at": 1.0})


def _pruned_step(
    base: PreTrainedModel,
    config: ATPConfig,
    lora_rank: int,
    batch: Mapping[str, Tensor],
    checkpointing: bool,
    settings: dict[str, object],
) -> OptimizerStep:
    model = adapted(base, lora_rank, checkpointing)
    return OptimizerStep(model, batch, _in_autocast(base), _learner(model, config, settings))


def _random_batch(base: PreTrainedModel, rows: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(base.config.get_text_config().vocab_size, (rows, length)).to(base.device)
    return {"input_ids": ids, "labels": ids}


def _in_autocast(base: PreTrainedModel) -> bool:
    return base.dtype == torch.bfloat16


def adapted(base: PreTrainedModel, lora_rank: int, checkpointing: bool = False) -> PeftModel:
    """LoRA of its own on the tensors of `base`, in training mode."""
    model = on_the_same_tensors(base)
    lora = LoraConfig(task_type="CAUSAL_LM", r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear")
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of names that are the only ones in 5.17
        if checkpointing:
            model.config.use_cache = False
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return get_peft_model(model, lora).train()


def flops_left(base: PreTrainedModel, space: Space, sparsity: float) -> float:
    """The share of the linear layers' FLOPs, head included, that is left when the final decision stands."""
    reached = space.sparsity(project({s.name: torch.rand(s.size) for s in space.sets}, space, sparsity))
    return 1.0 - 2 * reached * space.prunable_parameters / flops_per_token(base)


def _learner(model: PeftModel, config: ATPConfig, settings: dict[str, object]) -> DecisionLearner:
    values = {"mode": "joint", "generator_every": 1, "init": "random", "compensate": "none", "start_at": 0.0}
    config = ATPConfig.from_dict(config.to_dict() | values | settings)
    attachment = attached(model, config)
    compensation = Compensation("none", attachment, model, ())
    draw = partial(start, config, attachment, None, model, quiet=True)
    return DecisionLearner(config, attachment, Schedule.of(config, _STEPS), draw, compensation)
