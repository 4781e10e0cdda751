"""Measure how well the features of each kept checkpoint of stage 1 separate the true classes, for scores only.

Probes are weighted kNN (Wu, Xiong, Yu and Lin 2018), a linear classifier on frozen features, and k-means. They need no
stage after the first, so that a run can be probed while it trains.
"""

import json
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float16, Int
from torch import Tensor

from spice_dist import artifacts, metrics
from spice_dist.baselines import kmeans
from spice_dist.data.checksums import require_whole
from spice_dist.data.dataset import DataConfig
from spice_dist.data.files import Progress, publish_json
from spice_dist.data.manifest import Ingested
from spice_dist.distributed import checkpoint
from spice_dist.errors import DamagedFile, UserError
from spice_dist.inference import backbone_features
from spice_dist.methods.plumbing import open_run_dataset
from spice_dist.models.backbone import BackboneConfig
from spice_dist.neighbors import search
from spice_dist.task import Task

KINDS = ("knn", "kmeans", "linear")
NO_LABEL = -1
CHUNK = 4096  # test images whose votes are counted at a time


def knn_accuracy(
    train: Float[Tensor, "N D"], train_labels: Int[np.ndarray, " N"],
    test: Float[Tensor, "M D"], test_labels: Int[np.ndarray, " M"],
    *, k: int = 200, temperature: float = 0.1,
) -> float:  # fmt: skip
    """Return the share of test images whose class wins the vote of their k nearest train images (all, if fewer).

    Features are of unit norm, on one device; a neighbour's vote weighs exp(cosine / temperature). Memory is that of
    `neighbors.search`, never M x N. ValueError for k or a temperature that is not above 0.
    """
    return _knn(train, train_labels, test, test_labels, k, temperature, leave_one_out=False)


def knn_accuracy_leave_one_out(
    features: Float[Tensor, "N D"], labels: Int[np.ndarray, " N"],
    *, k: int = 200, temperature: float = 0.1,
) -> float:  # fmt: skip
    """Return `knn_accuracy` of a set of at least 2 images on itself: every image is classified by the others."""
    return _knn(features, labels, features, labels, k, temperature, leave_one_out=True)


