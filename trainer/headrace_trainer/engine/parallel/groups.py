"""Start and end of the gang's process groups.

In: a checked ``Layout``, and where rank 0 is found in the environment. Out: a ``Gang``, while torch's and Megatron's groups exist.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from headrace_api.parallelism import Layout
from headrace_trainer.engine import device
from headrace_trainer.engine.parallel.gang import Gang
from headrace_trainer.engine.parallel.rendezvous import meet

_TIMEOUT = timedelta(minutes=30)
"""How long a collective waits for a rank that is silent but alive: the slowest is a save that waits for an upload.
Ranks that die are noticed at once, by their closed connections; ones that hang earlier, by their agent."""


@contextmanager
def join_gang(layout: Layout, *, rank: int, local_rank: int = 0, local_world: int = 1, seed: int = 0) -> Iterator[Gang]:
    """The process groups of a layout, for as long as the block runs.

    A block that raises leaves the groups as they are: its peers may be gone, and the process is about to end.

    Args:
        layout: the axes; tensor ranks are neighbours, pipeline stages are furthest apart.
        rank: this rank's number in the gang.
        local_rank: its number on the node.
        local_world: ranks on the node.
        seed: seeds the generators that Megatron keeps for each tensor rank.
    """
    # Megatron takes ten seconds to import, and is needed from here on.
    from headrace_trainer.engine.device.megatron import parallel_state

    _start_torch(layout, rank=rank, local_rank=local_rank)
    _start_megatron(layout, seed=seed)
    yield _describe(layout, rank=rank, local_rank=local_rank, local_world=local_world)
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _start_torch(layout: Layout, *, rank: int, local_rank: int) -> None:
    if device.has_cuda():
        torch.cuda.set_device(local_rank)
    store = meet(rank=rank, world=layout.world)
    dist.init_process_group(
        device.collective_backend(), store=store, rank=rank, world_size=layout.world, timeout=_TIMEOUT
    )


def _start_megatron(layout: Layout, *, seed: int) -> None:
    from headrace_trainer.engine.device.megatron import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        distributed_timeout_minutes=int(_TIMEOUT.total_seconds() // 60),
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _describe(layout: Layout, *, rank: int, local_rank: int, local_world: int) -> Gang:
    from headrace_trainer.engine.device.megatron import parallel_state

    control = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    assert isinstance(control, dist.ProcessGroup)
    return Gang(
        layout=layout,
        rank=rank,
        local_rank=local_rank,
        local_world=local_world,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        device=device.compute_device(local_rank),
        control=control,
    )
