"""What ten corrections by a person are worth: ACC and NMI before and after `spice-dist apply`, and without learning.

    python -m tests.bench.bench_corrections RUN ... [--budget 10] [--whole]

RUN is a run of `fit FOLDER --labels folder` on the neighbour graph. The person is simulated: of each group it looks at
36 images, as the page shows them (most typical, most doubtful, some by chance), and knows the class of an image that it
sees. It corrects by a fixed rule.

1. Two groups whose chance images show the same classes, two thirds of the histograms in common, are merged.
2. The page is looked at again. The class that most typical and chance images of a group have is the group's. An image
   of another class is moved to that class' group, if it has one: in turn one of each kind (group, class), kinds with
   most images seen first, typical images first.

Without learning, the same merges and only the moved images change. With --whole the corrections are written as
edits.json and applied by the command too, which is timed; its groups must be the same.

The rule and the strength of spreading (`corrections.GROUNDING`, `SMOOTHNESS`) were chosen on the first two seeds of all
four data sets of the table together.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spice_dist import applying, artifacts, cli, metrics
from spice_dist.assignments import read_assignments
from spice_dist.methods.corrections import Corrections, Learned, learn
from spice_dist.pseudo_labels import UNRELIABLE

SHOWN, ALIKE = 12, 2 / 3  # images of each kind; histograms in common from which groups are merged
NO_PAIRS = np.zeros((0, 2), np.int64)


@dataclass(frozen=True)
class Case:
    """A run, its posterior and its groups."""

    features: np.ndarray
    neighbors: np.ndarray
    truth: np.ndarray
    probs: np.ndarray
    labels: np.ndarray
    seed: int

    def look(self, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The images of a group that the person sees: typical, doubtful and by chance."""
        images = np.flatnonzero(self.labels == group)
        order = images[np.argsort(-self.probs[images, group], kind="stable")]
        by_chance = np.random.default_rng([self.seed, group]).permutation(images)
        return order[:SHOWN], order[::-1][:SHOWN], by_chance[: 2 * SHOWN]

    def histogram(self, images: np.ndarray) -> np.ndarray:
        return np.bincount(self.truth[images], minlength=int(self.truth.max()) + 1) / max(1, len(images))

    def corrected(self, roots: np.ndarray, fixed: dict[int, int]) -> Learned:
        of_images = np.full(len(self.labels), UNRELIABLE)
        of_images[list(fixed)] = list(fixed.values())
        outside = np.zeros(len(self.labels), bool)
        corrections = Corrections(roots, {}, of_images, outside, *[NO_PAIRS] * 4)
        return learn(self.features, self.probs, self.labels, self.neighbors, corrections, self.seed)

    def after(self, learned: Learned) -> "Case":
        return Case(self.features, self.neighbors, self.truth, learned.probs, learned.labels, self.seed)


def read(run: Path) -> Case:
    """Read a run and its result; its seed is only that of the person's chance images."""
    base, neighbors = applying.read_base(run), artifacts.neighbors(run)
    truth = np.load(run / "data/labels.npy")[: base.clustered]
    features = artifacts.features(run, base.clustered)
    probs = applying.posterior(base, neighbors)
    probs /= probs.sum(1, keepdims=True)
    return Case(features, neighbors, truth, probs, base.labels, base.config.seed)


def merges(case: Case, budget: int) -> list[tuple[int, int]]:
    """The pairs of groups that look alike, most alike first."""
    count = case.probs.shape[1]
    seen = [case.histogram(case.look(group)[2]) for group in range(count)]
    alike = {(a, b): np.minimum(seen[a], seen[b]).sum() for a in range(count) for b in range(a + 1, count)}
    chosen: list[tuple[int, int]] = []
    roots = np.arange(count)
    for (a, b), overlap in sorted(alike.items(), key=lambda item: -item[1]):
        if overlap >= ALIKE and roots[a] != roots[b] and len(chosen) < budget:
            chosen.append((a, b))
            roots = merged(roots, a, b)
    return chosen


def merged(roots: np.ndarray, a: int, b: int) -> np.ndarray:
    return np.where(np.isin(roots, roots[[a, b]]), roots[[a, b]].min(), roots)


