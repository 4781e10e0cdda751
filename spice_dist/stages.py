"""The stages of a run: a table of all stages, and the stages of every method in order.

A method is a file in `methods/` and a row of `TABLE`. Its name and title are in `catalog.py`, its settings in
`config.py`.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spice_dist import baselines, cost
from spice_dist.clustering import Clustering
from spice_dist.config import Config, flatten
from spice_dist.counting import Cost, Counting
from spice_dist.data.files import Progress
from spice_dist.data.ingest import require_fit
from spice_dist.data.manifest import Ingested
from spice_dist.data.sources import Source, listing
from spice_dist.errors import UserError
from spice_dist.methods import (
    byol,
    features,
    given_labels,
    graph_result,
    imc_swav,
    moco,
    reliable,
    scan,
    spice_graph,
    spice_result,
    spice_self,
    spice_self_joint,
    spice_semi,
    spice_tune,
    suggested,
)
from spice_dist.models.backbone import weights_fingerprint
from spice_dist.task import AUTO, check_task

LEAST_IMAGES = 4  # two groups of two
ImageList = Source | Ingested  # the images before and after packing
# settings that change no pixel, and files of weights, whose SHA-256 counts instead
HARMLESS = ("data.loader", "data.max_bad", "backbone.weights", "backbone.other_weights")


def never(config: Config, many: bool) -> bool:
    return False


def always(config: Config, many: bool) -> bool:
    return True


def if_many(config: Config, many: bool) -> bool:
    return many


@dataclass(frozen=True)
class Stage:
    """A part of a run that writes a folder of its name."""

    name: str
    train: Callable[[Any, Any, Any], None]  # train(task, settings, worker)
    settings: str = ""  # the field of Config with the stage's settings; "": it has none
    depends: tuple[str, ...] = ()  # other fields of Config that its result depends on, but no earlier stage's
    check: Callable[[Config, ImageList], None] = lambda config, images: None  # raises a UserError for what would fail
    cost: Callable[[Counting, Any], Cost] | None = None
    shared: Callable[[Config, bool], bool] = never  # whether several workers share it: (config, many images)
    clusters: bool = False  # a run can end after it, with a clustering
    # reads the clustering of this stage and those after it: (config, settings, run, device, progress, until)
    result: Callable[[Any, Any, Path, torch.device, Progress, str | None], Clustering] | None = None
    plain_loader: bool = False  # a small set is read without FFCV, whose reader takes longer to compile
    reads_labels: bool = False  # learns from true labels
    evaluation: tuple[str, ...] = ()  # settings that only the evaluation of its clusters reads

    def settings_in(self, config: Config) -> Any:
        return getattr(config, self.settings) if self.settings else None


def _train_heads(task: Config, settings: Any, worker: Any) -> None:
    spice_self_joint.loop_of(settings)(task, settings, worker)


def _check_given_labels(config: Config, images: ImageList) -> None:
    spice_semi.check(config, config.spice_semi)  # its refusals come before those of given labels
    given_labels.check(config, config.given_labels, config.spice_semi)
    if isinstance(images, Source):
        given_labels.draw(config, config.given_labels, images.labels, images.clustered, images.held_out)


PRETEXT = ("seed", "bn_groups", "precision", "pretext", "backbone")
# fmt: off
TABLE = (
    Stage(
        "moco", moco.train, "moco", depends=PRETEXT, cost=cost.moco, shared=always,
        check=lambda config, images: moco.check(config, config.moco, images.training),
    ),
    Stage(
        "byol", byol.train, "byol", depends=PRETEXT, cost=cost.byol, shared=always,
        check=lambda config, images: byol.check(config, config.byol, images.training),
    ),
    Stage(
        "features", features.embed, depends=("precision", "pretext", "backbone"), cost=cost.features, shared=if_many,
        plain_loader=True,
    ),
    Stage(
        "spice_self", _train_heads, "spice_self", depends=("seed", "clusters"), cost=cost.spice_self,
        shared=lambda config, many: many and not config.spice_self.encodes_anew, plain_loader=True, clusters=True,
        result=lambda config, settings, *run: spice_result.result(config, config.spice_semi, *run),
        check=lambda config, images: spice_self.check(config, config.spice_self, images.clustered),
    ),
    Stage("graph", spice_graph.find_neighbors, "graph", cost=cost.graph),
    Stage("suggest", suggested.suggest_clusters, depends=("seed",)),
    Stage(
        "spice_graph", partial(suggested.follow, spice_graph.train), "spice_graph", depends=("clusters",),
        cost=cost.spice_graph, clusters=True, result=graph_result.result,
        check=lambda config, images: spice_graph.check(config, config.spice_graph, config.graph, images.clustered),
    ),
    Stage(
        "reliable", partial(suggested.follow, reliable.select), "reliable", cost=cost.reliable, shared=if_many,
        clusters=True,
        check=lambda config, images: reliable.check(config.reliable),
    ),
    Stage(
        "given_labels", given_labels.give, "given_labels", depends=("seed", "clusters"), reads_labels=True,
        check=_check_given_labels,
        result=lambda config, settings, *run: given_labels.result(config, config.spice_semi, *run),
    ),
    Stage(
        "spice_semi", partial(suggested.follow, spice_semi.train), "spice_semi",
        depends=("bn_groups", "precision", "backbone"), cost=cost.spice_semi, shared=always, clusters=True,
        check=lambda config, images: spice_semi.check(config, config.spice_semi),
    ),
    Stage(
        "spice_tune", partial(suggested.follow, spice_tune.train), "spice_tune", depends=("bn_groups",),
        cost=cost.spice_tune, clusters=True,
        check=lambda config, images: spice_tune.check(config, config.spice_tune),
    ),
    Stage(
        "imc_swav", imc_swav.train, "imc_swav", depends=("clusters", *PRETEXT), cost=cost.imc_swav, shared=always,
        result=imc_swav.result, evaluation=("imc_swav.eval_bn",),
        check=lambda config, images: imc_swav.check(config, config.imc_swav, images.training, images.clustered),
    ),
    Stage(
        "scan", scan.train, "scan", depends=("seed", "clusters", "bn_groups"), cost=cost.scan, shared=always,
        clusters=True, result=scan.result,
        check=lambda config, images: scan.check(config, config.scan, images.clustered),
    ),
    Stage(
        "self_label", scan.self_label, "self_label", cost=cost.self_label, shared=always, clusters=True,
        check=lambda config, images: scan.check_self_label(config, config.self_label, images.clustered),
    ),
)
# fmt: on


def stages_of(config: Config) -> list[Stage]:
    """Return the stages of a run after the packing of its images, in order."""
    rows = {stage.name: stage for stage in TABLE}
    return [rows[name] for name in _names(config)]


def _names(config: Config) -> list[str]:
    features = [*([] if config.pretext == "none" else [config.pretext]), "features"]
    match config.method:
        case "spice":
            stage2 = ["spice_self"] if config.stage2 == "spice_self" else ["graph", "suggest", "spice_graph"]
            stage3 = [] if config.stage3 == "none" else [config.stage3]
            return [*features, *stage2, "reliable", *stage3]
        case "imc_swav":  # it is its own pretext, which learns features and clusters at once
            return features
        case "scan":
            return [*features, "scan", "self_label"]
        case "fixmatch" | "supervised":  # stage 3 alone, on true labels
            return ["given_labels", "spice_semi"]
        case method:  # a method of one stage, which has the same name
            return [*features, method]


def pretext_stages(config: Config) -> list[Stage]:
    """Return stage 1; none if the backbone is taken as it is."""
    return [stage for stage in stages_of(config) if stage.name == config.pretext]


def result_of(config: Config) -> Callable[[Path, torch.device, Progress, str | None], Clustering]:
    """Return the function that reads a run's result: called with the run, the device, progress and the last stage."""
    stage = _concluding(config)
    assert stage.result is not None
    return partial(stage.result, config, stage.settings_in(config))


