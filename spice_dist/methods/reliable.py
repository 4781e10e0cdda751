"""Between stages 2 and 3: which labels of SPICE-Self are reliable enough to teach the whole network (III-C, eqs. 6-7).

An image is reliable when nearly all of its nearest neighbours, in the features of stage 1, carry its label.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from spice_dist.data.files import Progress, publish, publish_json
from spice_dist.data.ingest import read_manifest
from spice_dist.methods.spice_self import load_heads
from spice_dist.neighbors import label_agreement, nearest
from spice_dist.pseudo_labels import UNRELIABLE, reliable_images
from spice_dist.task import Task


@dataclass(frozen=True)
class ReliableConfig:
    neighbors: int = 100  # N_s, the image itself included; at most N / K, or no cluster could fill it
    ratio: float = 0.95  # lambda, share of neighbours that must agree
    min_confidence: float = 0.0  # smallest probability of the label; the published code asks for 0.99
    floor_fraction: float = 0.1  # every cluster keeps its best-agreeing images up to this share; 0 is the paper's rule


@torch.no_grad()
def select(task: Task, config: ReliableConfig, run: Path, device: torch.device, progress: Progress) -> None:
    """Leaves `reliable/labels.npy` (N,) int64, -100 where not reliable, and `reliable/summary.json`."""
    manifest = read_manifest(run / "data")
    features = np.load(run / "features/features.npy", mmap_mode="r")[: manifest.clustered]
    features = torch.from_numpy(features.astype(np.float32)).to(device)
    heads, loss = load_heads(run)
    probs = heads.select(int(loss.argmin())).to(device)(features)[0].softmax(1)
    confidence, labels = probs.max(1)

    count = max(2, min(config.neighbors, len(features) // task.clusters))
    agreement = label_agreement(labels, nearest(features, count, progress=progress))
    by_rule = reliable_images(labels, agreement, confidence, task.clusters, config.ratio, config.min_confidence, 0.0)
    kept = reliable_images(
        labels, agreement, confidence, task.clusters, config.ratio, config.min_confidence, config.floor_fraction
    )

    (run / "reliable").mkdir(exist_ok=True)
    everywhere = np.full(manifest.n, UNRELIABLE)  # images that are not clustered teach no label
    everywhere[: manifest.clustered] = torch.where(kept, labels, UNRELIABLE).cpu().numpy()
    with publish(run / "reliable/labels.npy") as file:
        np.save(file, everywhere)
    sizes = torch.bincount(labels, minlength=task.clusters)
    publish_json(
        run / "reliable/summary.json",
        {
            **asdict(config),
            "neighbors": count,
            "count": int(kept.sum()),
            "by_rule": int(by_rule.sum()),
            "by_floor": int((kept & ~by_rule).sum()),
            "refused_for_agreement": int((~kept & (agreement <= config.ratio)).sum()),
            "refused_for_confidence": int((~kept & (agreement > config.ratio)).sum()),
            "per_cluster": torch.bincount(labels[kept], minlength=task.clusters).tolist(),
            "cluster_sizes": sizes.tolist(),
        },
    )
