"""A device that computes on the CPU, but shows what a GPU would wait for.

Its tensors say that they are on "meta", torch's device without contents, and hold their values on the CPU. So a loop
takes the paths of a GPU and gives real numbers. Inside `PretendGPU` every operation is counted, and every one for which
CUDA makes the host wait is named: reading a value, sizes that depend on values, blocking copies between host and
device.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
CPU = torch.device("cpu")
FUSED = "_get_fused_kernels_supported_devices"
WAITING = {  # the host needs a value, or a size that follows from values
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "repeat_interleave",
    "equal",
    "_linalg_svd",
    "_linalg_eigh",
}
INDEXED = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")
VIEWS = {  # start no kernel
    *("view", "_unsafe_view", "_reshape_alias", "as_strided", "expand", "permute", "transpose", "t", "select", "slice"),
    *("split", "split_with_sizes", "unbind", "unsqueeze", "squeeze", "detach", "alias", "unfold", "lift_fresh"),
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "diagonal", "chunk", "unflatten"),
}


class OnDevice(torch.Tensor):
    """Holds `values` on the CPU and says that it is on DEVICE."""

    values: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]

    @staticmethod
    def __new__(cls, values: Tensor) -> "OnDevice":
        made = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=DEVICE,
        )
        made.values = values
        return made

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"OnDevice({self.values})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class PretendGPU(TorchDispatchMode):
    """Counts operations of DEVICE by name, and notes what a GPU would make the host wait for, with where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits: list[str] = []
        self.sent = 0  # bytes from the host, without waiting

    def reset(self) -> None:
        self.operations.clear()
        self.waits.clear()
        self.sent = 0

    @property
    def launches(self) -> int:
        """Operations that would start a kernel or a copy."""
        return sum(count for name, count in self.operations.items() if name not in VIEWS)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._watch(func, args, kwargs)
        return _run(func, args, kwargs)

    def _watch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        tensors = list(_tensors((*args, *kwargs.values())))
        here = [x for x in tensors if isinstance(x, OnDevice)]
        on_host = [x for x in tensors if not isinstance(x, OnDevice) and x.ndim]
        name = func.overloadpacket.__name__
        to = kwargs.get("device")
        if name == "_to_copy" and to is not None and not here and to.type == DEVICE.type:
            self._copied(tensors[0], kwargs.get("non_blocking", False), f"{name} from the host")
        elif name == "_to_copy" and to is not None and here and to.type == "cpu":
            self._waits(f"{name} to the host")
        elif name == "copy_" and here and on_host:
            blocking = isinstance(args[1], OnDevice) or not (kwargs.get("non_blocking") or (args[2:] and args[2]))
            self._copied(on_host[0], not blocking, f"{name} between host and device")
        elif here and name in WAITING:
            self._waits(name)
        elif here and name in INDEXED and any(isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1]):
            self._waits(f"{name} by a mask")
        elif here and on_host:
            self._waits(f"{name} with a tensor of the host")
        if here or (to is not None and to.type == DEVICE.type):
            self.operations[name] += 1

    def _copied(self, x: Tensor, non_blocking: bool, what: str) -> None:
        if non_blocking:
            self.sent += x.numel() * x.element_size()
        else:
            self._waits(what)

    def _waits(self, what: str) -> None:
        frame = sys._getframe()
        while frame.f_back is not None and "/spice_dist/" not in frame.f_code.co_filename:
            frame = frame.f_back
        self.waits.append(f"{what} at {frame.f_code.co_filename.rpartition('/spice_dist/')[2]}:{frame.f_lineno}")


class _Lists(TorchFunctionMode):
    """Makes `torch.tensor(numbers, device=DEVICE)`, which is a blocking copy and never reaches the dispatcher."""

    def __init__(self, watch: PretendGPU):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device) == DEVICE:
            self.watch._waits(func.__name__ + " of numbers")
            return OnDevice(func(*args, **{**kwargs, "device": CPU}))
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU what is asked of either device."""
    known = {id(x.values): x for x in _tensors((*args, *kwargs.values())) if isinstance(x, OnDevice)}
    to = kwargs.get("device")
    on_device = bool(known) if to is None else to.type == DEVICE.type
    kwargs = {**kwargs, "device": CPU} if to is not None else kwargs
    kwargs = {name: _mapped(lambda x: x.values if isinstance(x, OnDevice) else x, x) for name, x in kwargs.items()}
    out = func(*_mapped(lambda x: x.values if isinstance(x, OnDevice) else x, args), **kwargs)
    # what an operation in place returns is the tensor that it changed
    return _mapped(lambda x: known[id(x)] if id(x) in known else OnDevice(x), out) if on_device else out


def _tensors(x: Any) -> Iterator[Tensor]:
    """The tensors in lists of lists; torch's pytrees take most of the time of such small operations."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for part in x:
            yield from _tensors(part)


def _mapped(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    if isinstance(x, Tensor):
        return function(x)
    return type(x)(_mapped(function, part) for part in x) if isinstance(x, list | tuple) else x


class _Autocast(torch.autocast):
    """Torch's, which does not know DEVICE; that of the CPU is what computes."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any):
        super().__init__("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)


@contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGPU]:
    """Let DEVICE compute inside the block."""
    monkeypatch.setattr(torch, "autocast", _Autocast)
    for name in ("sgd", "adam", "optimizer"):
        monkeypatch.setattr(sys.modules[f"torch.optim.{name}"], FUSED, lambda: ["cpu", DEVICE.type], raising=False)
    # modules get new parameters on DEVICE: the old ones cannot change into tensors of another class
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    with PretendGPU() as watch, _Lists(watch):
        yield watch
