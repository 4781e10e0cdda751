"""SPICE with scikit-learn's conventions: fit, predict, predict_proba, transform, score, labels_."""

import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from spice_dist import artifacts, metrics, predicting
from spice_dist.assignments import read_assignments
from spice_dist.data.dataset import open_data
from spice_dist.data.folders import is_image_name
from spice_dist.data.left_out import left_out, left_out_line
from spice_dist.data.manifest import read_paths
from spice_dist.data.sources import Source, from_array, from_arrays, from_files
from spice_dist.errors import UserError
from spice_dist.group_names import labels_of
from spice_dist.launching import Launch
from spice_dist.model_folder import load_model, save_model
from spice_dist.models.backbone import unit
from spice_dist.pipeline import fit
from spice_dist.predicting import NO_CLUSTER
from spice_dist.report import write_report
from spice_dist.report.reading import load
from spice_dist.resolve import Wish, resolve
from spice_dist.task import AUTO

Data = str | Path | Sequence[Any] | np.ndarray  # a sequence of paths, or of arrays
UNREADABLE = ("keep", "error")
# what Python calls the options of the command, which messages name
PARAMETERS = {name: name for name in ("backbone", "recipe", "seed", "weights", "workers")} | {
    "clusters": "n_clusters",
    "max-bad": 'settings={"data.max_bad": ...}',
    "method": 'settings={"method": ...}',
    "out": "run",
    "pretext": 'settings={"pretext": ...}',
    "set": "settings",
}
VALUES = ("...", "True", "False")
OPTION = re.compile(r"--set ([\w.]+)=(\w+|\.\.\.)|(?<![\w/-])--([a-z][a-z-]*)")


@contextmanager
def _in_python(**parameters: str) -> Iterator[None]:
    """Let UserErrors name parameters in place of options of the command; `parameters` replace those of PARAMETERS."""

    def named(option: re.Match[str]) -> str:
        setting, value, name = option.groups()
        if setting:
            return f'settings={{"{setting}": {value if value in VALUES or value.isdecimal() else repr(value)}}}'
        return (PARAMETERS | parameters).get(name, f"the command's --{name}")

    try:
        yield
    except UserError as error:
        error.args = (OPTION.sub(named, str(error)),)
        raise


