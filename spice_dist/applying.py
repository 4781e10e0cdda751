"""Apply corrections to a finished run: a new run folder with corrected groups and a model that has learned them.

Images, features and neighbours are hard links to those of the run where the file system has them, else copies. The new
folder appears whole or not at all. Corrections on a corrected run keep what was fixed before.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int

from spice_dist import artifacts, evaluate, graph
from spice_dist.assignments import read_assignments
from spice_dist.catalog import USING_LABELS
from spice_dist.config import Config, read_config
from spice_dist.data.checksums import record_files
from spice_dist.data.files import Progress, printable, publish, publish_json
from spice_dist.data.manifest import read_paths
from spice_dist.distributed.worker import LocalWorker
from spice_dist.edits import OUTSIDE, Edits, Known, Pair, contradiction, fingerprint, read_edits
from spice_dist.errors import UserError
from spice_dist.methods import corrected_result, spice_graph
from spice_dist.methods.corrections import FLOOR, NEIGHBORS, Corrections, Learned, joined, learn
from spice_dist.model_card import write_card
from spice_dist.pseudo_labels import UNRELIABLE
from spice_dist.report import write_report
from spice_dist.report.reading import Run, load
from spice_dist.stages import stages_of
from spice_dist.terminal import Bar, StopSignal

KEPT = ("data", "features", "graph", "suggest")  # folders that corrections change nothing in
OF_ONE_RUN = (".owner.json", "edits.json", "README.md", "report.html")  # files that no other run has
MOST_LINES = 30  # of groups that are listed


@dataclass(frozen=True)
class Base:
    """The run that is corrected, and what was fixed in it by earlier corrections."""

    run: Run
    config: Config
    clustered: int
    outside: int | None  # the group of images that belong to none
    fixed: dict[int, int]  # image -> group
    same: list[Pair]
    different: list[Pair]

    @property
    def is_corrected(self) -> bool:
        return artifacts.corrected_posterior_file(self.run.folder).exists()

    @property
    def labels(self) -> Int[np.ndarray, " M"]:
        return self.run.labels[: self.clustered]


def apply(run: Path, edits: Path, out: Path | None, command: list[str], force: bool = False) -> str:
    """Write the folder of the corrected run; return what changed, in lines.

    Args:
        out: its folder; None: that of the run with `-edited` appended. The same call again changes nothing.
        force: also corrections that were made on another assignments.csv.

    Raises:
        UserError: the run, the corrections or the folder cannot be used; the message says why.
    """
    run = run.resolve()
    out = (out or run.with_name(f"{run.name}-edited")).resolve()
    if run in out.parents:
        raise UserError(f"{out} is inside the run that is corrected; give another --out")
    base = read_base(run)
    assignments = artifacts.assignments_file(run)
    known = Known(
        artifacts.names(run), np.bincount(base.labels, minlength=base.run.num_clusters).tolist(),
        read_paths(artifacts.data(run)), fingerprint(assignments), base.clustered, base.outside,
    )  # fmt: skip
    corrections = read_edits(edits, known, force)
    applied = {"run": known.fingerprint, "edits": hashlib.sha256(edits.read_bytes()).hexdigest()}
    if not _is_there(out, applied):
        with StopSignal() as stop, Bar("apply", stop) as bar:
            _write(base, corrections, edits, out, applied, command, bar.show)
    if not artifacts.report_file(out).exists():
        write_card(out)
        write_report(out)
    return _described(out)


def read_base(run: Path) -> Base:
    """Read a finished run; UserError if it is none, or its method has no features."""
    loaded = load(run)
    config = read_config(artifacts.config_file(run))
    if config.method in USING_LABELS:
        raise UserError(f"{run} is a run of {config.method}, which has no features to learn corrections on")
    if loaded.features is None:
        raise UserError(f"{run} has lost its features; run the same fit command again")
    clustered = artifacts.manifest(run).clustered
    if not artifacts.corrected_posterior_file(run).exists():
        return Base(loaded, config, clustered, None, {}, [], [])
    fixed, pairs = artifacts.fixed_groups(run), artifacts.pairs(run)
    groups = {image: int(fixed[image]) for image in np.flatnonzero(fixed != UNRELIABLE).tolist()}
    same, different = ([(one, other) for one, other, kind in pairs.tolist() if kind == wanted] for wanted in (1, 0))
    outside = artifacts.corrections_summary(run)["outside"]
    return Base(loaded, config, clustered, outside, groups, same, different)


def _is_there(out: Path, applied: dict[str, str]) -> bool:
    """Tell whether the folder holds the result of these corrections already; UserError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    config = artifacts.config_file(out)
    try:
        found = json.loads(config.read_bytes()).get("applied") if out.is_dir() and config.exists() else None
    except (ValueError, AttributeError):
        found = None
    if found != applied:
        raise UserError(f"{out} holds something else; give another --out")
    return True


