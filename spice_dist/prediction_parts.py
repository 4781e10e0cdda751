"""Predictions in parts, each written by a worker as a file, so that a call that was stopped goes on with them.

A part is known by a digest of the model, of the limit of what is read, and of its images: their names, sizes and times
of change, or their pixels. A file with another digest is made again.
"""

import hashlib
import io
import json
import socket
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from spice_dist.data.checksums import sha256
from spice_dist.data.excerpts import Excerpts
from spice_dist.data.files import publish
from spice_dist.data.sources import listing
from spice_dist.errors import UserError
from spice_dist.predicting import best_cluster, fill, load_for_images, reading

FEW = 256  # parts of a small set, so that workers share it evenly
MANY = 10_000  # parts at most, each a file
CHUNKS = 16  # batches of a part, where that makes neither few nor many


def size_of_part(count: int, chunk: int) -> int:
    """Return how many images a part has: whole batches of `chunk`, whatever the number of workers."""
    chunks = -(-count // chunk)
    return chunk * max(1, min(chunks // FEW, CHUNKS), -(-chunks // MANY))


@dataclass(frozen=True)
class PartJob:
    """What a worker is told."""

    model: Path
    model_digest: str  # of model.json, which holds that of the weights
    excerpts: Excerpts
    max_megapixels: int | None  # None: as for the images of the run
    folder: Path  # where the parts are written
    threads: int  # of the CPU, for the network; another number rounds otherwise
    cores: int  # for decoding


@dataclass(frozen=True)
class Part:
    """The result of a part."""

    number: int
    digest: str
    best: Float[np.ndarray, "n 2"]  # as `best_cluster`; NaN where an image cannot be used
    reasons: dict[int, str]  # why an image cannot be used, by its number in the part


class PartWorker:
    """Computes parts one after another, with one model and the same decoding processes.

    Memory: the model, the names of a part or of the whole source (see `excerpts.py`), 8 bytes for each image of a part,
    a batch, and 48 images for each of the job's cores.
    """

    def __init__(self, job: PartJob):
        """Load the model; UserError if this machine does not see it, or the images."""
        if digest_of_model(job.model) != job.model_digest:
            raise UserError(
                f"the node {socket.gethostname()} does not see the model {job.model}; give a run on storage that every "
                "node of the cluster mounts at the same place"
            )
        job.excerpts.require_seen()
        torch.set_num_threads(job.threads)
        self._job, self._open = job, ExitStack()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._net, self._task = load_for_images(job.model, self._device, job.max_megapixels)
        source = job.excerpts.open(0)
        opened = reading(source, job.excerpts.packed, self._task.data, self._device, job.cores)
        self._read = self._open.enter_context(opened)

    def close(self) -> None:
        self._open.close()

    def part(self, number: int) -> tuple[Part, int]:
        """Return a part, once it is written, and how many images were decoded for it: none if it was written before."""
        job = self._job
        source = job.excerpts.open(number)
        digest = hashlib.sha256(
            f"{job.model_digest} {job.max_megapixels} {number} {listing(source)}".encode()
        ).hexdigest()
        file = file_of_part(job.folder, number)
        if (before := read_part(file)) and before.digest == digest:
            return before, 0
        count, reasons = len(source.paths), {}
        best = np.full((count, 2), np.nan, np.float32)
        batches = self._read(source, job.excerpts.numbers(number).start, reasons)
        for _ in fill(best, self._net, best_cluster, batches, self._task.backbone.statistics):
            pass
        part = Part(number, digest, best, reasons)
        write_part(file, part)
        return part, count


def digest_of_model(folder: Path) -> str:
    """Return the SHA-256 of model.json; "" if there is none."""
    try:
        return sha256(folder / "model.json")
    except OSError:
        return ""


def file_of_part(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npz"


def write_part(file: Path, part: Part) -> None:
    about = json.dumps({"number": part.number, "digest": part.digest, "reasons": part.reasons})
    content = io.BytesIO()
    np.savez(content, best=part.best, about=np.frombuffer(about.encode("ascii"), np.uint8))
    with publish(file) as out:
        out.write(content.getbuffer())


def read_part(file: Path) -> Part | None:
    """Read a part; None if there is none, or its file is damaged."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            best, about = stored["best"], json.loads(stored["about"].tobytes())
        reasons = {int(image): reason for image, reason in about["reasons"].items()}
        return Part(about["number"], about["digest"], best, reasons)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
