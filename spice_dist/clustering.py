"""What the stages of a run leave for its evaluation, whatever its method was."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spice_dist.data.manifest import Ingested
from spice_dist.models.heads import Network
from spice_dist.suggest import Suggestion
from spice_dist.task import Task


@dataclass(frozen=True)
class Reliable:
    """The labels that stage 3 learns from."""

    labels: Int[np.ndarray, " N"]  # UNRELIABLE where an image has none
    clusters: Int[np.ndarray, " N"]  # the clustering that they were selected from
    advice: str = ""  # what to do if they are few


@dataclass(frozen=True)
class Choice:
    """How the result was chosen among several groupings of the run's images, by scores that need no true labels."""

    name: str
    labels: Int[np.ndarray, " N"]
    confidence: Float[np.ndarray, " N"]  # of these labels
    compared: dict[str, dict[str, float]]  # grouping -> score -> value, higher is better
    baselines: dict[str, Int[np.ndarray, " N"]]
    agreement: float | None  # of the chosen one with the other groupings: mean ARI; None: that of the heads counts
    suggestion: Suggestion | None
    levels: dict[str, Any] | None  # numbers of coarser and finer groups


@dataclass(frozen=True)
class Clustering:
    """The result of a run, and what its scores need beside the images."""

    task: Task  # settings of `net`; stage 3 may have another backbone than stage 1
    net: Network
    by_head: Int[np.ndarray, "H M"]  # labels by every head, of all images or of those that are clustered
    loss: Float[Tensor, " H"] | None  # without labels, of every head; None: how far its labels are from the result's
    reliable: Reliable | None = None
    given: Bool[np.ndarray, " N"] | None = None  # images whose true labels were learnt from
    stages: Mapping[str, Callable[[], Int[np.ndarray, " N"]]] = field(default_factory=dict)  # labels by stage, to score
    last: str = ""  # the stage whose labels are the result's
    corrected: bool = False  # by hand
    choice: Choice | None = None  # None: the labels are what `net` predicts


def scored_images(manifest: Ingested) -> Int[np.ndarray, " S"]:
    """Which images the scores are of: those held out, or all that are clustered."""
    return np.arange(manifest.n - manifest.held_out, manifest.n) if manifest.held_out else np.arange(manifest.clustered)
