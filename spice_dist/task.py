"""What every stage has to know: the images, the number of clusters, the network, the seed."""

from dataclasses import dataclass, field

from spice_dist import catalog
from spice_dist.data.dataset import DataConfig
from spice_dist.errors import UserError
from spice_dist.models.backbone import BackboneConfig

PRECISIONS = ("auto", "bf16", "fp32")
AUTO = 0  # clusters: as many as the features suggest


@dataclass(frozen=True)
class Task:
    clusters: int = 10  # K; AUTO: as many as the features suggest, with stage2 "spice_graph"
    seed: int = 0
    bn_groups: int = 4  # BatchNorm groups of the global batch; the number of workers divides it
    precision: str = "auto"  # of the networks: "bf16", "fp32", or "auto": bf16 on a GPU, fp32 on a CPU
    method: str = "spice"  # or "scan"; "imc_swav", whose one stage is its pretext; or one of catalog.USING_LABELS
    pretext: str = "moco"  # stage 1: "moco", "byol", "imc_swav", or "none": the backbone's weights as they are
    stage2: str = "spice_self"  # of SPICE: as published, or "spice_graph": from the neighbours of a trained network
    stage3: str = "spice_semi"  # of SPICE: the whole network, "spice_tune": its last blocks, or "none"
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)


def require_positive(group: str, **values: float) -> None:
    """UserError naming the first setting that is not above zero."""
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{group + '.' if group else ''}{name} is {value}; it must be above 0")


def check_task(task: Task) -> None:
    """UserError naming the first setting of these that is out of range."""
    require_positive("", bn_groups=task.bn_groups)
    choices_of = {
        "precision": PRECISIONS,
        "method": catalog.METHODS,
        "pretext": catalog.PRETEXTS,
        "stage2": catalog.STAGES2,
        "stage3": catalog.STAGES3,
    }
    for name, choices in choices_of.items():
        if (value := getattr(task, name)) not in choices:
            raise UserError(f'{name} is "{value}"; it can be {", ".join(choices)}')
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
