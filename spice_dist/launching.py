"""Plan how a run is carried out: workers, threads, cost. Nothing here changes a result."""

from dataclasses import dataclass

import torch

from spice_dist.config import Config
from spice_dist.cost import table
from spice_dist.data.sources import Source
from spice_dist.distributed.worker import Storage, usable_cores
from spice_dist.errors import UserError
from spice_dist.stages import check_settings, estimate, stages_of
from spice_dist.task import require_positive


@dataclass(frozen=True)
class Launch:
    """How a run is carried out; nothing here changes its result."""

    # training processes; 0: this one, without Ray; (least, most): an elastic number, up to the resources at the time;
    # None: one per GPU, or 2 on a CPU
    workers: int | tuple[int, int] | None = None
    threads: int | None = None  # CPU threads of each worker; None: cores / bn_groups, which fits any number of workers
    address: str | None = None  # of a running Ray cluster; None: one is started on this machine
    insecure: bool = False  # join a cluster that needs no token
    storage: Storage = Storage()  # how often workers save, and where they read images from
    labels: str | None = None  # source of true labels, for scores only


def plan(config: Config, launch: Launch) -> tuple[tuple[int, ...], int]:
    """Return (possible numbers of workers, ascending, (0,) for none beside this process; CPU threads of each).

    On a CPU no worker is started by default if the run has no stage that several workers could share.

    Raises:
        UserError: none of the numbers asked for divides the BatchNorm groups of a batch.
    """
    workers, groups = launch.workers, config.bn_groups
    alone = not any(stage.shared(config, False) for stage in stages_of(config))
    if workers is None and alone and launch.address is None and not torch.cuda.is_available():
        workers = 0
    return _worker_sizes(groups, workers), _num_threads(groups, launch.threads)


def _worker_sizes(bn_groups: int, wanted: int | tuple[int, int] | None) -> tuple[int, ...]:
    if wanted == 0:
        return (0,)
    if wanted is None:
        return _divisors(bn_groups, 1, torch.cuda.device_count() or 2)[-1:]
    least, most = (wanted, wanted) if isinstance(wanted, int) else wanted
    sizes = _divisors(bn_groups, least, most)
    if least < 1 or not sizes:
        shown = (
            f"{wanted}, which does not divide" if isinstance(wanted, int) else f"{least}:{most}; none of these divides"
        )
        raise UserError(
            f"--workers is {shown} the {bn_groups} BatchNorm groups of a batch; "
            f"give a divisor of {bn_groups}, 0, or --set bn_groups=..."
        )
    return sizes


def _divisors(number: int, least: int, most: int) -> tuple[int, ...]:
    return tuple(count for count in range(max(1, least), most + 1) if number % count == 0)


def in_words(sizes: tuple[int, ...]) -> str:
    return " or ".join(map(str, sizes)) if sizes != (0,) else "no"


def _num_threads(bn_groups: int, wanted: int | None) -> int:
    if wanted is not None:
        require_positive("", threads=wanted)
    return wanted or max(1, usable_cores() // bn_groups)


def dry_run(config: Config, source: Source, launch: Launch) -> str:
    """Tabulate what `fit` would cost; check the settings, write nothing.

    Raises:
        UserError: `fit` would refuse these settings.
    """
    check_settings(config, source, source.name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, threads = plan(config, launch)
    workers = max(1, sizes[-1])
    passes = 1 if device.type == "cuda" else config.bn_groups // workers
    torch.set_num_threads(threads)
    costs = estimate(config, source.training, source.clustered, workers, passes)
    clusters = config.clusters or "suggested"
    heading = f"{len(source.paths):,} images into {clusters} clusters on {workers} workers"
    return f"{heading}\n{table(costs, device, config.precision, workers)}"
