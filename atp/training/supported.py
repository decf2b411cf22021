"""What the Trainer and its engine may be set to: under the rest a decision could not be learned, kept or saved."""

from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerState, TrainingArguments

from atp.config import ATPConfig
from atp.errors import UnsupportedModelError
from atp.structure.space import HIDDEN

_WRAPPED = "._checkpoint_wrapped_module"
"""Inside blocks that FSDP's own activation checkpointing has wrapped."""


def require_supported(args: TrainingArguments, state: TrainerState, model: nn.Module, config: ATPConfig) -> None:
    """To be called before training, when the engine has the model.

    Raises:
        UnsupportedModelError: naming the setting, and what to set instead.
    """
    _require_rows_of_its_own()
    _require_dense_reference(args)
    _require_one_gpu_each(args, model)
    require_what_can_be_followed(args, state, model, config)
    require_shards_that_come_and_go(model)


def _require_rows_of_its_own() -> None:
    """Rows are dealt out to processes."""
    parallel = getattr(AcceleratorState(), "parallelism_config", None)
    if parallel is not None and parallel.non_data_parallel_size > 1:
        raise UnsupportedModelError(
            "tensor, context and sequence parallelism are not supported, by which several processes share the pass of "
            "one row: shard the model with configs/accelerate/fsdp2.yaml or zero3.yaml instead"
        )


def _require_dense_reference(args: TrainingArguments) -> None:
    """TRL's DPO and KTO compare with the model before training: computed at each step, it would be under the masks."""
    if getattr(args, "precompute_ref_log_probs", True) is False:
        raise UnsupportedModelError(
            f"{type(args).__name__}: the reference model would be pruned too: set precompute_ref_log_probs=True, so "
            "that its log-probabilities are computed before pruning begins"
        )


def _require_one_gpu_each(args: TrainingArguments, model: nn.Module) -> None:
    """The Trainer drives several by `nn.DataParallel`, but for quantised models; copies share what the first has."""
    whole = not any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    if args.n_gpu > 1 and whole:
        raise UnsupportedModelError(
            f"one process sees {args.n_gpu} GPUs: start the script with accelerate launch, which gives each its own, "
            "or set CUDA_VISIBLE_DEVICES=0"
        )


def require_what_can_be_followed(
    args: TrainingArguments, state: TrainerState, model: nn.Module, config: ATPConfig
) -> None:
    """Settings of the Trainer under which gradients, checkpoints or the stream are not where they are looked for."""
    if state.is_hyper_param_search:
        raise UnsupportedModelError(
            "hyperparameter_search keeps checkpoints where callbacks are not told of: use atp compare, or a Trainer of "
            "its own for each trial"
        )
    if getattr(args, "enable_jit_checkpoint", False):
        raise UnsupportedModelError(
            "enable_jit_checkpoint saves within a step, without the pruning state: set it to False and save by "
            "save_steps, from which a killed run goes on"
        )
    if any(_is_reentrant(module) for module in model.modules()):
        raise UnsupportedModelError(
            "gradient checkpointing with use_reentrant=True hides gradients that pruning measures: set it to False "
            "where it is asked for (gradient_checkpointing_kwargs, prepare_model_for_kbit_training)"
        )
    if args.neftune_noise_alpha and HIDDEN in config.space:
        raise UnsupportedModelError(
            f"neftune_noise_alpha adds noise to dimensions that space={config.space!r} removes: leave it out, or take "
            "another space"
        )


def _is_reentrant(module: nn.Module) -> bool:
    """Whether what it checkpoints is, which arguments need not say: a script may ask the model itself.

    PyTorch takes True where nothing is said, as PEFT's `prepare_model_for_kbit_training(model)` does.
    """
    settings = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", None)
    if settings is None or not getattr(module, "gradient_checkpointing", False):
        return False
    return settings.get("use_reentrant") is not False


def require_shards_that_come_and_go(model: nn.Module) -> None:
    """FSDP2 as configs/accelerate/fsdp2.yaml has it: refits measure and change weights between passes, in parts."""
    names = {name for name, _ in model.named_modules()}
    if any(name.endswith(_WRAPPED) for name in names):
        raise UnsupportedModelError(
            "fsdp_activation_checkpointing puts blocks into others: set it to False, and gradient_checkpointing (since "
            "5.23 activation_checkpointing) of TrainingArguments to True instead"
        )
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not units:
        return
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError("torch_compile is not supported with FSDP2: set it to False")
    plugin = getattr(AcceleratorState(), "fsdp_plugin", None)
    if len(units) == 1 or (plugin is not None and not plugin.reshard_after_forward):
        raise UnsupportedModelError(
            "FSDP2 keeps weights whole between passes here, and what refits change would be lost: set "
            "fsdp_reshard_after_forward to true and fsdp_auto_wrap_policy to TRANSFORMER_BASED_WRAP, as "
            "configs/accelerate/fsdp2.yaml"
        )
