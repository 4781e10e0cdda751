"""Ablations on a finished run: SPICE-Self's beside the paper's numbers (Tables VII and VIII), and stage 3's.

    python -m tests.bench.ablation runs/digits --seeds 0 1 2
    python -m tests.bench.ablation runs/digits --seeds 0 1 2 --joint

Every row is stage 2 alone, from the stage 1 and with the settings of the run, but for those of its --set. The paper's
are on STL-10, train and test merged, over five trials; ours on whatever the run is of, so compare rows with rows.
With --joint, every row is stage 3 alone, from the reliable labels of the run, with what we add to the published one.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from spice_dist import artifacts, metrics
from spice_dist.config import Config, override
from spice_dist.distributed.worker import LocalWorker, usable_cores
from spice_dist.inference import probabilities
from spice_dist.methods import spice_self_joint, spice_semi
from spice_dist.methods.plumbing import finished, open_run_dataset, place
from spice_dist.methods.spice_semi import network_task, new_network
from spice_dist.methods.stage2 import load_heads

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS: dict[str, tuple[dict[str, object], tuple[float, float, float]]] = {
    "SPICE-Self": ({}, (0.908, 0.817, 0.812)),
    "Non-overlap": ({"assignment": "disjoint"}, (0.885, 0.788, 0.771)),
    "Joint-SH": ({"joint": True, "backbone_bn": "train", "heads": 1}, (0.622, 0.513, 0.437)),
    "Joint-MH": ({"joint": True, "backbone_bn": "train"}, (0.687, 0.577, 0.512)),
    "Entropy": ({"entropy_weight": 0.1}, (0.907, 0.817, 0.810)),
    "CE": ({"loss": "cross_entropy"}, (0.875, 0.784, 0.764)),
    "TCE": ({"loss": "tempered"}, (0.895, 0.794, 0.787)),
    "Weak, weak": ({"learn_view": "weak"}, (0.905, 0.815, 0.808)),
    "Strong, weak": ({"score_view": "strong", "learn_view": "weak"}, (0.883, 0.799, 0.781)),
    "Strong, strong": ({"score_view": "strong"}, (0.902, 0.812, 0.803)),
    "BatchNorm in train mode": ({"backbone_bn": "train"}, (math.nan, math.nan, math.nan)),
    "Raw features": ({"features": "raw"}, (math.nan, math.nan, math.nan)),
}
JOINT_ROWS: dict[str, dict[str, object]] = {
    "SPICE": {},
    "Weak views apart": {"weak_apart": True},
    "Labels made again": {"refresh_steps": 100},
    "Adaptive threshold": {"threshold_rule": "adaptive"},
    "Adaptive, faster": {"threshold_rule": "adaptive", "threshold_momentum": 0.99},
    "Unbalanced draw": {"balanced_draw": False},
    "From stage 2": {"init": "stage2"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run whose images have labels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="of stage 2; default: the run's")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *JOINT_ROWS], help="default: all")
    parser.add_argument("--joint", action="store_true", help="the rows of stage 3")
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    config = override(Config(), flattened(json.loads((options.run / "config.json").read_text())["config"]))
    if options.epochs:
        config = override(config, {"spice_self.epochs": options.epochs})
    print(
        f"{'':<26}{'ACC':>14}{'NMI':>7}{'ARI':>7}{'min':>7}", "" if options.joint else "  paper, STL-10: ACC, NMI, ARI"
    )
    for name in options.rows or (JOINT_ROWS if options.joint else ROWS):
        changes, paper = (JOINT_ROWS[name], ()) if options.joint else ROWS[name]
        stage, score = ("spice_semi", score_network) if options.joint else ("spice_self", score_head)
        changed = override(config, {f"{stage}.{key}": value for key, value in changes.items()})
        started = time.perf_counter()
        scores = [score(override(changed, {"seed": seed}), options.run) for seed in options.seeds]
        minutes = (time.perf_counter() - started) / 60 / len(scores)
        acc, nmi, ari = ([each[key] for each in scores] for key in ("acc", "nmi", "ari"))
        spread = statistics.stdev(acc) if len(acc) > 1 else 0.0
        means = f"{statistics.mean(acc):>7.3f} ± {spread:.3f}{statistics.mean(nmi):>7.3f}{statistics.mean(ari):>7.3f}"
        print(f"{name:<26}{means}{minutes:>7.1f}  ", *(f"{value:.3f}" for value in paper), flush=True)


def flattened(settings: dict, prefix: str = "") -> dict[str, object]:
    found = {}
    for name, value in settings.items():
        found |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def score_head(config: Config, run: Path) -> dict[str, float]:
    """Of stage 2's selected head, on the images that were clustered."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        copy = Path(folder)
        for part in ("data", "features", config.pretext):
            (copy / part).symlink_to((run / part).resolve())
        train = spice_self_joint.loop_of(config.spice_self)
        train(config, config.spice_self, LocalWorker(copy, "spice_self", DEVICE))
        heads, loss = load_heads(copy)
        features = torch.from_numpy(artifacts.head_features(copy).astype(np.float32))
        with torch.no_grad():
            labels = heads.select(int(loss.argmin()))(features)[0].argmax(1).numpy()
    return compared(labels, run)


def score_network(config: Config, run: Path) -> dict[str, float]:
    """Of stage 3's averaged network."""
    joint = network_task(config, config.spice_semi)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        copy = Path(folder)
        for part in ("data", "features", config.pretext, "spice_self", "reliable"):
            (copy / part).symlink_to((run / part).resolve())
        spice_semi.train(config, config.spice_semi, LocalWorker(copy, "spice_semi", DEVICE))
        net = place(new_network(joint, config.spice_semi, copy), DEVICE)
        net.load_state_dict(finished(copy / "spice_semi").tensors("ema"))
        images, _ = open_run_dataset(config, copy, DEVICE)
        labels = probabilities(net, images, joint.backbone.statistics, precision=config.precision).argmax(1)
        images.close()
    return compared(labels, run)


def compared(labels: np.ndarray, run: Path) -> dict[str, float]:
    n = json.loads((run / "data/manifest.json").read_text())
    clustered = n["n"] - n["extra"] - n["held_out"]
    return metrics.scores(np.load(run / "data/labels.npy")[:clustered], labels[:clustered])


if __name__ == "__main__":
    main()
