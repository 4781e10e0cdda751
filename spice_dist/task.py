"""What every stage has to know: the images, the number of clusters, the network, the seed."""

from dataclasses import dataclass

from spice_dist import catalog
from spice_dist.data.dataset import DataConfig
from spice_dist.errors import UserError
from spice_dist.models.backbone import BackboneConfig
from spice_dist.settings import check_ranges, setting

PRECISIONS = ("auto", "bf16", "fp32")
AUTO = 0  # clusters: as many as the features suggest


@dataclass(frozen=True)
class Task:
    clusters: int = setting(10, "K; from 2 up, or 0: as many as the features suggest, with stage2 spice_graph", least=0)
    seed: int = setting(0, "of all random numbers", least=0)
    bn_groups: int = setting(4, "BatchNorm groups of the global batch; the number of workers divides it", above=0)
    precision: str = setting("auto", "of the networks; auto: bf16 on a GPU that has it, else fp32", choices=PRECISIONS)
    compile_views: bool = setting(False, "a GPU runs the operations of views fused by torch.compile")
    method: str = setting(
        "spice",
        "imc_swav is one stage, its pretext; fixmatch and supervised learn from some true labels",
        choices=catalog.METHODS,
    )
    pretext: str = setting("moco", "stage 1; none: the backbone's weights as they are", choices=catalog.PRETEXTS)
    stage2: str = setting(
        "spice_self",
        "of SPICE: as published, or spice_graph: from the neighbours of a trained network",
        choices=catalog.STAGES2,
    )
    stage3: str = setting(
        "spice_semi", "of SPICE: the whole network, spice_tune: its last blocks, or none", choices=catalog.STAGES3
    )
    umap_baseline: bool = setting(
        False, "compare the result also with k-means of UMAP's map of the features: minutes, where UMAP is installed"
    )
    data: DataConfig = setting(DataConfig(), "the images")
    backbone: BackboneConfig = setting(BackboneConfig(), "the network that makes features")


def require_positive(group: str, **values: float) -> None:
    """UserError naming the first setting that is not above zero."""
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{group + '.' if group else ''}{name} is {value}; it must be above 0")


def check_task(task: Task) -> None:
    """UserError naming the first setting of these that is out of range."""
    check_ranges("", task, "bn_groups", "precision", "method", "pretext", "stage2", "stage3")
    check_ranges("data", task.data, "fit", "grey_bits", "max_megapixels", "max_bad")
    if task.method == "imc_swav" != task.pretext:
        raise UserError(f'method "imc_swav" learns features by itself, not by pretext "{task.pretext}": leave that out')
    if task.seed < 0:
        raise UserError(f"--seed is {task.seed}; give 0 or more")
    if task.method in catalog.USING_LABELS and task.pretext != "none":
        raise UserError(f'method "{task.method}" has no stage 1: leave pretext "{task.pretext}" out')
    if task.pretext == "none" and not task.backbone.weights and task.method not in catalog.USING_LABELS:
        raise UserError(
            'pretext is "none", and the backbone has no weights to go on with: give --backbone NAME --weights timm, '
            "--weights FILE, or a pretext"
        )
    if task.backbone.intermediate and task.pretext != "none":
        raise UserError(
            f'backbone.intermediate is for weights as they are, not for pretext "{task.pretext}": leave it out'
        )
    if task.clusters == AUTO and task.method == "spice" and task.stage2 == "spice_graph":
        return
    if task.clusters == AUTO:
        raise UserError("--clusters auto is for the recipe photos and SPICE; give --clusters, a whole number from 2 up")
    if task.clusters < 2:
        raise UserError(f"--clusters is {task.clusters}; a clustering needs at least 2")
