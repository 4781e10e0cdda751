"""Train stages on as many workers as the cluster has room for: fewer after a loss, more when nodes come.

The number of workers divides the BatchNorm groups of a batch, so that the result does not depend on it. Ray's own
elastic training takes any number in a range; here the group ends and starts again from the last checkpoint. With a
single number of workers it starts again once there is room for as many.
"""

import time

from spice_dist.distributed import ray_channel, ray_nodes, ray_train
from spice_dist.distributed.ray_train import Job, WorkersLost, run_group
from spice_dist.errors import Interrupted, UserError

ATTEMPTS = 3  # groups lost in a row without a new checkpoint, after which training fails
WAIT_SECONDS = 600.0  # for nodes, when there is room for no group at all


def train(job: Job, sizes: tuple[int, ...]) -> None:
    """Train on the largest of `sizes` (ascending) that has room, and start again whenever that size changes.

    Raises:
        Interrupted: the job was asked to stop; the state is saved.
        UserError: the workers reported one, or had no room for WAIT_SECONDS, or one size never had; WorkersLost if they
            were lost ATTEMPTS times in a row.
    """
    if len(sizes) == 1 and (seats := ray_nodes.seats()) < sizes[0]:
        kind = ray_nodes.kind_of_seat()
        raise UserError(f"--workers is {sizes[0]}, but Ray has {seats} {kind}s for them; ask for fewer workers")
    lost, attempts, size = 0, 1 if ray_train.ray_replaces() else ATTEMPTS, None
    while True:
        size = _wait_for_room(job, sizes, sizes[-1] if size is None else None)
        before = job.reached()
        try:
            done = run_group(job, size, leave=_Growth(job, sizes, size).possible)
        except WorkersLost as error:
            if job.stop_requested():  # the signal went to all processes of the job
                raise Interrupted from error
            lost = 0 if job.reached() > before else lost + 1
            if lost == attempts:
                raise
            job.message(f"{error}; going on from the last checkpoint")
            continue
        if done:
            return
        if job.stop_requested():
            raise Interrupted
        lost = 0


def _wait_for_room(job: Job, sizes: tuple[int, ...], before: int | None) -> int:
    """Return the largest size that has room, once two looks agree: a lost node is noticed late.

    Args:
        before: what stands for the first look; None: nothing.
    """
    started = time.monotonic()
    say_at = started + ray_nodes.LOOK_SECONDS  # by then a group that has just ended gives its seats back
    while True:
        size = largest(sizes, ray_nodes.free_seats())
        if size is not None and size == before:
            return size
        before = size
        now = time.monotonic()
        if size is None and now - started > WAIT_SECONDS:
            raise UserError(
                f"--workers asks for at least {sizes[0]}, but Ray has had no room for them for {WAIT_SECONDS:.0f} s; "
                "ask for fewer, or add nodes and run the same command again"
            )
        if size is None and now >= say_at:
            say_at = now + ray_nodes.SAY_SECONDS
            left = WAIT_SECONDS - now + started
            job.message(f"no room for {sizes[0]} workers: {ray_nodes.room_in_words()}; waiting {left:.0f} s more")
        if job.stop_requested():
            raise Interrupted
        time.sleep(ray_nodes.LOOK_SECONDS / 3)


def largest(sizes: tuple[int, ...], seats: int) -> int | None:
    """Return the largest of the ascending `sizes` that fits into `seats`; None if none does."""
    return max((size for size in sizes if size <= seats), default=None)


class _Growth:
    """Tests whether a running group could be larger: every LOOK_SECONDS at most, and true after two looks in a row."""

    def __init__(self, job: Job, sizes: tuple[int, ...], size: int):
        self.job, self.sizes, self.size = job, sizes, size
        self.looked_at, self.seen = time.monotonic(), 0

    def possible(self) -> bool:
        if self.size == self.sizes[-1] or time.monotonic() - self.looked_at < ray_nodes.LOOK_SECONDS:
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
