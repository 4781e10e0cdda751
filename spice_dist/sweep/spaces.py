"""The search space of a sweep: a file with ranges of settings, and the stage at which its trials begin."""

import os
import random
import runpy
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import spice_dist
from spice_dist.distributed import ray_train
from spice_dist.errors import UserError

# Ray reads them when it is imported
RAY_SETTINGS = {
    # our rows are in the trials' folders
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # the table is ours
    "RAY_AIR_NEW_OUTPUT": "0",
    # a failed trial is a row with a reason
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
NOT_SEARCHED = {
    "data": "all trials must cluster the same images",
    "clusters": "scores of different numbers of clusters cannot be compared",
    "seed": "a seed is chance, not a setting",
    "method": "trials share the stages of SPICE",
    "pretext": "compare two pretexts by two sweeps",
    "spice_semi": "stage 3 takes minutes to hours a trial; search the stages before it",
}
Ranges = dict[str, Any]
"""Ray Tune's domains by dotted names of settings."""


@dataclass(frozen=True)
class Space:
    """The contents of a file with a search space."""

    name: str  # of the file, without .py
    ranges: Ranges
    metric: str  # the score that chooses, unless the user names another


class Start(StrEnum):
    """The stage at which trials begin: they run it and those after it, and share those before it."""

    PRETRAIN = "pretrain"  # stage 1
    HEADS = "heads"  # stage 2, on the base's features
    THRESHOLDS = "thresholds"  # reliable labels, from the base's heads

    @property
    def trains_backbone(self) -> bool:
        return self is Start.PRETRAIN

    @property
    def trains_heads(self) -> bool:
        return self is not Start.THRESHOLDS


def start_of(names: Iterable[str]) -> Start:
    """Return the stage at which trials begin that change these settings.

    Raises:
        UserError: trials that differ in one of them cannot be compared, or are too slow.
    """
    groups = {name.split(".")[0]: name for name in names}
    for group, why in NOT_SEARCHED.items():
        if group in groups:
            raise UserError(f"a sweep cannot search {groups[group]}: {why}")
    if set(groups) - {"spice_self", "reliable"}:
        return Start.PRETRAIN
    return Start.HEADS if "spice_self" in groups else Start.THRESHOLDS


def space_file(name: str) -> Path:
    """Return the file of a search space: ours by name, in a checkout or an installation, or the user's by path."""
    package = Path(spice_dist.__file__).parent
    candidates = [folder / f"tune_spaces/{name}.py" for folder in (package, package.parent)]
    return next((path for path in candidates if path.is_file()), Path(name))


def read_space(path: Path, address: str | None = None, insecure: bool = False) -> Space:
    """Read SPACE and METRIC of a Python file, which is run: only read your own.

    Raises:
        UserError: it cannot be run, or lacks one of them.
    """
    if not path.is_file():
        raise UserError(f"there is no search space {path}; give heads, thresholds, augmentations, pretrain or a file")
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    # the file imports Ray
    ray_train.prepare(address, insecure)
    try:
        variables = runpy.run_path(str(path))
    except Exception as error:
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    ranges, metric = variables.get("SPACE"), variables.get("METRIC", "generalization")
    if not isinstance(ranges, dict) or not ranges:
        raise UserError(f"{path} has no SPACE, a dictionary of Ray Tune's domains by dotted names of settings")
    for name, domain in ranges.items():
        if not hasattr(domain, "sample"):
            raise UserError(
                f"{path}: {name} is {domain!r}, which is no domain of Ray Tune; use --set for a fixed value"
            )
    return Space(path.stem, ranges, str(metric))


def descriptions(ranges: Ranges) -> dict[str, str]:
    """Describe each range in words, by which a sweep recognises its space."""
    return {name: _description(domain) for name, domain in ranges.items()}


def _description(domain: Any) -> str:
    bounds = {name: value for name, value in vars(domain).items() if name in ("lower", "upper", "categories")}
    sampler = domain.get_sampler() if hasattr(domain, "get_sampler") else ""
    values = ", ".join(map(str, bounds.get("categories", list(bounds.values()))))
    return f"{type(sampler).__name__.strip('_')} {type(domain).__name__} {values}"


def sample(ranges: Ranges, seed: int) -> dict[str, Any]:
    """Draw one value of every range, to see whether there are such settings."""
    random.seed(seed)
    return {name: domain.sample() for name, domain in ranges.items()}
