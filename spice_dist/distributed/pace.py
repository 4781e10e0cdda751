"""Where a worker's time goes: its own work, or waiting for the others in a collective.

On a GPU the waits are timed on the device, by events that are read once they have passed: nothing waits for them.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

EVENTS = 64  # pairs of events after which those that have passed are read
SECONDS = 10.0  # of training that each of two looks at the workers rests on
SLOW = 1.2  # times the mean of all workers
NAME_BYTES = 64  # of a host


class Waits:
    """Adds up the seconds for which this process waits for others."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.since: float | None = None  # when the wait began that this process is in; None: it works
        self.pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def during(self, device: torch.device) -> Iterator[None]:
        """Count the time of this block as waiting."""
        began = self.begin(device)
        try:
            yield
        finally:
            self.end(began)

    def begin(self, device: torch.device) -> Any:
        """Begin a wait; return what `end` needs: the time, or an event of a GPU."""
        self.since = time.monotonic()
        return _event() if device.type == "cuda" else self.since

    def end(self, began: Any) -> None:
        self.since = None
        if isinstance(began, float | int):
            self.seconds += time.monotonic() - began
            return
        self.pairs.append((began, _event()))
        if len(self.pairs) >= EVENTS:
            self._read()

    def take(self) -> float:
        """Return the seconds since the last call."""
        self._read()
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def _read(self) -> None:
        """Read the events that have passed; they pass in order."""
        passed = next((i for i, (_, end) in enumerate(self.pairs) if not end.query()), len(self.pairs))
        self.seconds += sum(begin.elapsed_time(end) for begin, end in self.pairs[:passed]) / 1000
        del self.pairs[:passed]


waits = Waits()  # of this process


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def time_averaging(wrapped: nn.Module) -> None:
    """Count how long each backward pass of a DistributedDataParallel waits for the gradients of the others.

    PyTorch calls what is queued in a backward pass at its end, in that order: ours, which begins the wait; that of
    DistributedDataParallel, which waits; then what ours has queued.
    """
    queued = False

    def at_first_gradient(_: Tensor) -> None:
        nonlocal queued
        if not queued:
            queued = True
            Variable._execution_engine.queue_callback(begin)

    def begin() -> None:
        nonlocal queued
        queued = False
        began = waits.begin(next(wrapped.parameters()).device)
        Variable._execution_engine.queue_callback(lambda: waits.end(began))

    def watch(_module: nn.Module, _inputs: Any, output: Any) -> None:
        tensor = next(_tensors(output), None)
        if tensor is not None:
            tensor.register_hook(at_first_gradient)

    wrapped.register_forward_hook(watch)


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of a module's output that have a gradient."""
    if isinstance(output, Tensor):
        if output.requires_grad:
            yield output
    elif isinstance(output, dict | list | tuple):
        for each in output.values() if isinstance(output, dict) else output:
            yield from _tensors(each)


class Pace:
    """Finds the worker that the others wait for, from what each has worked since the last look."""

    def __init__(self) -> None:
        self.began, self.suspect, self.said = time.monotonic(), -1, False
        waits.take()

    def passed(self) -> float:
        """Return the seconds since the last look."""
        return time.monotonic() - self.began

    def worked(self) -> float:
        """Return the seconds for which this worker has worked since the last look, and look anew."""
        passed, self.began = self.passed(), time.monotonic()
        return max(0.0, passed - waits.take())

    def slowest(self, shares: list[float]) -> int | None:
        """Return the worker that is slow at two looks in a row; None if none is, or once one was returned.

        Args:
            shares: of the time since the last look, for which each worker has worked.
        """
        rank = max(range(len(shares)), key=shares.__getitem__)
        slow = shares[rank] > SLOW * sum(shares) / len(shares)
        again, self.suspect = slow and rank == self.suspect, rank if slow else -1
        if not again or self.said:
            return None
        self.said = True
        return rank


def host_name() -> Tensor:
    """Return the name of this host in (1, NAME_BYTES) uint8, to be gathered."""
    name = socket.gethostname().encode()[:NAME_BYTES]
    return torch.frombuffer(bytearray(name.ljust(NAME_BYTES, b"\0")), dtype=torch.uint8)[None]
