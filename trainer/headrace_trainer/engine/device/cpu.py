"""Stand-ins that let code written for CUDA run on the CPU.

Megatron-core allocates with ``device="cuda"``, asks ``torch.cuda`` for streams and current devices, and sorts
parameters by the name of their CUDA tensor type. Each of those names is wrapped once here, before Megatron is imported;
a ``TorchFunctionMode`` would tax every operation and would not reach other threads.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._device

CPU = torch.device("cpu")

_FACTORIES = [
    "arange",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "randn_like",
    "tensor",
    "zeros",
    "zeros_like",
]
_TENSOR_FACTORIES = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def install() -> None:
    """Put every stand-in in place. Only for machines without CUDA."""
    # torch keeps a set of its factory functions for `with torch.device("meta")`, filled at the first use. It must hold
    # the originals, or transformers builds models on the meta device with buffers that stay zero.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _allocating_on_cpu(getattr(torch, name)))
    for name in _TENSOR_FACTORIES:
        setattr(torch.Tensor, name, _allocating_on_cpu(getattr(torch.Tensor, name)))
    _stand_in_for_tensor_methods()
    _stand_in_for_cuda_module()
    dist.barrier = _barrier_without_device(dist.barrier)
    _hide_optimizers_from_no_compiler()
    _stand_in_inside_megatron()


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return type(device) is int or (isinstance(device, str) and device.startswith("cuda"))


def _allocating_on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def allocate(*args: Any, **kwargs: Any) -> Any:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return allocate


def _stand_in_for_tensor_methods() -> None:
    tensor: Any = torch.Tensor
    tensor.to = _moving_to_cpu(tensor.to)
    tensor.type = _naming_cuda_types(tensor.type)
    for owner, name in ((tensor, "cuda"), (tensor, "pin_memory"), (torch.nn.Module, "cuda")):
        setattr(owner, name, lambda self, *_args, **_kwargs: self)
    tensor.record_stream = lambda _self, _stream: None


def _moving_to_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args and _names_cuda(args[0]):
            args = (CPU, *args[1:])
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(self, *args, **kwargs)

    return to


def _naming_cuda_types(original: Callable[..., Any]) -> Callable[..., Any]:
    """``tensor.type()`` answers as on a GPU: the optimizer and gradient clipping accept no other names."""

    @functools.wraps(original)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if isinstance(answer, str) and not answer.startswith("torch.cuda."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    return type_


class _Moment:
    """What a CUDA stream or event is on a CPU: nothing to wait for, only a time."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.device, self.cuda_stream, self._seconds = CPU, 0, 0.0

    def record(self, *_args: Any) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, other: "_Moment") -> float:
        """Milliseconds from this moment to ``other``."""
        return (other._seconds - self._seconds) * 1e3

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def wait(self, *_args: Any) -> None: ...

    def wait_stream(self, *_args: Any) -> None: ...

    def wait_event(self, *_args: Any) -> None: ...


class _Stream(_Moment):
    def record_event(self, event: "_Event | None" = None) -> "_Event":
        return event or _Event()


class _Event(_Moment): ...


def _stand_in_for_cuda_module() -> None:
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.stream = lambda _stream=None: contextlib.nullcontext()
    cuda.get_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
    # Never by way of manual_seed_all, which torch.manual_seed itself calls.
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    _answer(cuda, None, "set_device", "synchronize", "empty_cache", "reset_peak_memory_stats")
    _answer(cuda, 0, "memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    _answer(cuda, CPU, "current_device")
    _answer(cuda, 1, "device_count")
    _answer(cuda, (0, 0), "get_device_capability")
    _answer(cuda, False, "is_current_stream_capturing")
    _answer(cuda, _Stream(), "current_stream")
    _answer(cuda, _Stream(), "default_stream")


def _answer(module: Any, value: object, *names: str) -> None:
    """Make each name a function that answers ``value``: one function a name, as ``torch._dynamo`` insists."""
    for name in names:
        setattr(module, name, _constant(value))


def _constant(value: object) -> Callable[..., object]:
    return lambda *_args, **_kwargs: value


def _barrier_without_device(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def barrier(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_ids", None)  # gloo refuses it
        return original(*args, **kwargs)

    return barrier


def _hide_optimizers_from_no_compiler() -> None:
    """Optimizers load the compiler at their first use, to tell it to leave them alone. Where there is none, it is said here."""
    for method in vars(torch.optim.Optimizer).values():
        hidden = getattr(method, "__wrapped__", None)
        if hidden is not None and "_disable_dynamo" in getattr(method, "__code__", hidden.__code__).co_qualname:
            hidden.__dynamo_disable = hidden


@contextlib.contextmanager
def _nothing_is_compiled() -> Iterator[None]:
    original = torch.compile
    torch.compile = lambda model=None, **_options: model if model is not None else lambda model: model  # type: ignore
    try:
        yield
    finally:
        torch.compile = original


def _stand_in_inside_megatron() -> None:
    with _nothing_is_compiled():
        # Decorators compile while Megatron is imported, before its own switch can be reached: torch.compile would load
        # the compiler, which takes longer than all of Megatron, and later ask for one of C++.
        import megatron.core.jit
    megatron.core.jit.disable_jit_fuser()

    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
