"""Clean images -> .beton, by FFCV's DatasetWriter in a child process that is watched.

On nearly every fault FFCV's writer waits for ever, leaves a file that crashes its reader and leaks shared memory. Here
it works on a hidden file in a child of its own: a child that fails or falls silent is ended, what it left is removed,
and only a file whose structure and pixels have been compared with the images gets its name.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
from jaxtyping import UInt32

from spice_dist.data import beton
from spice_dist.data.files import Progress, commit, temporary_path
from spice_dist.errors import DamagedFile, UserError

SILENCE_S = 120.0  # without a new page the child is ended; importing FFCV on a busy node takes up to 30 s
SAMPLES_PER_PAGE = 32  # at least, so that little of a page is wasted; 2 MiB or more
POLL_S = 0.1
CHILD = (sys.executable, "-m", "spice_dist.data.ffcv_writer")


def write_beton(images_npy: Path, out: Path, progress: Progress | None = None, silence_s: float = SILENCE_S) -> None:
    """Pack images.npy, (N, H, W, 3) uint8, into `out` and its sidecar. The same images give the same bytes.

    Raises:
        UserError: the writer failed, was killed or wrote nothing for `silence_s` seconds; `out` does not appear then.
        DamagedFile: images.npy is damaged, or what was written differs from it.
    """
    images = open_npy(images_npy)
    temporary = temporary_path(out)
    try:
        _run_child(images_npy, images, temporary, progress, silence_s)
        commit_verified(images, temporary, out, _fingerprint_beside(images_npy))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def open_npy(path: Path) -> np.ndarray:
    """images.npy as a read-only memory map, (N, H, W, 3) uint8; DamagedFile if it is anything else."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise DamagedFile(f"cannot read {path} ({error}): pack the images again") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise DamagedFile(f"{path} holds {images.dtype} {images.shape}, not uint8 (N, H, W, 3): pack the images again")
    return images


def commit_verified(images: np.ndarray, temporary: Path, out: Path, fingerprint: str | None) -> None:
    """Compare the written file with the images, write its sidecar, give it its name.

    Order: old file away, sidecar, new file. Whenever it stops, no file is left beside a sidecar that vouches wrongly.
    """
    info = beton.verify(temporary, trusted_sidecar=False)
    n, height, width, _ = images.shape
    if (info.n, info.height, info.width) != (n, height, width):
        raise DamagedFile(f"{out}: the writer stored {info.n} images of {info.width}x{info.height}: write it again")
    crc32 = _checksums_of(images)
    beton.check_pixels(beton.BetonInfo(**{**info.__dict__, "crc32": crc32}))
    out.unlink(missing_ok=True)
    beton.write_sidecar(info, crc32, fingerprint, out)
    commit(temporary, out)


def _checksums_of(images: np.ndarray) -> UInt32[np.ndarray, " n"]:
    return np.concatenate([beton.checksums(images[block]) for block in beton.blocks(len(images), images[0].nbytes)])


def _fingerprint_beside(images_npy: Path) -> str | None:
    from spice_dist.data.ingest import read_manifest

    return read_manifest(images_npy.parent).fingerprint if (images_npy.parent / "manifest.json").exists() else None


def page_size_for(num_bytes: int) -> int:
    """Smallest power of two that holds SAMPLES_PER_PAGE samples of `num_bytes`, at least 2 MiB, at most 1 GiB."""
    return min(max(beton.MIN_PAGE, 1 << (SAMPLES_PER_PAGE * num_bytes - 1).bit_length()), 1 << 30)


# ---------------------------------------------------------------- the parent


def _run_child(images_npy: Path, images: np.ndarray, out: Path, progress: Progress | None, silence_s: float) -> None:
    page = page_size_for(images[0].nbytes)
    segment = f"spice_dist_{os.getpid()}_{secrets.token_hex(8)}"
    package = Path(__file__).parents[2]
    environment = {**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": _join(str(package), os.environ.get("PYTHONPATH"))}
    command = [*CHILD, str(images_npy), str(out), str(page), segment]
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, env=environment
        )
        try:
            returncode = _watch(child, out, page, images, progress, silence_s)
        finally:
            _end_group(child)
            Path("/dev/shm", segment).unlink(missing_ok=True)
        if returncode:
            raise UserError(f"the FFCV writer of {out.parent} failed: {_reason(returncode, log)}")


