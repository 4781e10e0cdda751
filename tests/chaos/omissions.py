"""Leave every part of a checkpoint's state out, resume, and see whether the resume test would notice.

    python -m tests.chaos.omissions --out omissions.jsonl                # every tensor of every training loop; minutes
    python -m tests.chaos.omissions --table omissions.jsonl

A loop is stopped in the middle. Then a tensor of its checkpoint is missing, or has the value that it had after the
first step, and the loop goes on to its end. That is noticed if it is refused, or if the last checkpoint or another file
of the stage is not that of the loop that was never stopped. A tensor that has not changed since the first step is
constant: only its loss is tried.
"""

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spice_dist.config import Config, override
from spice_dist.distributed import checkpoint
from spice_dist.distributed.checkpoint import Checkpoint
from spice_dist.distributed.worker import LocalWorker, Worker
from spice_dist.errors import Interrupted
from spice_dist.methods import features, reliable, spice_graph, spice_tune
from tests.chaos.damage import make_run
from tests.methods.conftest import CPU, SMALL, TRAIN

NOTICED, CONSTANT, UNNOTICED = "noticed", "constant", "not noticed"
Tensors = dict[str, dict[str, Tensor]]  # by file and name


@dataclass(frozen=True)
class Loop:
    """A training loop: its stage, its settings, and in which step it is stopped."""

    stage: str
    train: Callable[[Config, Worker], None]
    cut: int
    changes: dict[str, Any]

    @property
    def config(self) -> Config:
        return override(SMALL, self.changes)


TUNING = {"epochs": 2, "labelled": 16, "head_steps": 20, "guard_steps": 3}
TUNING |= {"min_size": 0.0, "min_agreement": 0.0, "max_rise": 100.0}  # the guard looks, and lets all pass
LOOPS = {
    **{stage: Loop(stage, train, 3, {}) for stage, train in TRAIN.items()},
    "joint": Loop("spice_self", TRAIN["spice_self"], 3, {"spice_self.joint": True}),
    "spice_graph": Loop(
        "spice_graph", lambda config, worker: spice_graph.train(config, config.spice_graph, worker), 2,
        {"spice_graph.steps": 5},
    ),
    "spice_tune": Loop(
        "spice_tune", lambda config, worker: spice_tune.train(config, config.spice_tune, worker), 5,
        {f"spice_tune.{name}": value for name, value in TUNING.items()},
    ),
}  # fmt: skip


def prepare(folder: Path) -> Path:
    """Make a run folder with all that the loops read, beside its images."""
    run = make_run(folder)
    for stage in ("moco", "features", "spice_self", "reliable", "spice_semi"):
        shutil.rmtree(run / stage)
    TRAIN["moco"](SMALL, LocalWorker(run, "moco", CPU))
    features.embed(SMALL, None, LocalWorker(run, "features", CPU))
    TRAIN["spice_self"](SMALL, LocalWorker(run, "spice_self", CPU))
    reliable.select(SMALL, SMALL.reliable, LocalWorker(run, "reliable", CPU))
    spice_graph.find_neighbors(SMALL, SMALL.graph, LocalWorker(run, "graph", CPU))
    TRAIN["scan"](SMALL, LocalWorker(run, "scan", CPU))
    return run


