"""What every stage has to know: the images, the number of clusters, the network, the seed."""

from dataclasses import dataclass, field

from spice_dist.data.dataset import DataConfig
from spice_dist.errors import UserError
from spice_dist.models.backbone import BackboneConfig


@dataclass(frozen=True)
class Task:
    clusters: int = 10  # K
    seed: int = 0
    bn_groups: int = 4  # BatchNorm groups of the global batch; the number of workers divides it
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)


def require_positive(group: str, **values: float) -> None:
    """UserError naming the first setting that is not above zero."""
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{group + '.' if group else ''}{name} is {value}; it must be above 0")