class SpiceClusterer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """Groups images: `SpiceClusterer(n_clusters=12).fit("photos/").labels_`.

    Data is a path, a list of image files, an array (N, H, W), (N, H, W, 1) or (N, H, W, 3) of uint8, or a list of
    arrays of one image each, of any sizes. Every result has a row for each image, in the order given. A pickle of a
    fitted one carries its network.

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
        unreadable: "keep" gives an image that cannot be used the cluster -1, and NaN for every other number, with a
            warning; "error" raises a UserError that names it.

    Attributes:
        n_clusters_: K, as asked for or suggested.
        labels_: (N,) int64, the cluster of each image, in the order given; a folder is sorted by path. -1: none.
        confidence_: (N,) float64 in [0, 1], NaN without a cluster.
        paths_: the N names.
        metrics_: the contents of metrics.json.
        run_: the run folder.
        names_: K names of the clusters: those that corrections gave, else "group-03" and such.
        n_features_in_: numbers of an image, only after a fit on an array.
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
        unreadable: Literal["keep", "error"] = "keep",
    ):
        self.n_clusters = n_clusters
        self.recipe = recipe
        self.backbone = backbone
        self.weights = weights
        self.settings = settings
        self.seed = seed
        self.workers = workers
        self.run = run
        self.unreadable = unreadable

    @classmethod
    @_in_python()
    def load(cls, run: str | Path) -> "SpiceClusterer":
        """Open a finished run, or a copy of its model folder, which has no `labels_`; UserError if it is neither."""
        _check_path("run", run)
        folder = artifacts.trained_model(Path(run))
        if folder == Path(run):
            model = cls()
            model._take_model(folder)
            return model
        finished = load(Path(run))
        model = cls(finished.num_clusters, run=run)
        return model._take_run(Path(run), finished.metrics)

    @_in_python()
    def fit(self, X: Data, y: Any = None) -> "SpiceClusterer":
        """Run the whole pipeline. UserError if the data or the settings cannot be used."""
        strict = self._is_strict()
        source = _source(X)
        if self.run is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="spice-")
            run = Path(self._temporary.name)
        else:
            _check_path("run", self.run)
            run = Path(self.run)
        clusters = AUTO if self.n_clusters == "auto" else self.n_clusters
        changes = {"clusters": clusters, "seed": self.seed, **(self.settings or {})}
        changes |= {"data.max_bad": 0.0} if strict else {}
        backbones = (self.backbone,) if isinstance(self.backbone, str) else tuple(self.backbone or ())
        weights = None if self.weights is None else str(self.weights)
        wish = Wish(self.recipe, backbones=backbones, weights=weights, changes=changes)
        resolved = resolve(source, wish, run)
        scores = fit(resolved.config, source, run, Launch(workers=self.workers), network=resolved.network)
        vars(self).pop("n_features_in_", None)  # of an earlier fit
        if isinstance(X, np.ndarray) and X.dtype == np.uint8:
            self.n_features_in_ = int(np.prod(X.shape[1:]))
        return self._take_run(run, scores, source.paths)

    def predict(self, X: Data) -> Int64[np.ndarray, " N"]:
        """The cluster of each image."""
        return _labels(self.predict_proba(X))

    @_in_python()
    def predict_proba(self, X: Data) -> Float[np.ndarray, "N K"]:
        """The probability of each cluster for each image, float32."""
        net, _ = self._fitted()
        return self._apply(X, net, lambda logits: logits.softmax(1), self.n_clusters_)

    @_in_python()
    def transform(self, X: Data) -> Float[np.ndarray, "N D"]:
        """Unit-norm float32 features of the trained network."""
        net, _ = self._fitted()
        return self._apply(X, net.backbone, unit, self._n_features_out)

    @_in_python()
    def score(self, X: Data, y: Any = None) -> float:
        """The silhouette of the predicted clusters, -1 to 1, higher is better; no labels are needed.

        By cosine distance of the features that `transform` gives, of 2,000 images at most.
        """
        net, _ = self._fitted()
        dim = self._n_features_out
        both = self._apply(
            X, net.backbone, lambda out: torch.cat([unit(out), net.logits(out)], 1), dim + self.n_clusters_
        )
        usable = both[~np.isnan(both[:, 0])]
        return metrics.silhouette(usable[:, :dim], usable[:, dim:].argmax(1), seed=self.seed)

    @_in_python(out="out")
    def report(self, out: str | Path) -> Path:
        """Write the HTML report to `out`; UserError if the run folder is gone, as that of a pickle may be."""
        check_is_fitted(self, "n_clusters_")
        if not hasattr(self, "run_"):
            raise UserError("a model folder alone has no report; load the run folder")
        return write_report(self.run_, Path(out))

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        text = super().__repr__(N_CHAR_MAX)
        if not hasattr(self, "labels_"):
            return text
        return f"{text}  # fitted: {len(self.labels_):,} images in {self.n_clusters_} clusters, {self.run_}"

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        tags.input_tags.string = True
        return tags

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name != "_temporary"}
        if "_model" in state:
            with tempfile.TemporaryDirectory(prefix="spice-") as folder:
                save_model(*self._model, Path(folder))
                state["_model"] = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_model" in state:
            with tempfile.TemporaryDirectory(prefix="spice-") as folder:
                for name in ("model.safetensors", "model.json"):
                    (Path(folder) / name).write_bytes(state["_model"][name])
                self._take_model(Path(folder))
        super().__setstate__({name: value for name, value in state.items() if name != "_model"})

    def _take_run(self, run: Path, scores: dict[str, Any], given: list[str] | None = None) -> "SpiceClusterer":
        """Become the result of a finished run; `given` are the names of all images, if some could not be used."""
        self.run_, self.metrics_ = run, scores
        stored = read_paths(artifacts.data(run))
        self.paths_ = stored if given is None else given
        place = _places(stored, self.paths_)
        cluster, confidence, _ = read_assignments(artifacts.assignments_file(run))
        self.labels_ = np.full(len(self.paths_), NO_CLUSTER)
        self.confidence_ = np.full(len(self.paths_), np.nan)
        self.labels_[place], self.confidence_[place] = cluster, confidence
        self._take_model(artifacts.model(run))
        return self

    def _take_model(self, folder: Path) -> None:
        self._model = net, task = load_model(folder, _device())
        dim: Any = net.backbone.dim
        self.n_clusters_, self._n_features_out = task.clusters, dim
        self.names_ = labels_of(folder, task.clusters)

    def _fitted(self) -> Any:
        """Return the network and its task; NotFittedError if there are none."""
        check_is_fitted(self, "n_clusters_")
        return self._model

    def _apply(
        self, X: Data, model: nn.Module, reduce: Callable[[Tensor], Tensor], width: int
    ) -> Float[np.ndarray, "N D"]:
        """Compute reduce(model(images)), a row for each image."""
        source = _source(X)
        result, reasons = predicting.apply(model, reduce, width, self._model[1], source, _device(), self._is_strict())
        if reasons:
            number, reason = next(iter(reasons.items()))
            example = f"{source.paths[number]!r} ({reason})"
            message = f"{len(reasons)} of {len(result)} images cannot be used and have no cluster, such as {example}"
            warnings.warn(message, stacklevel=4)
        if line := left_out_line(left_out(source.ignored, len(source.refused), 0), len(result)):
            warnings.warn(f"{line}; these have no row", stacklevel=4)
        return result

    def _is_strict(self) -> bool:
        if self.unreadable not in UNREADABLE:
            raise UserError(f"unreadable is {self.unreadable!r}; it can be {' or '.join(map(repr, UNREADABLE))}")
        return self.unreadable == "error"


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _labels(probabilities: Float[np.ndarray, "N K"]) -> Int64[np.ndarray, " N"]:
    return np.where(np.isnan(probabilities[:, 0]), NO_CLUSTER, np.nan_to_num(probabilities).argmax(1))


def _places(stored: list[str], given: list[str]) -> list[int]:
    """Return where each stored image is among those given, of which some may have been left out, in the same order."""
    ahead = iter(enumerate(given))
    return [next(i for i, name in ahead if name == wanted) for wanted in stored]


def _check_path(name: str, path: str | Path) -> None:
    if not str(path).strip():
        raise UserError(f'{name} is empty; give a path, or "." for the current folder')


def _source(X: Data) -> Source:
    if isinstance(X, str | Path):
        _check_path("X", X)
        one_image = is_image_name(Path(X).name) and Path(X).is_file()
        return from_files([X]) if one_image else open_data(str(X))
    X = np.asarray(X) if hasattr(X, "__array__") else X  # a tensor, a column of a table
    if isinstance(X, np.ndarray) and X.dtype.kind not in "OU":
        return from_array(X)
    images: list[Any] = list(X)
    return from_arrays(images) if images and isinstance(images[0], np.ndarray) else from_files(images)