def _watch(
    child: subprocess.Popen[bytes],
    out: Path,
    page: int,
    images: np.ndarray,
    progress: Progress | None,
    silence_s: float,
) -> int:
    """Wait for the child; its return code. UserError when the file has not grown for `silence_s` seconds."""
    per_page = page // images[0].nbytes
    size, since = 0, time.monotonic()
    while (returncode := child.poll()) is None:
        time.sleep(POLL_S)
        now_size = out.stat().st_size if out.exists() else 0
        if now_size != size:
            size, since = now_size, time.monotonic()
            if progress:
                progress(min(max(size // page - 1, 0) * per_page, len(images)), len(images))
        elif time.monotonic() - since > silence_s:
            raise UserError(
                f"the FFCV writer wrote nothing into {out.parent} for {silence_s:g} s and was ended: "
                "is the disk full or the file system stuck? run the command again"
            )
    if progress and not returncode:
        progress(len(images), len(images))
    return returncode


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """End the child and all that it started; they share a session of their own."""
    with contextlib.suppress(ProcessLookupError):  # all of them ended by themselves
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdin:
        child.stdin.close()


def _reason(returncode: int, log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().decode("utf-8", "backslashreplace").splitlines()]
    lines = [line for line in lines if line and "resource_tracker" not in line]  # its complaint comes after the cause
    if any("No space left" in line for line in lines):
        return "the disk is full: free some space and run the command again"
    if returncode < 0:
        return f"killed by signal {-returncode}, usually a lack of memory: give the job more and run it again"
    return lines[-1] if lines else f"exit code {returncode}"


def _join(first: str, second: str | None) -> str:
    return first + os.pathsep + second if second else first


# ---------------------------------------------------------------- the child


class _Samples:
    """What FFCV's writer indexes: (pixels, index)."""

    def __init__(self, images: np.ndarray):
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return np.asarray(self._images[i]), int(i)


def _end_when_the_job_fails(_signal: int, _frame: Any) -> None:
    """SIGCHLD: FFCV counts samples for ever when the process that encodes them has died. WNOWAIT leaves it to reap."""
    ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None or (ended.si_code == os.CLD_EXITED and ended.si_status == 0):
        return
    if ended.si_code != os.CLD_EXITED:
        print(f"the encoding process was killed by signal {ended.si_status}", file=sys.stderr, flush=True)
    os._exit(1)


def _end_with_the_parent() -> None:
    """The parent holds the other end of our standard input: its end of file means that nobody watches any more."""
    os.read(0, 1)  # not sys.stdin: its lock, held while reading, would block the forked process when it closes stdin
    os.killpg(0, signal.SIGKILL)


def _child(images_npy: str, out: str, page_size: str, segment: str) -> None:
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    import ffcv.writer
    from ffcv.fields import IntField, RGBImageField

    def named_segment(create: bool, size: int) -> Any:
        return shared_memory.SharedMemory(segment, create, size)

    # under a name that the parent knows, so that it can be removed whatever happens here
    shared_memory = ffcv.writer.shared_memory
    ffcv.writer.shared_memory = SimpleNamespace(SharedMemory=named_segment)
    signal.signal(signal.SIGCHLD, _end_when_the_job_fails)
    fields = {"image": RGBImageField(write_mode="raw"), "index": IntField()}
    # one worker: with more, the order of pages is a race and the bytes differ from run to run
    writer = ffcv.writer.DatasetWriter(out, fields, page_size=int(page_size), num_workers=1)
    writer.from_indexed_dataset(_Samples(open_npy(Path(images_npy))), chunksize=1000)


if __name__ == "__main__":
    _child(*sys.argv[1:])