def _write(
    base: Base, edits: Edits, file: Path, out: Path, applied: dict[str, str], command: list[str], progress: Progress
) -> None:
    """Fill a folder beside `out`, and give it that name at the end."""
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name[:100]}-", dir=out.parent) as temporary:
            folder = Path(temporary) / "run"
            folder.mkdir()
            new = _not_made(edits, base)
            if new.regroup:
                _learn(base, edits, new, folder, device, started, progress)
            else:
                _keep(base, edits, folder)
            shutil.copyfile(file, artifacts.edits_file(folder))
            about = {"command": command, "applied": applied, "config": asdict(_config_of(base.config, folder))}
            publish_json(artifacts.config_file(folder), {**base.run.config, **about})
            corrections = [f"corrections/{file.name}" for file in artifacts.pairs_file(folder).parent.iterdir()]
            record_files(folder, ["config.json", *corrections])
            folder.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; give another --out") from error


def _config_of(config: Config, folder: Path) -> Config:
    return replace(config, clusters=artifacts.metrics(folder)["k"])


def link_tree(source: Path, target: Path, without: Sequence[str] = ()) -> None:
    """Give every file of a folder, if there is one, a second name below `target`: hard links, or copies elsewhere.

    A link to a packed file, which is relative, becomes a hard link, or elsewhere an absolute link.

    Args:
        without: names of files and folders that are left out.
    """

    def link(old: str, new: str) -> None:
        real = os.path.realpath(old)
        try:
            os.link(real, new)
        except OSError:  # another file system, or one without hard links
            if os.path.islink(old):
                os.symlink(real, new)
            else:
                shutil.copyfile(old, new)

    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*without), copy_function=link, dirs_exist_ok=True)


def _keep(base: Base, edits: Edits, folder: Path) -> None:
    """Write a run whose groups are those of the run before, and so are its model and numbers: the names may differ."""
    link_tree(base.run.folder, folder, OF_ONE_RUN)
    groups = [[group] for group in range(base.run.num_clusters)]
    names = {**artifacts.names(base.run.folder), **edits.names}
    publish_json(artifacts.names_file(folder), {str(group): name for group, name in sorted(names.items())})
    _write_summary(folder, base, groups, base.outside, _fixed(base), {"by_correction": 0, "by_learning": 0})


def _learn(
    base: Base, edits: Edits, new: Edits, folder: Path, device: torch.device, started: float, progress: Progress
) -> None:
    """Write everything that depends on the groups, but for the report."""
    for name in (*KEPT, *([] if base.config.pretext == "none" else [base.config.pretext])):
        link_tree(base.run.folder / name, folder / name)
    if not artifacts.neighbors_file(folder).exists():
        spice_graph.find_neighbors(base.config, base.config.graph, LocalWorker(folder, "graph", device))
    neighbors, groups = artifacts.neighbors(folder), base.run.num_clusters - (base.outside is not None)
    corrections = _corrections(base, new, groups)
    probs = posterior(base, neighbors)[:, :groups]
    learned = _learned(base, probs, corrections, artifacts.features(folder, base.clustered), neighbors)
    config = replace(base.config, clusters=learned.probs.shape[1])
    result, learned = corrected_result.result(
        config, _settings(base, config), folder, device, corrections, learned, base.run.labels, progress
    )
    evaluate.conclude(result, config, folder, device, {"apply": time.monotonic() - started}, progress)
    _write_corrections(folder, base, edits, corrections, learned)


def _learned(
    base: Base, probs: Float[np.ndarray, "M K"], corrections: Corrections, features: Float[np.ndarray, "M D"],
    neighbors: Int[np.ndarray, "M S"],
) -> Learned:  # fmt: skip
    probs = probs + FLOOR
    probs /= probs.sum(1, keepdims=True)
    labels = np.where(base.labels < probs.shape[1], base.labels, probs.argmax(1))
    try:
        learned = learn(features, probs, labels, neighbors, corrections, base.config.seed)
    except ValueError as error:
        raise UserError(str(error)) from None
    if learned.probs.shape[1] - bool(corrections.outside.any()) < 2:
        raise UserError("one group would be left after these corrections; leave at least two")
    return learned


def _settings(base: Base, config: Config) -> corrected_result.Settings:
    stages = {stage.name for stage in stages_of(config)}
    reliable = config.reliable if "reliable" in stages else None
    tune = config.spice_tune if "spice_tune" in stages else None
    return corrected_result.Settings(config.spice_graph, reliable, tune, _confidence(base))


