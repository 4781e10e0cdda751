"""SPICE-Self's ablations (the paper's Tables VII and VIII) on a finished run, beside the paper's numbers.

    python -m tests.bench.ablation runs/digits --seeds 0 1 2

Every row is stage 2 alone, from the stage 1 of the run, with the settings of its --set. The paper's are on STL-10,
train and test merged, over five trials; ours are on whatever the run is of, so compare rows with rows.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from spice_dist import metrics
from spice_dist.config import Config, override
from spice_dist.distributed.worker import LocalWorker
from spice_dist.methods import spice_self
from spice_dist.methods.spice_self import head_features, load_heads
from spice_dist.pipeline import usable_cores
from spice_dist.recipes import RECIPES, recipe

ROWS: dict[str, tuple[dict[str, object], tuple[float, float, float]]] = {
    "SPICE-Self": ({}, (0.908, 0.817, 0.812)),
    "Non-overlap": ({"assignment": "disjoint"}, (0.885, 0.788, 0.771)),
    "Joint-SH": ({"joint": True, "backbone_bn": "train", "heads": 1}, (0.622, 0.513, 0.437)),
    "Joint-MH": ({"joint": True, "backbone_bn": "train"}, (0.687, 0.577, 0.512)),
    "Entropy": ({"entropy_weight": 1.0}, (0.907, 0.817, 0.810)),
    "CE": ({"loss": "cross_entropy"}, (0.875, 0.784, 0.764)),
    "TCE": ({"loss": "tempered"}, (0.895, 0.794, 0.787)),
    "Weak, weak": ({"learn_view": "weak"}, (0.905, 0.815, 0.808)),
    "Strong, weak": ({"score_view": "strong", "learn_view": "weak"}, (0.883, 0.799, 0.781)),
    "Strong, strong": ({"score_view": "strong"}, (0.902, 0.812, 0.803)),
    "BatchNorm in train mode": ({"backbone_bn": "train"}, (float("nan"),) * 3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run whose images have labels")
    parser.add_argument("--recipe", default="digits", choices=RECIPES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="of stage 2; default: the recipe's")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    config = recipe(options.recipe, len(np.load(options.run / "data/labels.npy")))
    if options.epochs:
        config = override(config, {"spice_self.epochs": options.epochs})
    print(f"{'':<26}{'ACC':>14}{'NMI':>7}{'ARI':>7}{'min':>7}   paper, STL-10: ACC, NMI, ARI")
    for name in options.rows:
        changes, paper = ROWS[name]
        changed = override(config, {f"spice_self.{key}": value for key, value in changes.items()})
        started = time.perf_counter()
        scores = [score(override(changed, {"seed": seed}), options.run) for seed in options.seeds]
        minutes = (time.perf_counter() - started) / 60 / len(scores)
        acc, nmi, ari = ([each[key] for each in scores] for key in ("acc", "nmi", "ari"))
        spread = statistics.stdev(acc) if len(acc) > 1 else 0.0
        means = f"{statistics.mean(acc):>7.3f} ± {spread:.3f}{statistics.mean(nmi):>7.3f}{statistics.mean(ari):>7.3f}"
        print(f"{name:<26}{means}{minutes:>7.1f}   {paper[0]:.3f} {paper[1]:.3f} {paper[2]:.3f}", flush=True)


def score(config: Config, run: Path) -> dict[str, float]:
    """Of the selected head, on the images that were clustered."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        copy = Path(folder)
        for part in ("data", "features", config.pretext):
            (copy / part).symlink_to((run / part).resolve())
        spice_self.train(config, config.spice_self, LocalWorker(copy, "spice_self", torch.device("cpu")))
        heads, loss = load_heads(copy)
        features = torch.from_numpy(np.load(head_features(copy)).astype(np.float32))
        with torch.no_grad():
            labels = heads.select(int(loss.argmin()))(features)[0].argmax(1).numpy()
    n = json.loads((run / "data/manifest.json").read_text())
    clustered = n["n"] - n["extra"] - n["held_out"]
    return metrics.scores(np.load(run / "data/labels.npy")[:clustered], labels[:clustered])


if __name__ == "__main__":
    main()