def evaluation_settings(config: Config) -> dict[str, Any]:
    """Return the settings that only evaluation reads, by their last name as in metrics.json; None: not of this run."""
    read, values = _concluding(config).evaluation, flatten(config)
    names = [name for stage in TABLE for name in stage.evaluation]
    settings = {name.rpartition(".")[2]: values[name] if name in read else None for name in names}
    return settings | {"umap_baseline": config.umap_baseline and baselines.has_umap() or None}


def _concluding(config: Config) -> Stage:
    return [stage for stage in stages_of(config) if stage.result][-1]


def estimate(config: Config, training: int, clustered: int, workers: int = 1, passes: int = 1) -> dict[str, Cost]:
    """Estimate the costs of a run's stages, by name, in order; stages without a cost are left out.

    Args:
        training: images that train stages 1 and 3.
        clustered: images that are clustered.
        workers: processes that share the images of every step.
        passes: in how many forward passes each computes its share: one on a GPU, one per BatchNorm group on a CPU.
    """
    counting = Counting(config, training, clustered, workers * passes)
    costs = {stage.name: stage.cost(counting, stage.settings_in(config)) for stage in stages_of(config) if stage.cost}
    return {
        name: replace(cost, memory=cost.memory + counting.images) if any(work.seen for work in cost.work) else cost
        for name, cost in costs.items()
    }


def stage_settings(config: Config, source: Source, images: str = "", earlier: str = "") -> dict[str, dict[str, Any]]:
    """Collect for each stage what its result depends on: its own settings and those of the stages before it.

    Args:
        images: what identifies the images; default: `images_of`.
        earlier: what identifies the run that this one goes on from, if it does.
    """
    evaluation = {name for stage in TABLE for name in stage.evaluation}
    values = {name: value for name, value in flatten(config).items() if name not in HARMLESS and name not in evaluation}

    def under(*fields: str) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name.split(".")[0] in fields}

    depends = {"images": images or images_of(source)} | under("data")
    settings = {"data": dict(depends)}
    depends |= {"from": earlier} if earlier else {}
    depends["weights"] = weights_fingerprint(config.backbone)
    for stage in stages_of(config):
        if stage.reads_labels:
            depends["labels"] = _fingerprint(source.labels)
        depends |= under(*stage.depends, stage.settings)
        settings[stage.name] = dict(depends)
    return settings


def images_of(source: Source) -> str:
    """Identify a list of images by their number and the first digits of their digest."""
    return f"{len(source.paths)} images, {listing(source)[:16]}"


def _fingerprint(labels: np.ndarray | None) -> str:
    return hashlib.sha256(b"" if labels is None else labels.astype("<i8").tobytes()).hexdigest()[:16]


def check_settings(config: Config, images: ImageList, data: str) -> None:
    """Raise a UserError for settings with which the run would fail after hours of training."""
    check_task(config)
    require_fit(images, config.data.fit, data)
    if config.clusters != AUTO and config.clusters > images.clustered:
        raise UserError(
            f"--clusters is {config.clusters}, more than the {images.clustered} images of {data}; ask for fewer"
        )
    if images.clustered < LEAST_IMAGES:
        raise UserError(f"{images.clustered} images of {data} are too few to group: give {LEAST_IMAGES} or more")
    for stage in stages_of(config):
        stage.check(config, images)