def _confidence(base: Base) -> corrected_result.Confidence:
    """Return how the confidence of the run was computed, so that those of the corrected run can be compared with it."""
    if base.is_corrected:
        return artifacts.corrections_summary(base.run.folder).get("confidence", "posterior")
    return "posterior" if base.run.metrics.get("result") == "spice_graph" else "head"


def posterior(base: Base, neighbors: Int[np.ndarray, "M S"]) -> Float[np.ndarray, "M K"]:
    """Return the probabilities of the run's groups.

    Where stage 2 on the graph left none of the result, they are the groups spread over neighbours: the confidence of a
    head can be 1 for all images, which no correction would move.
    """
    folder = base.run.folder
    if base.is_corrected:
        return artifacts.corrected_posterior(folder)
    if base.run.metrics.get("result") == "spice_graph":
        return artifacts.posterior(folder).astype(np.float64)
    return graph.spread(np.eye(base.run.num_clusters)[base.labels], neighbors[:, :NEIGHBORS])


def _not_made(edits: Edits, base: Base) -> Edits:
    """Leave out the corrections that the run was made with: they are learned once."""
    together, known = joined(_array(_unless_in(edits.different, base.same)), base.clustered), base.fixed.items()
    apart = {frozenset(pair) for pair in together[_array(_unless_in(edits.same, base.different))].tolist()}
    return replace(
        edits,
        move=dict(edits.move.items() - known),
        outside=[image for image in edits.outside if (image, base.outside) not in known],
        same=[(one, other) for one, other in edits.same if together[one] != together[other]],
        different=[pair for pair in edits.different if frozenset(together[list(pair)].tolist()) not in apart],
    )


def _array(pairs: Sequence[Pair]) -> Int[np.ndarray, "P 2"]:
    return np.array(pairs, np.int64).reshape(-1, 2)


def _fixed(base: Base) -> Int[np.ndarray, " M"]:
    """Return the group of each fixed image, UNRELIABLE for all others."""
    fixed = np.full(base.clustered, UNRELIABLE)
    fixed[list(base.fixed)] = list(base.fixed.values())
    return fixed


def _corrections(base: Base, new: Edits, groups: int) -> Corrections:
    """Join new corrections with those that the run was made with; a new one replaces an old one of the same images."""
    fixed = {image: group for image, group in base.fixed.items() if group != base.outside} | new.move
    outside = (base.fixed.keys() - fixed.keys() - new.move.keys()) | set(new.outside)
    fixed = {image: group for image, group in fixed.items() if image not in outside}
    same, different = _unless_in(new.different, base.same), _unless_in(new.same, base.different)
    if why := contradiction(new.roots, fixed, sorted(outside), [*same, *new.same], [*different, *new.different]):
        raise UserError(f"together with the corrections that {base.run.folder} was made with: {why[1]}")
    of_images = np.full(base.clustered, UNRELIABLE)
    of_images[list(fixed)] = list(fixed.values())
    sets = joined(_array([*same, *new.same]), base.clustered)
    is_outside = np.isin(sets, sets[sorted(outside)])
    pairs = (_array(chosen) for chosen in (new.same, new.different, same, different))
    return Corrections(np.array(new.roots[:groups]), new.split, of_images, is_outside, *pairs)


def _unless_in(others: Sequence[Pair], pairs: Sequence[Pair]) -> list[Pair]:
    replaced = {frozenset(pair) for pair in others}
    return [pair for pair in pairs if frozenset(pair) not in replaced]


def _write_corrections(folder: Path, base: Base, edits: Edits, corrections: Corrections, learned: Learned) -> None:
    """Write names, what later corrections keep, and the summary."""
    old, last = artifacts.names(base.run.folder), learned.probs.shape[1] - 1
    sizes = np.bincount(base.labels, minlength=base.run.num_clusters).tolist()
    names = new_names({**old, **edits.names}, edits.names, learned.groups, sizes)
    has_outside = bool(corrections.outside.any())
    groups = [*learned.groups, *([[last] * has_outside] if base.outside is not None else [])]
    if has_outside:
        was = -1 if base.outside is None else base.outside
        names[last] = edits.names.get(was, old.get(was, OUTSIDE))
    publish_json(artifacts.names_file(folder), {str(group): name for group, name in sorted(unique(names).items())})

    kinds = (corrections.all_same, 1), (corrections.all_different, 0)
    pairs = np.concatenate([np.insert(pairs, 2, kind, axis=1) for pairs, kind in kinds])
    arrays = {
        artifacts.corrected_posterior_file(folder): learned.probs.astype(np.float32),
        artifacts.fixed_groups_file(folder): learned.fixed,
        artifacts.pairs_file(folder): pairs,
    }
    artifacts.pairs_file(folder).parent.mkdir()
    for path, values in arrays.items():
        with publish(path) as file:
            np.save(file, values)
    outside = last if has_outside else None
    _write_summary(folder, base, groups, outside, learned.fixed, _moves(base, edits, learned, groups))


