"""What the next call needs to go on on another machine: findings, checkpoints and labels, in files of 15 MiB."""

import io
import shutil
import tarfile
import tempfile
from pathlib import Path

from spice_dist.distributed import checkpoint
from tests.gpu.results import TABLE

PIECE = 15 << 20
MOST = 4  # pieces
NEEDED_OF_FINISHED = {"moco": ("backbone",)}  # of the other stages everything


def bundle(folder: Path, out: Path) -> None:
    """Write `out/carry.tar.0` and so on, at most MOST of PIECE bytes; larger states are left out, the last first."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        content = Path(temporary)
        shutil.copyfile(folder / TABLE, content / TABLE)
        room = MOST * PIECE - (1 << 20)  # for the heads of the archive
        for stage in stages(folder):
            copied = content / stage.relative_to(folder)
            lighter(stage, copied)
            room -= size(copied)
            if room < 0:
                room += size(copied)
                shutil.rmtree(copied)
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            tar.add(content, ".")
    for old in out.glob("carry.tar.*"):
        old.unlink()
    content_bytes = archive.getvalue()
    for number, start in enumerate(range(0, len(content_bytes), PIECE)):
        (out / f"carry.tar.{number}").write_bytes(content_bytes[start : start + PIECE])


def stages(folder: Path) -> list[Path]:
    """Return the folders of the stages of the long parts that have a state, in the order of the parts."""
    runs = [folder / "runs" / name for name in ("cluster", "labels")]
    return [
        run / name for run in runs for name in ("moco", "spice_self", "reliable", "spice_semi") if (run / name).is_dir()
    ]


def lighter(stage: Path, to: Path) -> None:
    """Copy a stage without events and older checkpoints; of a finished stage 1 the backbone alone."""
    saved = checkpoint.newest(stage / "checkpoints")
    shutil.copytree(stage, to, ignore=shutil.ignore_patterns("checkpoints", "events"))
    if saved is None:
        return
    names = sorted(file.stem for file in saved.path.glob("*.safetensors"))
    if saved.step == saved.state["total"]:
        names = [name for name in names if name in NEEDED_OF_FINISHED.get(stage.name, names)]
    checkpoint.save(to / "checkpoints", saved.step, {name: saved.tensors(name) for name in names}, saved.state)


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