def linear_probe(
    train: Float[np.ndarray, "N D"], train_labels: Int[np.ndarray, " N"],
    test: Float[np.ndarray, "M D"], test_labels: Int[np.ndarray, " M"],
) -> float:  # fmt: skip
    """Return the test accuracy of multinomial logistic regression on features standardised by the train part.

    The L2 penalty is scikit-learn's C = 1: to choose it would take labels from the train part.
    ValueError if the train part has fewer than two classes.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=1000))
    model.fit(train.astype(np.float32), train_labels)
    return float(model.score(test.astype(np.float32), test_labels))


def linear_probe_split(features: Float[np.ndarray, "N D"], labels: Int[np.ndarray, " N"], *, seed: int = 0) -> float:
    """Return `linear_probe` where nothing is held out: trained on a random 80 % of every class, tested on the rest.

    A class's only image goes to the train part. ValueError if there is no class with two.
    """
    # by hand: scikit-learn's train_test_split(stratify=...) refuses a class of one image
    order = np.random.default_rng(seed).permutation(len(labels))
    members = [order[labels[order] == name] for name in np.unique(labels)]
    cuts = [max(1, len(group) * 4 // 5) for group in members]
    train = np.concatenate([group[:cut] for group, cut in zip(members, cuts, strict=True)])
    test = np.concatenate([group[cut:] for group, cut in zip(members, cuts, strict=True)])
    if not len(test):
        raise ValueError("every class has one image only, so that none is left to test")
    return linear_probe(features[train], labels[train], features[test], labels[test])


def probe_checkpoints(
    run: Path, kinds: Sequence[str], device: torch.device, progress: Progress = lambda done, total: None
) -> list[dict[str, Any]]:
    """Return {"step", "knn", "kmeans", "linear"} of each kept checkpoint of stage 1, oldest first.

    The rows are also written to `run/probes.json`; kinds that are not in `kinds` are None. Probes are trained on the
    clustered images and tested on the held-out ones; where there are none, kNN leaves one out, the linear probe splits
    and k-means scores the images it was fitted on. A run without stage 1 (pretext "none") has one row, step 0, of its
    features. `progress` counts images over all checkpoints.

    Raises:
        UserError: no run, no labels, nothing to probe, or an unknown kind.
    """
    if unknown := set(kinds) - set(KINDS):
        raise UserError(f"there is no probe {min(unknown)!r}; there are {', '.join(KINDS)}")
    task, pretext = _settings(run)
    known = _labelled(run)
    if pretext == "none":
        features = _features_of(run)
        rows = [{"step": 0, **_probe(features, known, task, kinds, device)}]
    else:
        saved = _kept_backbones(run / pretext / "checkpoints")
        images, _ = open_run_dataset(task, run, device)
        rows = []
        with closing(images):
            for number, (step, weights) in enumerate(saved):
                start, total = number * images.n, len(saved) * images.n
                shown = partial(_show, progress, start, total)
                features = backbone_features(task, weights, images, device, shown)
                rows.append({"step": step, **_probe(features, known, task, kinds, device)})
    publish_json(artifacts.probes_file(run), rows)
    return rows


def _show(progress: Progress, start: int, total: int, done: int, _: int) -> None:
    progress(start + done, total)


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Format a table with one row per checkpoint and one column per requested kind."""
    kinds = [kind for kind in KINDS if rows[0][kind] is not None]
    lines = [f"{'step':>9}" + "".join(f"{kind:>9}" for kind in kinds)]
    return "\n".join(lines + [f"{row['step']:>9}" + "".join(f"{row[kind]:9.3f}" for kind in kinds) for row in rows])


@dataclass(frozen=True)
class Labelled:
    """The true labels of a run, and which images have one."""

    manifest: Ingested
    labels: Int[np.ndarray, " N"]
    train: Int[np.ndarray, " A"]  # indices of clustered images
    test: Int[np.ndarray, " B"] | None  # of held-out ones; None if nothing is held out


def _labelled(run: Path) -> Labelled:
    if not artifacts.manifest_file(run).exists():
        raise UserError(f"{run} has not packed its images yet; wait for fit to begin stage 1")
    labels = artifacts.true_labels(run)
    if labels is None:
        raise UserError(f"{run} has no true labels to probe with; run its fit command again with --labels")
    manifest = artifacts.manifest(run)
    has_label = np.flatnonzero(labels != NO_LABEL)
    train = has_label[has_label < manifest.clustered]
    test = has_label[has_label >= manifest.n - manifest.held_out] if manifest.held_out else None
    if len(np.unique(labels[train])) < 2 or (test is not None and not len(test)):
        raise UserError(f"{run} has too few images with a true label: a probe needs two classes and something to test")
    return Labelled(manifest, labels, train, test)


def _settings(run: Path) -> tuple[Task, str]:
    """Read the settings of the run, and the name of its stage 1."""
    path = artifacts.config_file(run)
    try:
        config = json.loads(require_whole(path).read_bytes())["config"]
        backbone: dict[str, Any] = {
            name: tuple(x) if isinstance(x, list) else x for name, x in config["backbone"].items()
        }
        task = Task(
            clusters=config["clusters"],
            seed=config["seed"],
            data=DataConfig(**config["data"]),
            precision=config["precision"],
            pretext=config["pretext"],
            backbone=BackboneConfig(**backbone),
        )
        return task, task.pretext
    except FileNotFoundError as error:
        raise UserError(f"{run} is no run folder: it has no config.json; give the --out of a fit command") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(f"{path} is damaged or of another version ({error})") from error


