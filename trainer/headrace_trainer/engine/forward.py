"""Forward passes without gradients, under any layout: reference log-probabilities, rewards, values.

In: packs. Out: what a function makes of the last stage's outputs, on every rank of the replica.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from headrace_trainer.engine.device.megatron import get_forward_backward_func, parallel_state
from headrace_trainer.engine.packed import PackedBatch

Forward = Callable[[torch.nn.Module, PackedBatch], tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]]
"""Runs this stage of the model; on the last stage its output goes through the function that comes second, whose result
has the same shape for every pack of one length."""


@torch.no_grad()
def forward_passes(
    model: torch.nn.Module, batches: Sequence[PackedBatch], forward: Forward, *, shape: tuple[int, ...]
) -> torch.Tensor:
    """Run packs through the model. Every rank of the replica calls, with the same packs.

    Args:
        model: this rank's part, wrapped or not.
        batches: at least one, all of one length.
        forward: what is run, and what is made of its output.
        shape: of what it makes of one pack.

    Returns:
        [packs, *shape], fp32, the same on every rank of the replica.
    """
    device = batches[0].tokens_1T.device
    found = torch.empty(len(batches), *shape, device=device)

    def step(packs: Iterator[PackedBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
        output, of = forward(model, next(packs))
        return output, lambda output, non_loss_data: of(output)

    made = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=batches[0].tokens_1T.size(1),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if parallel_state.is_pipeline_last_stage():
        torch.stack([x.float() for x in made], out=found)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(found, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return found
