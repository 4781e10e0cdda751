"""What stage 2 left in a run folder: its heads, the features that these were made for, its network."""

from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from spice_dist.methods import spice_graph
from spice_dist.methods.plumbing import finished, load_backbone, named
from spice_dist.models.heads import ClusterHeads, ClusterNet
from spice_dist.task import Task


def load_heads(run: Path) -> tuple[ClusterHeads, Float[Tensor, " H"]]:
    """Load every head of its best epoch, and their label-free losses; the head of the lowest loss is selected."""
    saved = finished(run / "spice_self").tensors("select")
    return ClusterHeads.holding(named(saved, "best.")), saved["loss"]


def stage2_network(task: Task, run: Path) -> ClusterNet:
    """Load the network of stage 2: the backbone, changed or not, with the selected or the consensus' head."""
    if task.stage2 == "spice_graph":
        return spice_graph.network(task, run)
    backbone = load_backbone(task, run)
    if changed := named(finished(run / "spice_self").tensors("select"), "backbone."):
        backbone.load_state_dict(changed)
    heads, loss = load_heads(run)
    return ClusterNet(backbone, heads.select(int(loss.argmin())))
