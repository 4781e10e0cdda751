"""SPICE with scikit-learn's conventions: fit, predict, fit_predict, transform, labels_."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClusterMixin, TransformerMixin

Data = str | Path | Sequence[str] | np.ndarray


class SpiceClusterer(ClusterMixin, TransformerMixin, BaseEstimator):
    """Groups images: `SpiceClusterer(n_clusters=12).fit("photos/").labels_`.

    Args:
        n_clusters: K, from 2 up.
        recipe: "digits" or "photos", see `spice_dist.recipes`.
        settings: single changes by dotted name, such as {"moco.epochs": 50}.
        seed: two fits with the same seed, data and machine agree exactly.
        workers: training processes; 0 trains in this one, without Ray.
        run: the run folder; a temporary one if None. Fitting into the folder of an interrupted fit goes on from it.

    Attributes:
        labels_: (N,) int64, the cluster of each image, in the order given or sorted by path for a folder.
        confidence_: (N,) float64 in [0, 1].
        paths_: N names; unreadable images are left out of all three.
        metrics_: the contents of metrics.json.
    """

    def __init__(
        self,
        n_clusters: int = 10,
        *,
        recipe: str = "photos",
        settings: Mapping[str, Any] | None = None,
        seed: int = 0,
        workers: int = 0,
        run: str | Path | None = None,
    ):
        self.n_clusters = n_clusters
        self.recipe = recipe
        self.settings = settings
        self.seed = seed
        self.workers = workers
        self.run = run