class Omissions:
    """A loop that was stopped, with the states after its first step and at the cut, and what it leaves at its end."""

    def __init__(self, loop: Loop, prepared: Path, folder: Path):
        self.loop, self.run = loop, folder / "run"
        self.run.mkdir(parents=True)
        for part in prepared.iterdir():
            if part.name != loop.stage:
                (self.run / part.name).symlink_to(part)
        self.stage, self.stopped = self.run / loop.stage, folder / "stopped"
        self.first = self._until(1)
        shutil.rmtree(self.stage)
        self.at_cut = self._until(loop.cut)
        shutil.copytree(self.stage, self.stopped)
        self.whole = self._to_the_end()

    def tensors(self) -> list[tuple[str, str]]:
        return [(file, key) for file, tensors in self.at_cut.items() for key in tensors]

    def lose(self, *keys: tuple[str, str]) -> str:
        """Return what becomes of a checkpoint without these tensors."""
        return self._tried(lambda file, tensors: {key: v for key, v in tensors.items() if (file, key) not in keys})

    def freeze(self, *keys: tuple[str, str]) -> str:
        """Return what becomes of a checkpoint in which these tensors are as after the first step, zero if new since."""
        old = {(file, key): self.first.get(file, {}).get(key) for file, key in keys}
        changed = {name: torch.zeros_like(self.at_cut[name[0]][name[1]]) if v is None else v for name, v in old.items()}
        if all(torch.equal(value, self.at_cut[file][key]) for (file, key), value in changed.items()):
            return CONSTANT
        return self._tried(lambda file, tensors: {key: changed.get((file, key), v) for key, v in tensors.items()})

    def _until(self, step: int) -> Tensors:
        """Train to this step; return what was saved."""
        calls = iter(range(1, 10_000))
        with contextlib.suppress(Interrupted):
            self.loop.train(self.loop.config, self._worker(stop_requested=lambda: next(calls) >= step))
        saved = checkpoint.newest(self.stage / "checkpoints")
        assert saved is not None
        assert saved.step == step < saved.state["total"]
        return tensors_of(saved)

    def _tried(self, change: Callable[[str, dict[str, Tensor]], dict[str, Tensor]]) -> str:
        shutil.rmtree(self.stage)
        shutil.copytree(self.stopped, self.stage)
        try:
            with changed_tensors(change):
                left = self._to_the_end()
        except (KeyError, RuntimeError, ValueError, TypeError, IndexError):
            return NOTICED  # refused
        return UNNOTICED if same(left, self.whole) else NOTICED

    def _worker(self, **options: Any) -> LocalWorker:
        return LocalWorker(self.run, self.loop.stage, CPU, **options)

    def _to_the_end(self) -> dict[str, Any]:
        self.loop.train(self.loop.config, self._worker())
        saved = checkpoint.newest(self.stage / "checkpoints")
        assert saved is not None
        written = {path.name: path.read_bytes() for path in self.stage.glob("*.npy")}
        return {
            f"{file}/{key}": v for file, tensors in tensors_of(saved).items() for key, v in tensors.items()
        } | written


def tensors_of(saved: Checkpoint) -> Tensors:
    return {file.stem: saved.tensors(file.stem) for file in sorted(saved.path.glob("*.safetensors"))}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        for name, value in one.items()
    )


@contextmanager
def changed_tensors(change: Callable[[str, dict[str, Tensor]], dict[str, Tensor]]) -> Iterator[None]:
    """Let checkpoints that are loaded in the block have other tensors."""
    real = Checkpoint.tensors
    Checkpoint.tensors = lambda self, name: change(name, real(self, name))
    try:
        yield
    finally:
        Checkpoint.tensors = real


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """Count what became of every omission, by loop and file, as Markdown."""
    yield "| loop | file | tensors | lost: noticed | frozen: noticed | constant | not noticed |"
    yield "|---|---|---|---|---|---|---|"
    records = [record for record in records if record["what"] == "omission"]
    places = list(dict.fromkeys((record["loop"], record["file"]) for record in records))
    for loop, file in [*places, ("all", "")]:
        here = [each for each in records if loop == "all" or (each["loop"], each["file"]) == (loop, file)]
        counts = Counter((each["how"], each["outcome"]) for each in here)
        cells = [sum(each["how"] == "lost" for each in here), counts["lost", NOTICED], counts["frozen", NOTICED]]
        cells += [counts["frozen", CONSTANT], sum(each["outcome"] == UNNOTICED for each in here)]
        yield f"| {loop} | {file} | {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", nargs="+", default=list(LOOPS), choices=LOOPS)
    parser.add_argument("--out", type=Path, help="a line for each omission is added to this file")
    parser.add_argument("--table", type=Path, help="print the table of the lines in this file")
    options = parser.parse_args()
    if options.table:
        print("\n".join(table([json.loads(line) for line in options.table.read_text().splitlines()])))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(Path(folder))
        for name in options.loops:
            omissions = Omissions(LOOPS[name], prepared, Path(folder) / name)
            for key in omissions.tensors():
                for how, outcome in (("lost", omissions.lose(key)), ("frozen", omissions.freeze(key))):
                    record = {"what": "omission", "loop": name, "file": key[0], "tensor": key[1]}
                    with open(options.out, "a") as file:
                        file.write(json.dumps({**record, "how": how, "outcome": outcome}) + "\n")
                    if outcome == UNNOTICED:
                        print(name, *key, how, outcome, file=sys.stderr)


if __name__ == "__main__":
    main()
