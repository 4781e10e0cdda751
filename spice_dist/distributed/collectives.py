"""Gather tensors of all workers, so that each computes the same pure function; with one process nothing is sent."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from spice_dist.distributed.pace import waits
from spice_dist.errors import UserError
from spice_dist.transfer import send

PATIENCE = timedelta(days=30)  # for a worker that does something alone
_apart = False


@contextmanager
def apart() -> Iterator[None]:
    """Let this process count as the only one inside the block: rank 0 of a world of 1."""
    global _apart
    _apart = True
    try:
        yield
    finally:
        _apart = False


def alone() -> bool:
    return _apart or not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def world() -> int:
    """Return the number of workers."""
    return 1 if alone() else dist.get_world_size()


def rank() -> int:
    """Return the number of this worker, from 0."""
    return 0 if alone() else dist.get_rank()


@torch.no_grad()
def all_gather(x: Tensor) -> Tensor:
    """Concatenate `x` (B, ...) of every worker along the first axis, in rank order. No gradient."""
    if alone():
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    with waits.during(x.device):
        dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def exchange(x: Tensor, order: np.ndarray) -> Tensor:
    """Return this worker's part of `all_gather(x)[order]`, without gathering: every row is sent once. No gradient.

    Args:
        x: (B, ...), with the same B on each of the W workers.
        order: a permutation of the W * B rows, the same on all workers.

    Returns:
        (B, ...): the rows `order.reshape(W, B)[rank]` of `all_gather(x)`.
    """
    if alone():
        return x[_index(order, x)]
    owner, row = np.divmod(order.reshape(world(), -1), len(x))
    sent = [row[receiver][owner[receiver] == rank()] for receiver in range(world())]
    outgoing = x[_index(np.concatenate(sent), x)].contiguous()
    incoming = torch.empty_like(outgoing)
    senders = owner[rank()]
    counts = np.bincount(senders, minlength=world())
    with waits.during(x.device):
        dist.all_to_all_single(incoming, outgoing, counts.tolist(), [len(rows) for rows in sent])
    place = np.argsort(senders, kind="stable")  # rows arrive by sender, those of a sender in order
    return torch.empty_like(incoming).index_copy_(0, _index(place, x), incoming)


def _index(rows: np.ndarray, x: Tensor) -> Tensor:
    """Put row numbers on the device of `x`."""
    return send(torch.from_numpy(rows), x.device)


def share(total: int) -> range:
    """Return which of `total` items are this worker's: consecutive ones, cut as by numpy.array_split."""
    return share_of(total, rank(), world())


def share_of(total: int, rank: int, world: int) -> range:
    """Return the `share` of worker `rank` of `world`."""
    each, more = divmod(total, world)
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))


def gather_shares(rows: Tensor, total: int) -> Tensor:
    """Gather all `total` rows, given those of this worker's `share`."""
    if alone():
        return rows
    workers = world()
    largest = -(-total // workers)
    padded = torch.cat([rows, rows.new_zeros(largest - len(rows), *rows.shape[1:])])
    chunks = all_gather(padded).chunk(workers)
    return torch.cat([chunk[: (total + workers - 1 - number) // workers] for number, chunk in enumerate(chunks)])


@torch.no_grad()
def mean(x: Tensor) -> Tensor:
    """Average over workers, elementwise."""
    if alone():
        return x
    total = x.clone()
    with waits.during(x.device):
        dist.all_reduce(total)
    return total / world()


def total(x: Tensor) -> Tensor:
    """Sum over workers, elementwise, with a gradient.

    Every worker must compute the same loss from the sum. A worker's gradient is then its part of the whole gradient
    times the number of workers, by which `Worker.wrap` divides.
    """
    return x if alone() else _Total.apply(x)  # pyright: ignore[reportReturnType]


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        summed = x.clone(memory_format=torch.contiguous_format)
        with waits.during(x.device):
            dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        return gradients[0] * world()


def largest_int(value: int, device: torch.device) -> int:
    """Return the largest of the workers' integers, on every worker."""
    if alone():
        return value
    votes = torch.tensor([value], device=device)
    with waits.during(device):
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return int(votes.item())


def broadcast_int(value: int, device: torch.device) -> int:
    """Return the integer of the first worker, on every worker."""
    if alone():
        return value
    message = torch.tensor([value], device=device)
    with waits.during(device):
        dist.broadcast(message, src=0)
        return int(message.item())


def barrier() -> None:
    if not alone():
        with waits.during(torch.device("cpu")):  # it holds the process, on a GPU too
            dist.barrier()


def patient_group() -> Any:
    """Return a group of all workers for objects, which waits PATIENCE for a worker; None if there is only one."""
    return None if alone() else dist.new_group(backend="gloo", timeout=PATIENCE)


def of_all(value: Any, group: Any) -> list[Any]:
    """Return the values of all workers of a `patient_group`, in rank order, on every worker."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def agreed(compute: Callable[[], Any], group: Any) -> list[Any]:
    """Return what `compute` returns on each worker of a `patient_group`, on all of them; a UserError is raised by all.

    So no worker waits for one that has failed.
    """
    try:
        value = compute()
    except UserError as error:
        value = UserError(str(error))  # of a class that can be sent
    values = of_all(value, group)
    if error := next((value for value in values if isinstance(value, UserError)), None):
        raise error
    return values


def on_this_host(group: Any) -> int:
    """Return how many workers of a `patient_group` run on this worker's host."""
    return of_all(socket.gethostname(), group).count(socket.gethostname())
