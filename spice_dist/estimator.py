"""SPICE with scikit-learn's conventions: fit, predict, fit_predict, transform, labels_."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from sklearn.base import BaseEstimator, ClusterMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from spice_dist import artifacts, inference
from spice_dist.assignments import read_assignments
from spice_dist.data.dataset import open_data
from spice_dist.data.images import Images
from spice_dist.data.manifest import read_paths
from spice_dist.data.sources import Source, from_array, from_files
from spice_dist.data.views import Statistics
from spice_dist.launching import Launch
from spice_dist.model_folder import load_model, temporary_images
from spice_dist.models.backbone import unit
from spice_dist.models.heads import Network
from spice_dist.pipeline import fit
from spice_dist.report import write_report
from spice_dist.resolve import Wish, resolve
from spice_dist.task import AUTO

Data = str | Path | Sequence[str | Path] | np.ndarray


class SpiceClusterer(ClusterMixin, TransformerMixin, BaseEstimator):
    """Groups images: `SpiceClusterer(n_clusters=12).fit("photos/").labels_`.

    Data is a path, a list of image files, or an array (N, H, W), (N, H, W, 1) or (N, H, W, 3) of uint8.

    Args:
        n_clusters: K, from 2 up, or "auto": as many as the features of a trained network suggest.
        recipe: "photos", "digits", "cifar10" ...: see `spice_dist.recipes`.
        backbone: a timm model in place of the recipe's, or several, whose features stand side by side; None is "auto"
            for photos, the best trained network that can be had; "scratch" trains the recipe's own.
        weights: of that backbone, "timm", "package" or a file: its features are taken as they are, without stage 1.
        settings: single changes by dotted name, such as {"moco.epochs": 50}.
        seed: two fits with the same seed and data on the same machine agree exactly.
        workers: training processes; 0 trains in this one, without Ray.
        run: the run folder, where an interrupted fit goes on; None makes a temporary one for this object's lifetime.

    Attributes:
        n_clusters_: K, as asked for or suggested.
        labels_: (N,) int64, the cluster of each image, in the order given; a folder is sorted by path.
        confidence_: (N,) float64 in [0, 1].
        paths_: the N names; unreadable images are left out of all three.
        metrics_: the contents of metrics.json.
        run_: the run folder.
    """

    def __init__(
        self,
        n_clusters: int | Literal["auto"] = "auto",
        *,
        recipe: str = "photos",
        backbone: str | Sequence[str] | None = None,
        weights: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
        seed: int = 0,
        workers: int = 0,
        run: str | Path | None = None,
    ):
        self.n_clusters = n_clusters
        self.recipe = recipe
        self.backbone = backbone
        self.weights = weights
        self.settings = settings
        self.seed = seed
        self.workers = workers
        self.run = run

    def fit(self, X: Data, y: None = None) -> "SpiceClusterer":
        """Run the whole pipeline. UserError if the data or the settings cannot be used."""
        if self.run is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="spice-")
            run = Path(self._temporary.name)
        else:
            run = Path(self.run)
        clusters = AUTO if self.n_clusters == "auto" else self.n_clusters
        changes = {"clusters": clusters, "seed": self.seed, **(self.settings or {})}
        backbones = (self.backbone,) if isinstance(self.backbone, str) else tuple(self.backbone or ())
        weights = None if self.weights is None else str(self.weights)
        source = _source(X)
        wish = Wish(self.recipe, backbones=backbones, weights=weights, changes=changes)
        resolved = resolve(source, wish, run)
        self.metrics_ = fit(resolved.config, source, run, Launch(workers=self.workers), network=resolved.network)
        self.n_clusters_ = self.metrics_["k"]
        self.run_ = run
        self.labels_, self.confidence_, _ = read_assignments(artifacts.assignments_file(run))
        self.paths_ = read_paths(artifacts.data(run))
        return self

    def predict(self, X: Data) -> Int64[np.ndarray, " N"]:
        """The cluster of each readable image."""
        with self._packed(X) as (net, images, statistics):
            return inference.probabilities(net, images, statistics).argmax(1)

    def transform(self, X: Data) -> Float[np.ndarray, "N D"]:
        """Unit-norm float32 features of the jointly trained network, one row per readable image."""
        with self._packed(X) as (net, images, statistics):
            index = np.arange(images.n)
            chunks = inference.outputs(net.backbone, images, index, statistics)
            return torch.cat([unit(features).cpu() for features in chunks]).numpy()

    def report(self, out: str | Path) -> Path:
        """Write the HTML report to `out`."""
        check_is_fitted(self, "run_")
        return write_report(self.run_, Path(out))

    @contextmanager
    def _packed(self, X: Data) -> Iterator[tuple[Network, Images, Statistics]]:
        check_is_fitted(self, "run_")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        net, task = load_model(artifacts.model(self.run_), device)
        with temporary_images(_source(X), task.data, device) as (images, _, _):
            yield net, images, task.backbone.statistics


def _source(X: Data) -> Source:
    if isinstance(X, np.ndarray):
        return from_array(X)
    return open_data(str(X)) if isinstance(X, str | Path) else from_files(X)
