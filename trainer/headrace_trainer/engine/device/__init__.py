"""The hardware of a rank: CUDA with NCCL, or the CPU with gloo. The one place that knows which.

In: what torch finds on this machine. Out: a device, a collective backend, and ``install``, which makes Megatron-core
run there; ``device.megatron`` calls it before Megatron is imported, and everything else takes Megatron from there.
"""

import functools
import importlib.util
import os
import sys
import warnings

import torch

from headrace_trainer.engine.device.determinism import be_deterministic


@functools.cache
def has_cuda() -> bool:
    """Whether this rank computes on a GPU. Remembered: the stand-ins for machines without one change torch's answer."""
    return torch.cuda.is_available()


@functools.cache
def has_transformer_engine() -> bool:
    """Whether Transformer Engine's kernels can be used: it is installed, and there is a GPU for it."""
    return has_cuda() and importlib.util.find_spec("transformer_engine") is not None


def compute_device(local_rank: int = 0) -> torch.device:
    """Where the tensors of a rank live.

    Args:
        local_rank: the rank's number on its node; one GPU each.
    """
    return torch.device("cuda", local_rank) if has_cuda() else torch.device("cpu")


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on ``device``; the host does not wait for the copy, nor for what the GPU does before it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def collective_backend() -> str:
    """The backend of the default process group; CPU tensors go through gloo on every machine."""
    return "cpu:gloo,cuda:nccl" if has_cuda() else "gloo"


@functools.cache
def install() -> None:
    """Make Megatron-core run on this machine. Takes effect once a process; must come before Megatron is imported."""
    # Tensor ranks overlap a reduction with a multiplication; on GPUs they keep their order only on one queue.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    be_deterministic(os.environ)
    if not has_cuda():
        from headrace_trainer.engine.device import cpu

        # Megatron takes its kernels wherever it is installed, as in an image that pools without GPUs share.
        sys.modules["transformer_engine"] = None
        # Megatron says six times while it is imported that it has no GPU kernels.
        warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed")
        warnings.filterwarnings("ignore", message="full scope is deprecated")
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        cpu.install()
    from headrace_trainer.engine.device import megatron_patches

    megatron_patches.install(transformer_engine=has_transformer_engine())