def moves(case: Case, budget: int) -> dict[int, int]:
    """The images to move, and the group of each."""
    seen = [case.look(group) for group in range(case.probs.shape[1])]
    shares = [case.histogram(np.concatenate([typical, chance[:SHOWN]])) for typical, _, chance in seen]
    home: dict[int, int] = {}  # of each class the group where most of the images are of it
    for group in sorted(range(len(seen)), key=lambda group: shares[group].max()):
        home[int(shares[group].argmax())] = group
    kinds: dict[tuple[int, int], list[int]] = {}
    for group, (typical, doubtful, chance) in enumerate(seen):
        images = np.unique(np.concatenate([typical, doubtful, chance[:SHOWN]]))
        for image in images[np.argsort(-case.probs[images, group], kind="stable")].tolist():
            of_class = int(case.truth[image])
            if of_class != shares[group].argmax() and home.get(of_class, group) != group:
                kinds.setdefault((group, of_class), []).append(image)
    in_turn = sorted(kinds.items(), key=lambda item: -len(item[1]))
    order = [(images[turn], kind[1]) for turn in range(SHOWN) for kind, images in in_turn if turn < len(images)]
    return {image: home[of_class] for image, of_class in order[:budget]}


def row(run: Path, budget: int, whole: bool) -> dict[str, float]:
    """One person's corrections of one run."""
    case = read(run)
    pairs = merges(case, budget)
    roots = np.arange(case.probs.shape[1])
    for a, b in pairs:
        roots = merged(roots, a, b)
    first = case.corrected(roots, {})
    again = case.after(first)
    fixed = moves(again, budget - len(pairs))
    started = time.perf_counter()
    last = again.corrected(np.arange(first.probs.shape[1]), fixed)
    seconds = time.perf_counter() - started
    alone = np.array([new[0] if new else 0 for new in first.groups])[case.labels]
    alone[list(fixed)] = list(fixed.values())
    if whole:
        seconds = applied(run, pairs, fixed, last.labels)
    before, plain, after = (metrics.scores(case.truth, labels) for labels in (case.labels, alone, last.labels))
    scores = {"before": before, "plain": plain, "after": after}
    return {f"{name} {score}": 100 * found[score] for name, found in scores.items() for score in ("acc", "nmi")} | {
        "merges": len(pairs),
        "moves": len(fixed),
        "changed": int((last.labels != again.labels).sum()),
        "k": last.probs.shape[1],
        "seconds": seconds,
    }


def applied(run: Path, pairs: list[tuple[int, int]], fixed: dict[int, int], labels: np.ndarray) -> float:
    """Apply the corrections by the command, and return the seconds of the last call."""
    seconds = 0.0
    with tempfile.TemporaryDirectory(dir=run.parent) as folder:
        steps = [{"merge": pairs}] * bool(pairs) + [{"move": list(fixed.items())}]
        for number, edits in enumerate(steps):
            file, out = Path(folder) / f"{number}.json", Path(folder) / f"run{number}"
            file.write_text(json.dumps({"version": 1, **edits}))
            started = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                assert cli.main(["apply", str(run), str(file), "--out", str(out)]) == 0
            seconds, run = time.perf_counter() - started, out
        assert np.array_equal(read_assignments(artifacts.assignments_file(run))[0][: len(labels)], labels)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--budget", type=int, default=10, help="corrections in total (10)")
    parser.add_argument("--whole", action="store_true", help="apply them by the command too, and time it")
    options = parser.parse_args()
    rows = []
    for run in options.runs:
        rows.append(row(run, options.budget, options.whole))
        print(run, " ".join(f"{name} {value:.1f}" for name, value in rows[-1].items()), flush=True)
    print(f"| mean of {len(rows)} | ACC | NMI |\n|---|---|---|")
    for name in ("before", "plain", "after"):
        cells = [np.array([row[f"{name} {score}"] for row in rows]) for score in ("acc", "nmi")]
        spread = [cell.std(ddof=1) if len(cell) > 1 else 0.0 for cell in cells]
        shown = (f"{cell.mean():.1f} ± {error:.1f}" for cell, error in zip(cells, spread, strict=True))
        print(f"| {name} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