def _features_of(run: Path) -> Float16[np.ndarray, "N D"]:
    path = artifacts.features_file(run)
    if not path.exists():
        raise UserError(f"{run} has no features to probe yet; wait for fit to finish them")
    return artifacts.stored_features(run)


def _kept_backbones(store: Path) -> list[tuple[int, dict[str, Tensor]]]:
    """Read (step, weights) of every valid checkpoint, oldest first.

    All are read before the first is used, because a running process drops its old ones; none is set aside, because
    the folder may belong to another process.
    """
    backbones = []
    for path in sorted((path for path in store.glob("*") if path.name.isdecimal()), key=lambda path: int(path.name)):
        try:
            saved = checkpoint.load(path)
            backbones.append((saved.step, saved.tensors("backbone")))
        except (DamagedFile, FileNotFoundError) as error:
            if path.exists():
                warnings.warn(f"{error}; it is left out", stacklevel=2)
    if not backbones:
        raise UserError(f"{store} has no checkpoint to probe yet; the first comes after a minute of stage 1")
    return backbones


def _probe(
    features: Float16[np.ndarray, "N D"], known: Labelled, task: Task, kinds: Sequence[str], device: torch.device
) -> dict[str, float | None]:
    probes = {
        "knn": lambda: _probe_knn(features, known, device),
        "kmeans": lambda: _probe_kmeans(features, known, task),
        "linear": lambda: _probe_linear(features, known, task.seed),
    }
    return {kind: probes[kind]() if kind in kinds else None for kind in KINDS}


def _probe_knn(features: Float16[np.ndarray, "N D"], known: Labelled, device: torch.device) -> float:
    # float32 once: the search would convert all of them again for every chunk of images
    train, train_labels = torch.from_numpy(features[known.train]).to(device).float(), known.labels[known.train]
    if known.test is None:
        return knn_accuracy_leave_one_out(train, train_labels)
    test = torch.from_numpy(features[known.test]).to(device).float()
    return knn_accuracy(train, train_labels, test, known.labels[known.test])


def _probe_kmeans(features: Float16[np.ndarray, "N D"], known: Labelled, task: Task) -> float:
    clusters = kmeans(known.manifest, task, lambda index: features[index].astype(np.float32))
    scored = known.train if known.test is None else known.test
    return metrics.accuracy(known.labels[scored], clusters[scored])


def _probe_linear(features: Float16[np.ndarray, "N D"], known: Labelled, seed: int) -> float:
    train, train_labels = features[known.train], known.labels[known.train]
    if known.test is None:
        try:
            return linear_probe_split(train, train_labels, seed=seed)
        except ValueError as error:
            raise UserError(f"no linear probe: {error}") from error
    return linear_probe(train, train_labels, features[known.test], known.labels[known.test])


def _knn(
    train: Float[Tensor, "N D"], train_labels: Int[np.ndarray, " N"],
    test: Float[Tensor, "M D"], test_labels: Int[np.ndarray, " M"],
    k: int, temperature: float, leave_one_out: bool,
) -> float:  # fmt: skip
    k = min(k, len(train) - leave_one_out)
    if k < 1 or temperature <= 0:
        raise ValueError(f"k is {k} and temperature {temperature}; both must be above 0")
    classes, ids = np.unique(train_labels, return_inverse=True)
    ids = torch.from_numpy(ids).to(train.device)
    right = 0
    for start in range(0, len(test), CHUNK):
        rows = test[start : start + CHUNK]
        itself = torch.arange(start, start + len(rows), device=train.device) if leave_one_out else None
        cosines, nearest = search(train, rows, k, itself)
        weights = ((cosines - cosines[:, :1]) / temperature).exp()  # relative to the best: cannot overflow
        votes = weights.new_zeros(len(rows), len(classes)).scatter_add_(1, ids[nearest], weights)
        predicted = classes[votes.argmax(1).cpu().numpy()]
        right += int((predicted == test_labels[start : start + CHUNK]).sum())
    return right / len(test)
