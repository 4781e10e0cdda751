"""Score the clustering of a trial without labels, by the features that all trials share."""

from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spice_dist import artifacts, inference, metrics
from spice_dist.config import Config
from spice_dist.data.images import CHUNK
from spice_dist.distributed.checkpoint import Tensors
from spice_dist.losses import double_softmax_cross_entropy
from spice_dist.methods.plumbing import named, open_run_dataset
from spice_dist.methods.spice_self import head_outputs
from spice_dist.models.heads import ClusterHeads
from spice_dist.objectives import generalization
from spice_dist.pseudo_labels import UNRELIABLE, quotas, selection_loss
from spice_dist.sweep.records import Plan, Scores

STUDENTS = 4  # that learn from halves of the reliable labels, two from each random split
STUDENT_STEPS = 200


class Scorer:
    """Scores clusterings of the sweep's images by the features of the base run."""

    def __init__(self, plan: Plan, config: Config, device: torch.device):
        self.config, self.device, self.seed = config, device, plan.config.seed
        # losses on different features cannot be compared
        self.compares_losses = not plan.start.trains_backbone
        self.center_fraction = plan.config.spice_self.center_fraction
        self.prior = plan.config.spice_self.prior
        self.num_images = artifacts.manifest(plan.base).clustered
        self.reference = artifacts.stored_features(plan.base, self.num_images)

    def of_heads(
        self, folder: Path, heads: ClusterHeads, loss: Float[Tensor, " H"], features: Float[np.ndarray, "N D"]
    ) -> tuple[Int[np.ndarray, " N"], Scores]:
        """Return the clusters by the head of the lowest loss, and their scores; `folder` is that of the trial.

        `select_loss` uses the same loss and center fraction for all trials, whatever they were trained with.
        """
        seen = features if heads.raw is None else artifacts.head_features(folder)[: self.num_images]
        x, inputs = (torch.from_numpy(rows.astype(np.float32)).to(self.device) for rows in (features, seen))
        heads = heads.to(self.device)
        with torch.no_grad():
            by_head = torch.cat([heads(rows).argmax(2) for rows in inputs.split(CHUNK)], 1).cpu().numpy()
        chosen = int(loss.argmin())
        scores = self._of_clusters(by_head[chosen])
        if len(by_head) > 1:
            scores["agreement"] = metrics.agreement(by_head)
        if self.compares_losses:
            sizes = quotas(self.num_images, self.config.clusters, self.prior)
            head, share = heads.select(chosen), self.center_fraction
            with torch.no_grad():
                comparable = selection_loss(x, head_outputs(head, inputs), sizes, share, double_softmax_cross_entropy)
            scores["select_loss"] = float(comparable)
        return by_head[chosen], scores

    def of_labels(
        self, labels: Int[np.ndarray, " N"], features: Float[np.ndarray, "N D"]
    ) -> tuple[Int[np.ndarray, " N"], Scores]:
        """Return the clusters that students learn from reliable labels, and their scores: a small stage 3.

        Each student learns one half of the labels by a linear map of the frozen features; the clusters are their mean
        prediction of every image. Students of few or wrong labels disagree.

        Args:
            labels: UNRELIABLE where an image has none.
        """
        x = torch.from_numpy(features.astype(np.float32)).to(self.device)
        logits = students(x, torch.from_numpy(labels).to(self.device), self.config.clusters, self.seed)
        clusters = logits.softmax(2).mean(0).argmax(1).cpu().numpy()
        agreement = metrics.agreement(logits.argmax(2).cpu().numpy())
        reliable = float(np.mean(labels != UNRELIABLE))
        return clusters, self._of_clusters(clusters) | {"agreement": agreement, "reliable": reliable}

    def heads_at_rung(self, folder: Path, state: Tensors) -> Scores:
        """Score stage 2 in the middle of its training, from the state of a checkpoint."""
        heads = ClusterHeads.holding(named(state["select"], "best."))
        return self.of_heads(folder, heads, state["select"]["loss"], self.reference)[1]

    def backbone_at_rung(self, folder: Path, state: Tensors) -> Scores:
        """Score stage 1 in the middle of its training, by k-means on its features: a rough estimate for heads."""
        from sklearn.cluster import KMeans

        config = self.config
        images, _ = open_run_dataset(config, folder, self.device)
        with closing(images):
            features = inference.backbone_features(config, state["backbone"], images, self.device)[: self.num_images]
        model = KMeans(config.clusters, n_init=4, random_state=self.seed)  # pyright: ignore[reportArgumentType]
        return self._of_clusters(model.fit_predict(features))

    def _of_clusters(self, clusters: Int[np.ndarray, " N"]) -> Scores:
        sizes = metrics.cluster_sizes(clusters, self.config.clusters)
        return {
            "generalization": generalization(self.reference, clusters, self.config.clusters, self.seed),
            "silhouette": metrics.silhouette(self.reference, clusters, seed=self.seed),
            "nonempty": float((sizes > 0).sum()),
            "size_entropy": metrics.size_entropy(clusters, self.config.clusters),
        }


def students(
    features: Float[Tensor, "N D"], labels: Int[Tensor, " N"], clusters: int, seed: int
) -> Float[Tensor, "S N K"]:
    """Return the logits of STUDENTS linear heads for all images, each trained on its half of the labelled images."""
    labelled = (labels != UNRELIABLE).nonzero()[:, 0].cpu()
    torch.manual_seed(seed)
    heads = ClusterHeads(STUDENTS, features.shape[1], clusters, layers=1).to(features.device)
    orders = [labelled[torch.randperm(len(labelled))] for _ in range(STUDENTS // 2)]
    size = max(1, len(labelled) // 2)
    # (S, size)
    halves = torch.stack([half for order in orders for half in (order[:size], order[-size:])]).to(features.device)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.05)
    batch = min(size, 256)
    for _ in range(STUDENT_STEPS):
        rows = halves[:, torch.randint(size, (batch,))]
        logits = heads(features[rows])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return torch.cat([heads(rows) for rows in features.split(CHUNK)], 1)
