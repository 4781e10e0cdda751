"""The files of a run folder: where each of them is, and how it is read.

What is read here is compared with its recorded SHA-256 first; DamagedFile if it differs.

True labels are read by `true_labels` alone. Only evaluate.py, probes.py and methods/given_labels.py may call it.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float16, Int

from spice_dist.data.checksums import require_whole
from spice_dist.data.manifest import Ingested, read_manifest
from spice_dist.errors import DamagedFile, UserError


def data(run: Path) -> Path:
    """The folder of the packed images."""
    return run / "data"


def manifest_file(run: Path) -> Path:
    return run / "data/manifest.json"


def manifest(run: Path) -> Ingested:
    """What the packed images are."""
    return read_manifest(data(run))


def quarantine_file(run: Path) -> Path:
    """The images that could not be read, with reasons."""
    return run / "data/quarantine.csv"


def packed_file(run: Path) -> Path:
    return run / "data/dataset.beton"


def paths_file(run: Path) -> Path:
    """The names of the images: a JSON string a line."""
    return run / "data/paths.jsonl"


def true_labels_file(run: Path) -> Path:
    return run / "data/labels.npy"


def true_labels(run: Path) -> Int[np.ndarray, " N"] | None:
    """None where the data has none."""
    path = require_whole(true_labels_file(run))
    return _array(path) if path.exists() else None


def class_names_file(run: Path) -> Path:
    """The names of the true classes, in the order of their number: a JSON list."""
    return run / "data/classes.json"


def class_names(run: Path) -> dict[int, str]:
    """By number; empty where an older run has noted none."""
    path = require_whole(class_names_file(run))
    return dict(enumerate(json.loads(path.read_text()))) if path.exists() else {}


def features_file(run: Path) -> Path:
    return run / "features/features.npy"


def stored_features(run: Path, count: int | None = None) -> Float16[np.ndarray, "N D"]:
    """The unit-norm features of the first `count` images, or of all, memory-mapped."""
    return _array(features_file(run), "r")[:count]


def features(run: Path, count: int | None = None) -> Float[np.ndarray, "N D"]:
    """As `stored_features`, in memory and float32."""
    return stored_features(run, count).astype(np.float32)


def mixture_file(run: Path) -> Path:
    """How a middle stage's features stand beside the final ones."""
    return run / "features/mixture.json"


def mixture(run: Path) -> dict[str, Any]:
    return _object(mixture_file(run))


def stage2_features_file(run: Path) -> Path:
    """Features that stage 2 has made; only where it has changed the backbone."""
    return run / "spice_self/features.npy"


def head_features_file(run: Path) -> Path:
    """The features that the heads of stage 2 are for: those of stage 1, unless the backbone has changed."""
    path = stage2_features_file(run)
    return path if path.exists() else features_file(run)


def head_features(run: Path) -> Float16[np.ndarray, "N D"]:
    """Memory-mapped."""
    return _array(head_features_file(run), "r")


def earlier_labels_file(run: Path) -> Path:
    """Of a run that goes on from an earlier one."""
    return run / "from/assignments.npy"


def earlier_labels(run: Path) -> Int[np.ndarray, " N"] | None:
    """The earlier run's cluster of each image, UNRELIABLE where it has none; None where there is no earlier run."""
    path = earlier_labels_file(run)
    return _array(path) if path.exists() else None


def earlier_clusters_file(run: Path) -> Path:
    """How many clusters the earlier run has, and their names."""
    return run / "from/clusters.json"


def earlier_clusters(run: Path) -> tuple[int, dict[str, str]]:
    about = _object(earlier_clusters_file(run))
    return about["clusters"], about["names"]


def earlier_rows_file(run: Path) -> Path:
    """Which images have the features in `earlier_features_file`; only where the network is the same."""
    return run / "from/rows.npy"


def earlier_features_file(run: Path) -> Path:
    return run / "from/features.npy"


def earlier_features(run: Path) -> tuple[Int[np.ndarray, " M"], Float16[np.ndarray, "M D"]] | None:
    """The images whose features an earlier run has, and these features, memory-mapped; None where there are none."""
    if not earlier_rows_file(run).exists():
        return None
    return _array(earlier_rows_file(run)), _array(earlier_features_file(run), "r")


def earlier_mixture_file(run: Path) -> Path:
    """As `mixture_file`, of the earlier features."""
    return run / "from/mixture.json"


def earlier_mixture(run: Path) -> dict[str, Any]:
    return _object(earlier_mixture_file(run))


def neighbors_file(run: Path) -> Path:
    return run / "graph/neighbors.npy"


def neighbors(run: Path) -> Int[np.ndarray, "M S"]:
    """Of each clustered image the nearest others, nearest first."""
    return _array(neighbors_file(run))


def graph_starts_file(run: Path) -> Path:
    """The clusterings that stage 2 on the neighbour graph starts from."""
    return run / "spice_graph/start.npy"


def graph_starts(run: Path) -> Int[np.ndarray, "H M"]:
    return _array(graph_starts_file(run))


def posterior(run: Path) -> Float[np.ndarray, "M K"]:
    """The probabilities of the clusters of each clustered image, by stage 2 on the neighbour graph, memory-mapped."""
    return _array(run / "spice_graph/posterior.npy", "r")


