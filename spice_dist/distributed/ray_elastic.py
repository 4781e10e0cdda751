"""Train stages on as many workers as the cluster has room for: fewer after a loss, more when nodes come.

The number of workers divides the BatchNorm groups of a batch, so that the result does not depend on it. Ray's own
elastic training takes any number in a range; here the group ends and starts again from the last checkpoint.
"""

import time

from spice_dist.distributed import ray_channel, ray_nodes
from spice_dist.distributed.ray_train import Job, WorkersLost, run_group
from spice_dist.errors import Interrupted, UserError

ATTEMPTS = 3  # groups lost in a row without a new checkpoint, after which training fails
LOOK_SECONDS = 3.0  # between two looks at the cluster
WAIT_SECONDS = 600.0  # for nodes, when there is room for no group at all


def train(job: Job, sizes: tuple[int, ...]) -> None:
    """Train on the largest of `sizes` (ascending) that has room, and start again whenever that size changes.

    Raises:
        Interrupted: the job was asked to stop; the state is saved.
        UserError: the workers reported one, were lost ATTEMPTS times in a row, or had no room for WAIT_SECONDS.
    """
    lost = 0
    while True:
        size = _wait_for_room(job, sizes)
        before = job.reached()
        try:
            done = run_group(job, size, max_failures=0, leave=_Growth(job, sizes, size).possible)
        except WorkersLost as error:
            if job.stop_requested():
                raise Interrupted from error
            lost = 0 if job.reached() > before else lost + 1
            if lost == ATTEMPTS:
                raise
            job.message(f"{error}; going on from the last checkpoint")
            continue
        if done:
            return
        if job.stop_requested():
            raise Interrupted
        lost = 0


def _wait_for_room(job: Job, sizes: tuple[int, ...]) -> int:
    """Return the largest size that has room, once two looks agree: a lost node is noticed late."""
    started, before = time.monotonic(), None
    while True:
        size = largest(sizes, ray_nodes.free_seats())
        if size is not None and size == before:
            return size
        before = size
        if size is None and time.monotonic() - started > WAIT_SECONDS:
            raise UserError(
                f"--workers asks for at least {sizes[0]}, but Ray has had no room for them for {WAIT_SECONDS:.0f} s; "
                "ask for fewer, or add nodes and run the same command again"
            )
        if job.stop_requested():
            raise Interrupted
        time.sleep(LOOK_SECONDS / 3)


def largest(sizes: tuple[int, ...], seats: int) -> int | None:
    """Return the largest of the ascending `sizes` that fits into `seats`; None if none does."""
    return max((size for size in sizes if size <= seats), default=None)


class _Growth:
    """Tests whether a running group could be larger: every LOOK_SECONDS at most, and true after two looks in a row."""

    def __init__(self, job: Job, sizes: tuple[int, ...], size: int):
        self.job, self.sizes, self.size = job, sizes, size
        self.looked_at, self.seen = time.monotonic(), 0

    def possible(self) -> bool:
        if time.monotonic() - self.looked_at < LOOK_SECONDS:
            return False
        progress = ray_channel.read_progress(self.job.run)
        # a group that starts has not taken its seats yet; a stage without a loss cannot stop
        if progress is None or progress.loss is None:
            return False
        self.looked_at = time.monotonic()
        room = min(self.size + ray_nodes.free_seats(), ray_nodes.seats())
        larger = (largest(self.sizes, room) or 0) > self.size
        self.seen = self.seen + 1 if larger else 0
        return self.seen == 2
