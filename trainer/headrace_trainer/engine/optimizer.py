"""Megatron's distributed AdamW around this rank's part of the model.

The distributed form is used for one replica too: plain and distributed optimizers do not read each other's checkpoints.
"""

from headrace_api.stages.training import Optimizer, Precision, Schedule
from headrace_trainer.engine.device.megatron import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    MegatronModule,
    MegatronOptimizer,
    OptimizerConfig,
    clip_grad_by_total_norm_fp32,
    finalize_model_grads,
    get_megatron_optimizer,
    parallel_state,
)


def wrap_model(model: MegatronModule, *, bucket_size: int | None = None) -> DistributedDataParallel:
    """The model with fp32 gradient buffers that are reduced over the data axis.

    Where there are replicas, gradients are reduced while the backward pass runs and weights are gathered while the next
    forward pass does, bucket by bucket. Until then ``model`` holds old weights of other replicas' parts.

    Args:
        model: from ``build_model``.
        bucket_size: parameters in a bucket; Megatron's choice if None.
    """
    overlaps = parallel_state.get_data_parallel_world_size() > 1
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlaps,
        overlap_param_gather=overlaps,
        bucket_size=bucket_size,
        # Losses and gradient norms are checked once for the whole gang; a check of its own would end one rank only.
        check_for_nan_in_grad=False,
    )
    wrapped = DistributedDataParallel(model.config, settings, model)
    model.config.finalize_model_grads_func = finalize_model_grads
    if overlaps:
        model.config.no_sync_func = wrapped.no_sync
    return wrapped


def build_optimizer(
    wrapped: DistributedDataParallel, settings: Optimizer, *, schedule: Schedule, precision: Precision
) -> MegatronOptimizer:
    """AdamW with fp32 main weights, clipping by the global norm, its state spread over the data axis."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=schedule.learning_rate,
        min_lr=schedule.final_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        clip_grad=settings.clip_norm,
        bf16=precision is not Precision.FP32,
        params_dtype=next(wrapped.parameters()).dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=wrapped.ddp_config.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(config, [wrapped], use_gloo_process_groups=False)
    wrapped.module.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def clip_gradient(optimizer: MegatronOptimizer, *, norm: float) -> None:
    """Scale this rank's part of the gradient, whose whole norm is ``norm``, down to the largest norm allowed."""
    if parameters := optimizer.get_parameters():  # where there are few, some ranks have none
        clip_grad_by_total_norm_fp32(parameters, max_norm=optimizer.config.clip_grad, total_norm=norm)


def set_rates(optimizer: MegatronOptimizer, *, learning_rate: float, weight_decay: float) -> None:
    """Set the rates of a step. Groups of vectors have a ``wd_mult`` of 0: norms do not decay."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]
