"""Where the generator starts from: calibration rows, a criterion's scores on them, and logits in their order."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from atp.config import ATPConfig
from atp.criteria import scores
from atp.criteria.ranking import SUITABLE, rank, standardised, starting_logits, suitable_protect
from atp.data import learned_tokens
from atp.layers import Attachment
from atp.structure.budget import project
from atp.training.calibration import Calibration, hold_out, indexable, with_columns_of
from atp.training.trials import Lean, Trials

_MEASURED = ("activation", "flap", "surgeon", "taylor", "taylor2")
"""Criteria that look at calibration rows."""

_BY_FEATURE = ("magnitude", "activation", "flap")
"""Those that score features by themselves, so that these can be standardised before they are added up."""


def calibrate(config: ATPConfig, given: Any, loader: DataLoader, batch_size: int) -> Calibration | None:
    """The calibration rows of a run: those given, else rows held out of `loader`; None where none are needed."""
    if not config.alternates and config.init not in _MEASURED and config.compensate == "none":
        return None
    rows = with_columns_of(given, loader.dataset)
    if rows is None:
        held = hold_out(loader, config.calibration_rows, batch_size, config.seed)
        rows = [loader.dataset[i] for i in held]
    return Calibration(rows, loader.collate_fn, batch_size)


def for_refit(calibration: Calibration, rows: int, loader: DataLoader, seed: int) -> Calibration:
    """`calibration` and, up to `rows` in all, rows of the training set, where it can be indexed."""
    if not indexable(loader.dataset):
        return calibration
    return calibration.and_also(loader.dataset, _shuffled(loader, seed), rows)


def for_trials(calibration: Calibration, rows: int, loader: DataLoader, seed: int) -> list[Any]:
    """Up to `rows` rows of the training set that are not calibration rows; none where it cannot be indexed.

    Layers are refitted to calibration rows, and fit those better than others.
    """
    return calibration.others(loader.dataset, _shuffled(loader, seed), rows) if indexable(loader.dataset) else []


def _shuffled(loader: DataLoader, seed: int) -> list[int]:
    dataset: Any = loader.dataset
    return torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed + 1)).tolist()


def start(
    config: ATPConfig,
    attachment: Attachment,
    calibration: Calibration | None,
    loss: Callable[[Mapping[str, Any]], Tensor],
    quiet: bool,
    grams: dict[str, Tensor] | None = None,
    trials: Trials | None = None,
) -> dict[str, Tensor] | None:
    """Starting logits per group set, `(size,)`, or None for all ones.

    Args:
        loss: the model's loss on one batch, under the masks as they are.
        quiet: no progress bar.
        grams: takes the Gram matrices of inputs that a criterion has measured, by path.
        trials: of other shares of the budget; None: none are made.
    """
    if config.init == "ones":
        return None
    space = attachment.space
    how = config.init_ranking or SUITABLE.get(config.init, "block")
    protect = suitable_protect(config.init, len(space.structure.blocks)) if config.protect is None else config.protect
    standard, by_feature = how == "standard", config.init in _BY_FEATURE
    scored = _scores(config, attachment, calibration, loss, quiet, grams, standard and by_feature)
    if standard:
        scored = standardised(scored, space, by_group=not by_feature)

    def ranked(lean: Lean) -> dict[str, Tensor]:
        floor = lean.floor * (1.0 - config.sparsity)
        return rank(scored, space, how, protect, lean.tilt, floor, lean.attention)

    def decision(lean: Lean) -> dict[str, Tensor]:
        return project(ranked(lean), space, config.sparsity)

    lean = Lean(config.init_tilt, config.init_attention, config.init_floor)
    if how == "global" and trials is not None:
        pruned = space.sparsity(attachment.decision()) > 0
        lean = trials.chosen or (lean if pruned else trials.best(lean, decision))
    return starting_logits(ranked(lean), decision(lean), config.init_scale)


def _scores(
    config: ATPConfig,
    attachment: Attachment,
    calibration: Calibration | None,
    loss: Callable[[Mapping[str, Any]], Tensor],
    quiet: bool,
    grams: dict[str, Tensor] | None,
    standard: bool,
) -> dict[str, Tensor]:
    space = attachment.space
    if config.init == "random":
        return scores.random(space, config.seed)
    if config.init == "magnitude":
        return scores.magnitude(space, attachment.modules, standard)
    batches = tqdm(calibration, desc=f"atp: {config.init} scores", leave=False, disable=quiet)
    if config.init in ("taylor", "taylor2"):
        return scores.taylor(space, attachment.masks, loss, batches, order=2 if config.init == "taylor2" else 1)
    if config.init == "surgeon":

        def added_up(batch: Mapping[str, Any]) -> Tensor:
            return loss(batch) * learned_tokens(batch)

        return scores.surgeon(space, attachment.modules, attachment.masks, added_up, batches, grams)
    by_inputs = {"activation": scores.activation, "flap": scores.flap}[config.init]
    return by_inputs(space, attachment.modules, loss, batches, standard)
