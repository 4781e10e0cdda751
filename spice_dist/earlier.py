"""A run that goes on from a finished one with other images: its weights, its features, its clusters' numbers and names.

What it takes of the earlier run is copied to `RUN/from`, so that the earlier one can be removed.
"""

import dataclasses
import shutil
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from spice_dist import artifacts
from spice_dist.assignments import read_assignments
from spice_dist.config import Config, read_config
from spice_dist.data import beton
from spice_dist.data.checksums import sha256
from spice_dist.data.files import Progress, publish, publish_json
from spice_dist.data.manifest import read_paths
from spice_dist.distributed import checkpoint
from spice_dist.errors import UserError
from spice_dist.inference import probabilities
from spice_dist.methods.plumbing import finished, open_run_dataset
from spice_dist.model_folder import load_model
from spice_dist.pseudo_labels import UNRELIABLE
from spice_dist.task import AUTO

SHARED = 10  # images for each cluster, by which clusters are recognised; of fewer, by the earlier model
PRETEXTS = ("none", "moco", "byol")


@dataclass(frozen=True)
class Earlier:
    """A finished run of SPICE."""

    run: Path
    config: Config
    clusters: int
    digest: str  # of its clusters


def open_earlier(run: Path, clusters: int | None = None) -> Earlier:
    """Read the run that another one goes on from.

    Args:
        clusters: the number that is asked for; None: as many as the earlier run has.

    Raises:
        UserError: it is not finished, or not of SPICE, or has more clusters than are asked for.
    """
    if not artifacts.config_file(run).exists():
        raise UserError(f"{str(run)!r} is no run; give --from the folder of a finished one")
    if not artifacts.metrics_file(run).exists():
        raise UserError(f"{run} is not finished; run its command to the end, then go on from it")
    config, before = read_config(artifacts.config_file(run)), artifacts.metrics(run)["k"]
    if config.method != "spice" or config.pretext not in PRETEXTS:
        kind = config.method if config.method != "spice" else f"SPICE on {config.pretext}"
        raise UserError(f"{run} is a run of {kind}; --from goes on from runs of SPICE on {', '.join(PRETEXTS)}")
    if artifacts.corrections_summary_file(run).exists() and artifacts.corrections_summary(run)["outside"] is not None:
        raise UserError(f"{run} has images outside of all groups, which --from cannot keep; give the run before them")
    if clusters is not None and (clusters == AUTO or clusters < before):
        asked = "auto" if clusters == AUTO else clusters
        raise UserError(f"--clusters is {asked}, but {run} has {before} clusters, which stay; give {before} or more")
    return Earlier(run, config, before, sha256(artifacts.assignments_file(run))[:16])


def carry_over(earlier: Earlier, config: Config, run: Path, device: torch.device, progress: Progress) -> None:
    """Copy to `run`, whose images are packed, what it goes on from, once."""
    if artifacts.earlier_labels_file(run).exists():
        return
    folder = artifacts.earlier_labels_file(run).parent
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tensors = _weights(earlier, config)
    if tensors:
        checkpoint.save(folder / "checkpoints", 1, tensors, {"total": 1})
    names = {str(cluster): name for cluster, name in artifacts.names(earlier.run).items()}
    publish_json(artifacts.earlier_clusters_file(run), {"clusters": earlier.clusters, "names": names})
    old = _shared_images(earlier.run, run)
    if _same_features(earlier.config, config):
        _copy_features(earlier.run, old, run)
    labels = np.where(old >= 0, read_assignments(artifacts.assignments_file(earlier.run))[0][old], UNRELIABLE)
    if (old >= 0).sum() < SHARED * earlier.clusters:
        labels = _predicted(earlier.run, run, device, progress)
    with publish(artifacts.earlier_labels_file(run)) as file:
        np.save(file, labels)


def _weights(earlier: Earlier, config: Config) -> dict[str, dict[str, Tensor]]:
    """Return the networks that stages begin with, where both runs have that stage and the networks are alike."""
    before, tensors = earlier.config, {}
    if config.pretext == before.pretext != "none" and config.backbone == before.backbone:
        tensors["backbone"] = finished(earlier.run / before.pretext).tensors("backbone")
    if config.stage2 == before.stage2 == "spice_self" and (earlier.run / "spice_self/checkpoints").is_dir():
        tensors["heads"] = finished(earlier.run / "spice_self").tensors("heads")
    return tensors


def _shared_images(before: Path, run: Path) -> Int[np.ndarray, " N"]:
    """Return for each image of `run` the index of the same image in the run before, by name and content; -1: none."""
    sums = [beton.verify(artifacts.packed_file(each)).crc32 for each in (before, run)]
    names = [read_paths(artifacts.data(each)) for each in (before, run)]
    if sums[0] is None or sums[1] is None:  # packed by another program
        return np.full(len(names[1]), -1)
    at = dict(zip(zip(names[0], sums[0].tolist(), strict=True), range(len(names[0])), strict=True))
    return np.array([at.get(key, -1) for key in zip(names[1], sums[1].tolist(), strict=True)], np.int64)


def _same_features(before: Config, config: Config) -> bool:
    """Tell whether an image that both runs have has the same features: the network is trained, and nothing differs."""
    loader = dataclasses.replace(config.data, loader=before.data.loader, max_bad=before.data.max_bad)
    alike = (before.backbone, before.data, before.precision) == (config.backbone, loader, config.precision)
    return alike and before.pretext == config.pretext == "none"


def _copy_features(before: Path, old: Int[np.ndarray, " N"], run: Path) -> None:
    known = np.flatnonzero(old >= 0)
    with publish(artifacts.earlier_features_file(run)) as file:
        np.save(file, artifacts.stored_features(before)[old[known]])
    with publish(artifacts.earlier_rows_file(run)) as file:
        np.save(file, known)
    if artifacts.mixture_file(before).exists():
        publish_json(artifacts.earlier_mixture_file(run), artifacts.mixture(before))


def _predicted(before: Path, run: Path, device: torch.device, progress: Progress) -> Int[np.ndarray, " N"]:
    net, task = load_model(artifacts.model(before), device)
    images, _ = open_run_dataset(task, run, device)
    with closing(images):
        return probabilities(net, images, task.backbone.statistics, progress, task.precision).argmax(1)
