"""Hurt a real run on Ray workers again and again, and compare what it leaves with a run that nothing hurt.

    python -m tests.chaos.punisher --seed 0 --blows 20 --workers 2 --out punisher.jsonl   # root

Every blow of a seed has its kind and its point, a step of a stage. The command is started again after each end. The run
folder is on a small disk of its own (ext4 on a loop device), which can be filled, and which `fsfreeze` holds up: every
write to it then waits, as on a disk that stalls. Goodput is printed: steps that counted of steps that ran, by the lines
of metrics.jsonl, and the seconds of the calm run of the seconds of the hurt one.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from spice_dist.distributed import checkpoint
from spice_dist.stage_records import stage_record
from tests.chaos import runs
from tests.chaos.damage import flip

IMAGES = 1000
DISK = 300  # megabytes
HELD = (2.0, 6.0)  # seconds for which a process is suspended, or the disk full or slow
TRAINED = {"moco": 180, "spice_self": 40, "spice_semi": 190}  # steps; below 200 each has a line in metrics.jsonl
STEPS = (
    "moco.epochs=60 moco.batch=256 moco.queue=512 spice_self.epochs=40 spice_semi.steps=190 spice_semi.labelled=64"
    " backbone.widths=(16,32,64,64)"
)


@dataclass
class Punished:
    """A run that is hurt: the command, its disk, and how many steps it has made."""

    child: runs.Command
    disk: Path
    draw: random.Random
    ran: int = 0
    seen: dict[str, int] = field(default_factory=dict)
    ends: Counter[str] = field(default_factory=Counter)

    def look(self) -> None:
        """Count the steps made since the last look; one that is made again has its line removed before."""
        for stage in TRAINED:
            now, before = last_line(self.child.run / stage / "metrics.jsonl"), self.seen.get(stage, 0)
            if now is not None and now != before:
                self.ran += now - before if now > before else 1
                self.seen[stage] = now

    def go_on(self, condition: Callable[[], object], what: str) -> None:
        """Wait for the condition; start the command again whenever it ends before."""
        deadline = time.monotonic() + runs.SECONDS
        while not condition():
            self.look()
            if (code := self.child.code()) is not None:
                self.ends[str(code)] += 1
                if code == 0:
                    return
                if code not in (1, 75):
                    raise AssertionError(f"exit code {code}: {self.child.last_words()}")
                if self.ends["1"] > 5:
                    raise AssertionError(f"it does not go on: {self.child.last_words()}")
                self.child.start()
            if time.monotonic() > deadline:
                raise runs.Hangs(f"{what}: {self.child.last_words()}")
            time.sleep(0.02)
        self.look()


def last_line(path: Path) -> int | None:
    """Return the step of the last whole line; None while there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
        return int(json.loads(path.read_bytes().splitlines()[-1])["step"])
    return None


def kill_worker(run: Punished) -> None:
    run.draw.choice(run.child.training_workers()).kill()


def kill_driver(run: Punished) -> None:
    run.child.kill_driver()
    run.child.start()


def terminate(run: Punished) -> None:
    assert run.child.child is not None
    run.child.child.send_signal(signal.SIGTERM)
    code = run.child.ends()
    assert code == 75, f"exit code {code} after SIGTERM: {run.child.last_words()}"
    run.ends["75"] += 1
    run.child.start()


def suspend(processes: list[psutil.Process], seconds: float) -> None:
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)


def stop_worker(run: Punished) -> None:
    suspend([run.draw.choice(run.child.training_workers())], run.draw.uniform(*HELD))


def stop_driver(run: Punished) -> None:
    assert run.child.child is not None
    suspend([psutil.Process(run.child.child.pid)], run.draw.uniform(*HELD))


def full_disk(run: Punished) -> None:
    filling = run.disk / "filling"
    with open(filling, "wb") as file, contextlib.suppress(OSError):
        while True:  # to the last block
            file.write(bytes(1 << 12))
            file.flush()
    assert shutil.disk_usage(run.disk).free < 1 << 16
    time.sleep(run.draw.uniform(*HELD))
    filling.unlink()


def slow_disk(run: Punished) -> None:
    until = time.monotonic() + run.draw.uniform(*HELD)
    while time.monotonic() < until:
        subprocess.run(["fsfreeze", "--freeze", run.disk], check=True)
        try:
            time.sleep(0.7)
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", run.disk], check=True)
        time.sleep(0.1)


def flip_finished(run: Punished) -> None:
    """Flip a bit of what a finished stage left, before the command starts again."""
    run.child.kill_driver()
    folder = run.child.run
    stages = [path.parent for path in folder.glob("*/stage.json")]
    done = [stage for stage in stages if (stage_record(folder, stage.name) or {})["done"]]
    files = [file for stage in done for file in stage.rglob("*") if file.suffix in (".npy", ".safetensors", ".beton")]
    flip(run.draw.choice(sorted(files)), run.draw)
    run.child.start()


def flip_checkpoint(run: Punished) -> None:
    """Flip a bit of the newest checkpoint of the stage that runs, before the command starts again."""
    run.child.kill_driver()
    stores = [folder for stage in TRAINED if any((folder := run.child.run / stage / "checkpoints").glob("[0-9]*"))]
    newest = stores[-1] / f"{checkpoint.newest_step(stores[-1]):09d}"
    flip(run.draw.choice(sorted(newest.iterdir())), run.draw)
    run.child.start()


