"""What a middle stage of the network adds to the groups, by its weight, and which weight is chosen without labels.

    python -m tests.bench.bench_intermediate RUN ... [--seeds 0]

RUN is a run of `fit FOLDER --labels folder` with a trained network that has stages, such as one that `bench_photos`
left; its images are encoded once more. The groups are the consensus of stage 2's starts, K the number of classes.
Labels only score.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from spice_dist import graph, metrics, mixing
from spice_dist.config import read_config
from spice_dist.inference import outputs
from spice_dist.methods.features import BesideEachOther
from spice_dist.methods.plumbing import load_backbone, open_run_dataset
from spice_dist.methods.spice_graph import SpiceGraphConfig, for_images
from spice_dist.models.intermediate import Mixture
from spice_dist.neighbors import nearest, without_itself

CPU = torch.device("cpu")
S = 30  # neighbours of an image, as in a run


def parts_of(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Final features (N, D) and peaks of the middle stage (N, C) of the clustered images."""
    config = read_config(run / "config.json")
    images, manifest = open_run_dataset(config, run, CPU)
    backbone = load_backbone(config, run)
    if backbone.mixture is None:
        raise SystemExit(f"the network of {run} has no stages: there is nothing to mix")
    index = np.arange(manifest.clustered)
    model, statistics = BesideEachOther(backbone), config.backbone.statistics
    rows = torch.cat(list(outputs(model, images, index, statistics, lambda done, total: None)))
    final = backbone.dim - len(backbone.mixture.center)
    return rows[:, :final], rows[:, final:]


def groups(features: torch.Tensor, clusters: int, seed: int) -> np.ndarray:
    near = without_itself(nearest(features, S + 1).numpy().astype(np.int32))
    config = for_images(SpiceGraphConfig(), len(features), clusters)
    starts = graph.graph_clusterings(near, clusters, config.counts, config.walks, seed)
    one_hot = np.eye(clusters, dtype=np.float32)
    spread = np.stack([graph.spread(one_hot[row], near[:, : config.spread]) for row in starts])
    return graph.consensus(spread, seed=seed)[0].argmax(1)


def table(run: Path, seeds: Sequence[int]) -> str:
    final, middle = parts_of(run)
    labels = np.load(run / "data/labels.npy")[: len(final)]
    clusters = len(np.unique(labels))
    sample = torch.from_numpy(np.sort(np.random.default_rng(0).permutation(len(final))[: mixing.COMPARED]))
    chosen = mixing.choose_weight(final[sample], middle[sample])
    rows = [f"{run}: {len(labels):,} images, {clusters} classes, seeds {list(seeds)}; * is chosen"]
    mixture = Mixture(middle.shape[1])
    for weight in mixing.WEIGHTS:
        mixture.set(weight, chosen.center.tolist())
        found = [metrics.scores(labels, groups(mixture(final, middle), clusters, seed)) for seed in seeds]
        acc, nmi = (100 * np.mean([scores[name] for scores in found]) for name in ("acc", "nmi"))
        quality = mixing.modularity_of(mixture(final[sample], middle[sample]))
        mark = "*" * bool(torch.isclose(chosen.weight, torch.tensor(weight)))
        rows.append(f"weight {weight:.1f}{mark:<2} modularity {quality:.4f}  ACC {acc:.1f}  NMI {nmi:.1f}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    for run in options.runs:
        print(table(run, options.seeds), flush=True)


if __name__ == "__main__":
    main()