def suggestion_file(run: Path) -> Path:
    return run / "suggest/suggestion.json"


def suggestion(run: Path) -> dict[str, Any] | None:
    """None where the run has none."""
    path = suggestion_file(run)
    return _object(path) if require_whole(path).exists() else None


def reliable_labels_file(run: Path) -> Path:
    return run / "reliable/labels.npy"


def reliable_labels(run: Path) -> Int[np.ndarray, " N"]:
    """UNRELIABLE where an image has none."""
    return _array(reliable_labels_file(run))


def reliable_summary_file(run: Path) -> Path:
    return run / "reliable/summary.json"


def reliable_summary(run: Path) -> dict[str, Any]:
    return _object(reliable_summary_file(run))


def tuning_summary_file(run: Path) -> Path:
    return run / "spice_tune/summary.json"


def given_labels_file(run: Path) -> Path:
    return run / "given_labels/labels.npy"


def given_labels(run: Path) -> Int[np.ndarray, " N"]:
    """Labels that the method was given, UNRELIABLE for every other image."""
    return _array(given_labels_file(run))


def config_file(run: Path) -> Path:
    return run / "config.json"


def metrics_file(run: Path) -> Path:
    return run / "metrics.json"


def metrics(run: Path) -> dict[str, Any]:
    return _object(metrics_file(run))


def stage_scores_file(run: Path, stage: str) -> Path:
    return run / stage / "eval.json"


def head_selection_file(run: Path) -> Path:
    return run / "spice_self/head_selection.jsonl"


def assignments_file(run: Path) -> Path:
    return run / "assignments.csv"


def levels_file(run: Path) -> Path:
    return run / "levels.csv"


def model(run: Path) -> Path:
    """The folder of the trained model."""
    return run / "model"


def card_file(run: Path) -> Path:
    """What the model is, for people: it goes with the model."""
    return run / "model/README.md"


def trained_model(folder: Path) -> Path:
    """Return the model folder of the run `folder`, or `folder` if it is a model itself; UserError if it is neither."""
    for place in (model(folder), folder):
        if (place / "model.json").is_file():
            return place
    raise UserError(f"{str(folder)!r} holds no model; give the folder of a finished run, or a copy of its model folder")


def names_file(run: Path) -> Path:
    """The names that the user gave to clusters: an object, cluster number -> name. It goes with the model."""
    return run / "model/names.json"


def names(run: Path) -> dict[int, str]:
    """Empty where no cluster has a name."""
    return model_names(model(run))


def model_names(folder: Path) -> dict[int, str]:
    """As `names`, of a model folder; DamagedFile if the file is not such an object."""
    path = folder / "names.json"
    try:
        return {int(cluster): str(name) for cluster, name in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise DamagedFile(f'{path} holds no names ({error}): make it an object such as {{"3": "dresses"}}') from error


def edits_file(run: Path) -> Path:
    """The corrections that this run was made with by `spice-dist apply`."""
    return run / "edits.json"


def corrected_posterior_file(run: Path) -> Path:
    """The probabilities (M, K) of the groups of each clustered image after corrections."""
    return run / "corrections/posterior.npy"


def corrected_posterior(run: Path) -> Float[np.ndarray, "M K"]:
    return _array(corrected_posterior_file(run)).astype(np.float64)


def fixed_groups_file(run: Path) -> Path:
    """The group (M,) of each clustered image that the user fixed, UNRELIABLE for all others."""
    return run / "corrections/fixed.npy"


def fixed_groups(run: Path) -> Int[np.ndarray, " M"]:
    return _array(fixed_groups_file(run))


def pairs_file(run: Path) -> Path:
    """Two images and whether they are of one group (1) or of two (0), (P, 3)."""
    return run / "corrections/pairs.npy"


def pairs(run: Path) -> Int[np.ndarray, "P 3"]:
    return _array(pairs_file(run))


def corrections_summary_file(run: Path) -> Path:
    """What changed, and which group holds the images outside of all."""
    return run / "corrections/summary.json"


def corrections_summary(run: Path) -> dict[str, Any]:
    return _object(corrections_summary_file(run))


def duplicates_file(run: Path) -> Path:
    return run / "duplicates.csv"


def outliers_file(run: Path) -> Path:
    return run / "outliers.csv"


def probes_file(run: Path) -> Path:
    return run / "probes.json"


def report_file(run: Path) -> Path:
    return run / "report.html"


def map_file(run: Path) -> Path:
    """Where the images lie on the report's map."""
    return run / "report/map.npz"


def sweep_file(folder: Path) -> Path:
    """Of the folder of a sweep: its settings."""
    return folder / "sweep.json"


def best_file(folder: Path) -> Path:
    """Of the folder of a sweep: the configuration of its best trial."""
    return folder / "best.json"


def _array(path: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    try:
        return np.load(require_whole(path), mmap_mode=mmap_mode, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DamagedFile(f"{path} is damaged ({error}); run the command that made it again") from error


def _object(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(require_whole(path).read_bytes()))
    except (ValueError, TypeError) as error:
        raise DamagedFile(f"{path} is damaged ({error}); run the command that made it again") from error
