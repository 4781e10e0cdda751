"""Let all workers help with what the first of them does alone: each computes a share of the parts that it asks for.

The first worker sends a function and its arguments. Rows come back in the order of the parts, so that they are those
of one process.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from threadpoolctl import threadpool_limits

from spice_dist.data.files import Progress
from spice_dist.distributed import collectives
from spice_dist.errors import UserError

Rows = tuple[np.ndarray, ...]
Work = Callable[..., Rows]
"""Called as work(parts, device, progress, *arguments) with a range of parts; returns their rows, of equal lengths."""


@dataclass(frozen=True)
class _Team:
    group: Any  # of all workers
    rank: int
    world: int
    threads: int  # of each, while all of a host compute

    def compute(
        self, work: Work, parts: int, device: torch.device, progress: Progress, arguments: tuple[Any, ...]
    ) -> list[Any]:
        """Compute this worker's share; return the rows of all shares, or their errors, on the first worker."""
        share, before = collectives.share_of(parts, self.rank, self.world), torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with threadpool_limits(self.threads):  # of NumPy and scikit-learn, to which Ray gives one
                outcome = work(share, device, progress, *arguments) if len(share) else None
        except UserError as error:
            outcome = UserError(str(error))  # of a class that can be sent
        finally:
            torch.set_num_threads(before)
        shares: list[Any] = [None] * self.world
        dist.gather_object(outcome, None if self.rank else shares, dst=0, group=self.group)
        return shares


_team: _Team | None = None  # on the first worker, while the others wait for it


def lead(first: Callable[[], None], device: torch.device) -> None:
    """Call `first` on the first worker, as if it were the only one; the others compute their shares meanwhile.

    Every worker calls this; what `first` raises is raised on the first worker alone.
    """
    global _team
    if collectives.alone():
        first()
        return
    group = collectives.patient_group()
    threads = max(1, len(os.sched_getaffinity(0)) // collectives.on_this_host(group))
    team = _Team(group, collectives.rank(), collectives.world(), threads)
    if team.rank:
        _help(team, device)
        return
    _team = team
    try:
        with collectives.apart():
            first()
    finally:
        _team = None
        dist.broadcast_object_list([None], src=0, group=group)


def _help(team: _Team, device: torch.device) -> None:
    while True:
        request: list[Any] = [None]
        dist.broadcast_object_list(request, src=0, group=team.group)
        if request[0] is None:
            return
        work, parts, arguments = request[0]
        team.compute(work, parts, device, lambda done, total: None, arguments)


def shared(work: Work, parts: int, device: torch.device, progress: Progress, *arguments: Any) -> Rows:
    """Return the rows of range(parts): computed by all workers inside of `lead`, else by this process.

    Args:
        work: a function of a module.
        progress: gets the progress of this worker's share, in units of the whole.

    Raises:
        UserError: that of any worker.
    """
    team = _team
    if team is None:
        return work(range(parts), device, progress, *arguments)
    dist.broadcast_object_list([(work, parts, arguments)], src=0, group=team.group)

    def scaled(done: int, total: int) -> None:
        progress(done * team.world, total * team.world)

    shares = team.compute(work, parts, device, scaled, arguments)
    if error := next((share for share in shares if isinstance(share, UserError)), None):
        raise error
    return tuple(np.concatenate(column) for column in zip(*filter(None, shares), strict=True))