def _write_summary(
    folder: Path, base: Base, groups: Sequence[list[int]], outside: int | None, fixed: Int[np.ndarray, " M"],
    moves: dict[str, int],
) -> None:  # fmt: skip
    """Write what changed; `groups` as in `Learned`, with those outside."""
    count = 1 + max(*chain.from_iterable(groups), -1 if outside is None else outside)
    path = artifacts.corrections_summary_file(folder)
    path.parent.mkdir(exist_ok=True)
    publish_json(
        path,
        {
            "outside": outside,
            "groups_before": base.run.num_clusters,
            "from": [[old for old, new in enumerate(groups) if group in new] for group in range(count)],
            "emptied": [old for old, new in enumerate(groups) if not new],
            "fixed": int((fixed != UNRELIABLE).sum()),
            "confidence": _confidence(base),
            **moves,
        },
    )


def _moves(base: Base, edits: Edits, learned: Learned, groups: Sequence[list[int]]) -> dict[str, int]:
    """Count the images whose group changed by more than merging and dividing: those in corrections, and others."""
    stays = np.zeros((base.run.num_clusters, learned.probs.shape[1]), bool)
    for old, new in enumerate(groups):
        stays[old, new] = True
    moved = ~stays[base.labels, learned.labels]
    direct = np.zeros(len(moved), bool)
    direct[[*edits.move, *edits.outside, *chain.from_iterable([*edits.same, *edits.different])]] = True
    return {"by_correction": int((moved & direct).sum()), "by_learning": int((moved & ~direct).sum())}


def new_names(
    names: Mapping[int, str], given: Mapping[int, str], groups: Sequence[Sequence[int]], sizes: Sequence[int]
) -> dict[int, str]:
    """Name each new group after the groups that it is from: one whose name was given, else the largest with a name."""
    result: dict[int, str] = {}
    for group in sorted(names.keys() & set(range(len(groups))), key=lambda group: (group in given, sizes[group])):
        parts = groups[group]
        result |= {new: names[group] + f" {part}" * (len(parts) > 1) for part, new in enumerate(parts, 1)}
    return result


def unique(names: Mapping[int, str]) -> dict[int, str]:
    """Number names that stand twice, as parts of a divided group can have the name of another."""
    result: dict[int, str] = {}
    for group, name in names.items():
        number, free = 2, name
        while free in result.values():
            number, free = number + 1, f"{name} ({number})"
        result[group] = free
    return result


def _described(out: Path) -> str:
    """Say in lines what changed, from the files of the corrected run."""
    summary, metrics = artifacts.corrections_summary(out), artifacts.metrics(out)
    labels, names = read_assignments(artifacts.assignments_file(out))[0], artifacts.names(out)
    lines = [f"{summary['groups_before']} groups before, {metrics['k']} after"]
    sizes = np.bincount(labels, minlength=metrics["k"]).tolist()
    for group, (size, sources) in enumerate(zip(sizes, summary["from"], strict=True)):
        if group < MOST_LINES:
            before = " + ".join(map(str, sources)) or "none"
            lines.append(f"{group:>5}  {size:>8,} images, from {before:<12} {printable(names.get(group, ''))}".rstrip())
    if metrics["k"] > MOST_LINES:
        lines.append(f"and {metrics['k'] - MOST_LINES} more, see {artifacts.corrections_summary_file(out)}")
    if summary["emptied"]:
        lines.append(f"left without images: {', '.join(map(str, summary['emptied']))}")
    lines.append(
        f"{summary['by_correction']:,} images moved by correction, {summary['by_learning']:,} by learning; "
        f"{summary['fixed']:,} are fixed"
    )
    before, after = metrics["baselines"].get("before"), metrics["eval"]
    if before and after and summary["by_correction"] + summary["by_learning"] > 0:
        shown = (f"{name.upper()} {100 * before[name]:.1f} -> {100 * after[name]:.1f}" for name in ("acc", "nmi"))
        lines.append("against true labels: " + ", ".join(shown))
    return "\n".join([*lines, f"assignments  {artifacts.assignments_file(out)}", f"report       {out / 'report.html'}"])