KINDS: dict[str, Callable[[Punished], None]] = {
    "SIGKILL of a worker": kill_worker,
    "SIGKILL of the driver": kill_driver,
    "SIGTERM": terminate,
    "SIGSTOP of a worker": stop_worker,
    "SIGSTOP of the driver": stop_driver,
    "full disk": full_disk,
    "slow disk": slow_disk,
    "bit flip in a finished stage": flip_finished,
    "bit flip in the newest checkpoint": flip_checkpoint,
}


def blows(number: int, seed: int, seconds: dict[str, float]) -> list[tuple[str, int, str]]:
    """Draw (stage, step, kind) of every blow, in the order of the run: stages by their seconds, kinds in turn."""
    draw = random.Random(seed)
    stages = draw.choices(list(TRAINED), [seconds[stage] for stage in TRAINED], k=number)
    points = sorted((list(TRAINED).index(stage), draw.randrange(1, TRAINED[stage] - 5)) for stage in stages)
    kinds = [kind for _ in range(number // len(KINDS) + 1) for kind in draw.sample(list(KINDS), len(KINDS))]
    return [(list(TRAINED)[stage], step, kind) for (stage, step), kind in zip(points, kinds, strict=False)]


def has_come(run: Punished, stage: str, step: int, since: float) -> bool:
    """Tell whether a group of workers that trains now, since the last blow, has come to the step or beyond it."""
    progress = run.child.progress()
    path = run.child.run / ".ray/progress.json"
    with contextlib.suppress(OSError):
        if progress is None or progress.loss is None or path.stat().st_mtime < since:
            return False
        now, then = (list(TRAINED).index(name) for name in (progress.stage, stage))
        done = last_line(run.child.run / stage / "metrics.jsonl") or 0
        return now > then or (now == then and done >= step)
    return False


def punish(run: Punished, planned: list[tuple[str, int, str]], out: Path | None) -> list[str]:
    """Start the command and hurt it; return the kinds that were done."""
    done = []
    run.child.start()
    since = 0.0
    for stage, step, kind in planned:
        run.go_on(lambda stage=stage, step=step, since=since: has_come(run, stage, step, since), f"{stage} {step}")
        if run.child.code() == 0:
            break
        print(f"{stage} {last_line(run.child.run / stage / 'metrics.jsonl')}: {kind}", file=sys.stderr)
        KINDS[kind](run)
        since = time.time()
        done.append(kind)
        if out:
            runs.note(out, what="blow", kind=kind, stage=stage, step=step)
    run.go_on(lambda: False, "the end")
    return done


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount an ext4 of DISK megabytes."""
    image, place = folder / "image", folder / "disk"
    place.mkdir()
    with open(image, "wb") as file:
        file.truncate(DISK << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blows", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--checkpoint-seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path, help="a line for each blow, and one for the run, is added to this file")
    options = parser.parse_args()
    if os.geteuid():
        sys.exit("a disk of its own needs root")
    with tempfile.TemporaryDirectory(prefix="punisher-") as name:
        folder = Path(name)
        images, often = runs.digits(folder, IMAGES), ["--checkpoint-seconds", str(options.checkpoint_seconds)]

        def command(run: Path) -> list[str]:
            return runs.fit(images, run, options.workers, STEPS, *often)

        calm = folder / "calm/run"
        began = time.monotonic()
        with runs.command(command(calm), folder / "beside", calm) as child:
            child.start()
            assert child.ends() == 0, child.last_words()
        calm_seconds = time.monotonic() - began
        seconds = json.loads((calm / "metrics.json").read_text())["seconds"]
        planned = blows(options.blows, options.seed, seconds)
        with small_disk(folder) as disk, runs.command(command(disk / "run"), folder, disk / "run") as child:
            run = Punished(child, disk, random.Random(options.seed))
            began = time.monotonic()
            done = punish(run, planned, options.out)
            hurt_seconds = time.monotonic() - began
            differ = runs.differences(runs.results(calm), runs.results(disk / "run"))
            left = child.leftovers()
        counted = sum(TRAINED.values())
        record = {
            "what": "punished", "seed": options.seed, "blows": len(done), "differ": differ, "left": left,
            "starts": child.starts, "ends": run.ends, "steps": [counted, run.ran],
            "seconds": [round(calm_seconds, 1), round(hurt_seconds, 1)],
        }  # fmt: skip
        if options.out:
            runs.note(options.out, **record)
    for kind, count in Counter(done).items():
        print(f"{count:3} {kind}")
    print(f"steps that counted of steps that ran: {counted} of {run.ran}, {counted / run.ran:.0%}")
    print(f"seconds of the calm run of those of the hurt: {calm_seconds:.0f} of {hurt_seconds:.0f}, ", end="")
    print(f"{calm_seconds / hurt_seconds:.0%}; {child.starts} starts, exit codes {dict(run.ends)}")
    print(f"results: {', '.join(differ) + ' differ' if differ else 'the same bytes'}; left behind: {left or 'nothing'}")
    sys.exit(bool(differ or left))


if __name__ == "__main__":
    main()
