"""Untrusted images -> a packed data set: every image is read once, checked, and stored in one .beton.

Decoding is done in bounded children (decode_pool.py) by the rules of decode.py. What is stored is noted in a journal,
80 bytes for each candidate, so that an ingest that was stopped goes on there. Memory: the names of the source, and at
the end about 150 bytes for each image; nothing else grows with their number.
"""

import csv
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spice_dist.data import beton
from spice_dist.data.beton_writer import BetonWriter, page_size_for, publish_beton
from spice_dist.data.decode import MAX_STORED_SIDE, MIN_SIDE, Packed, Packing
from spice_dist.data.decode_pool import packed_in_order
from spice_dist.data.files import Progress, commit, csv_cell, publish, publish_json
from spice_dist.data.sources import Source, listing
from spice_dist.errors import DamagedFile, UserError

MAX_SIZE = 4_096
RAW_SIZE, RAW_BYTES = 128, 8 << 30  # "auto" stores raw squares up to this side and this much in all
NOTE_S = 5.0  # what was done in the last seconds before a crash is done again
BESIDE = {".json": "dataset.beton.json", ".paths.jsonl": "paths.jsonl", ".labels.npy": "labels.npy"}
BESIDE |= {".quarantine.csv": "quarantine.csv"}  # suffix behind the name of a packed file -> name in a folder
LINKED = ("dataset.beton", "dataset.beton.json")
DIGESTS = 2  # what `Packed.digest` is of: a journal with others is not gone on with
RECORD = np.dtype(
    [
        ("kept", "u1"),
        ("animated", "u1"),
        ("warned", "u1"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("crc32", "<u4"),
        ("offset", "<i8"),
        ("size", "<i8"),
        ("digest", "V32"),
        ("reserved", "V21"),
    ]
)


@dataclass(frozen=True)
class Ingested:
    """manifest.json: what a folder of packed images holds."""

    version: int
    n: int
    format: str  # "raw" or "jpg"
    size: int  # pixels: side of the raw squares, largest shorter side of the JPEGs
    source: str
    bad: int  # images that could not be used: rows of quarantine.csv
    animated: int  # images of which only the first frame was taken
    warned: int  # images that the decoder complained about, but decoded
    duplicates: int  # images of which the same is stored as of an earlier one, exactly, in whatever part that is
    dropped: int  # how many of them were left out
    extra: int  # images that only train stages 1 and 3, after the clustered ones
    held_out: int  # images that train nothing and are scored, after those
    listing: str  # of the source and the settings: whether they are the same
    fingerprint: str  # of names, what is stored and their order: see `fingerprint_of`

    @property
    def clustered(self) -> int:
        """How many images, from the first on, the heads are trained on."""
        return self.n - self.extra - self.held_out

    @property
    def training(self) -> int:
        """How many images, from the first on, stages 1 and 3 see."""
        return self.n - self.held_out


def ingest(
    source: Source,
    out_dir: Path,
    *,
    size: int,
    jpeg_side: int | None = None,
    format: str = "auto",
    quality: int = 90,
    max_bad: float = 0.05,
    drop_duplicates: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Ingested:
    """Read all images of `source` into `out_dir`; nothing is done again if the same call has finished before.

    Leaves dataset.beton with its sidecar; paths.jsonl, one ASCII JSON string per image in image order; labels.npy (n,)
    int64 if the source has labels; quarantine.csv (path, reason, bytes); manifest.json, last, as the seal.

    Args:
        size: side in pixels of raw squares.
        jpeg_side: largest shorter side of JPEGs; default `size`.
        format: "raw", "jpg", or "auto": raw up to 128 pixels and 8 GiB.
        quality: of JPEG, 1 .. 100.
        max_bad: largest share of unusable images in [0, 1] with which a run may go on.
        drop_duplicates: leave out exact copies of earlier images; not held-out ones that equal a training image.
        workers: decoding processes; default: the cores that this process may use.

    Raises:
        UserError: too many bad images or no good one (quarantine.csv says why), or the folder cannot be written.
    """
    packing = _packing(source, size, jpeg_side or size, format, quality)
    called = _call(source, packing, drop_duplicates)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        if finished := _finished(out_dir, called):
            _check_share(finished.n + finished.dropped, finished.bad, max_bad, out_dir / "quarantine.csv", "")
            return finished
        journal = _Journal(out_dir / ".ingest", called)
        return _ingest(source, packing, out_dir, called, journal, max_bad, drop_duplicates, workers, progress)
    except OSError as error:
        raise UserError(f"cannot write into {out_dir}: {error.strerror or error}") from error


def _packing(source: Source, size: int, jpeg_side: int, format: str, quality: int) -> Packing:
    for name, value in (("size", size), ("JPEG size", jpeg_side)):
        if not MIN_SIDE <= value <= MAX_SIZE:
            raise UserError(f"image {name} {value} is out of range: give {MIN_SIDE} .. {MAX_SIZE} pixels")
    if format not in ("auto", "raw", "jpg"):
        raise UserError(f"unknown format {format!r}: choose auto, raw or jpg")
    if not 1 <= quality <= 100:
        raise UserError(f"quality is {quality}: give 1 .. 100, such as 90")
    if format == "auto":
        format = "raw" if size <= RAW_SIZE and len(source.paths) * size * size * 3 <= RAW_BYTES else "jpg"
    return Packing(format, size if format == "raw" else jpeg_side, quality)


def _call(source: Source, packing: Packing, drop_duplicates: bool) -> str:
    """The same for calls that give the same data set."""
    return hashlib.sha256(json.dumps([listing(source), asdict(packing), drop_duplicates, DIGESTS]).encode()).hexdigest()


def _finished(out_dir: Path, called: str) -> Ingested | None:
    """The manifest of an equal call whose files are still there."""
    try:
        manifest = read_manifest(out_dir)
    except DamagedFile:
        return None
    whole = all((out_dir / name).exists() for name in ("dataset.beton", "dataset.beton.json", "paths.jsonl"))
    return manifest if whole and manifest.listing == called else None


def _ingest(
    source: Source,
    packing: Packing,
    out_dir: Path,
    called: str,
    journal: "_Journal",
    max_bad: float,
    drop_duplicates: bool,
    workers: int | None,
    progress: Progress | None,
) -> Ingested:
    for name in ("manifest.json", "labels.npy"):  # break the seal of an earlier call before anything of it changes
        (out_dir / name).unlink(missing_ok=True)
    total = len(source.paths)
    raw = packing.format == "raw"
    page_size = page_size_for(packing.size**2 * 3 if raw else MAX_STORED_SIDE * packing.size)
    writer = BetonWriter(journal.folder / "pages", total, page_size, journal.resume_at)
    try:
        _store_all(source, packing, workers or len(os.sched_getaffinity(0)), writer, journal, progress)
        records, reasons = journal.read()
        bad = [(path, reason, None) for path, reason in source.refused]
        bad += [(source.paths[i], reason, i) for i, reason in reasons]
        kept = np.flatnonzero(records["kept"])
        first_held_out = total - source.held_out
        first_extra = first_held_out - source.extra
        # a held-out image that equals a training image is counted, but never left out
        parts = (kept[kept < first_held_out], kept[kept >= first_held_out]) if drop_duplicates else ()
        copies = {i: first for part in parts for i, first in _copies(records, part).items()}
        dropped = list(copies)
        duplicates = len(_copies(records, kept))
        listed = bad + [(source.paths[i], f"duplicate of {source.paths[copies[i]]}", i) for i in dropped]
        _write_quarantine(out_dir / "quarantine.csv", source, listed)
        example = bad[0][1] if bad else ""
        _check_share(len(kept), len(bad), max_bad, out_dir / "quarantine.csv", example)

        kept = np.setdiff1d(kept, dropped)
        stored = records[kept]
        sizes = (stored[name].astype(kind) for name, kind in (("offset", np.int64), ("size", np.int64)))
        writer.finish(packing.format, stored["height"].astype(np.uint16), stored["width"].astype(np.uint16), *sizes)
        names = [source.paths[i] for i in kept]
        fingerprint = fingerprint_of(names, stored["digest"])
        publish_beton(writer.path, out_dir / "dataset.beton", stored["crc32"].astype(np.uint32), fingerprint)
    finally:
        writer.close()

    with publish(out_dir / "paths.jsonl") as file:
        file.writelines(json.dumps(name).encode("ascii") + b"\n" for name in names)
    if source.labels is not None:
        with publish(out_dir / "labels.npy") as file:
            np.save(file, source.labels[kept].astype(np.int64), allow_pickle=False)
    manifest = Ingested(
        version=2,
        n=len(kept),
        format=packing.format,
        size=packing.size,
        source=source.name,
        bad=len(bad),
        animated=int(stored["animated"].sum()),
        warned=int(stored["warned"].sum()),
        duplicates=duplicates,
        dropped=len(dropped),
        extra=int(((kept >= first_extra) & (kept < first_held_out)).sum()),
        held_out=int((kept >= first_held_out).sum()),
        listing=called,
        fingerprint=fingerprint,
    )
    publish_json(out_dir / "manifest.json", asdict(manifest))
    shutil.rmtree(journal.folder)
    return manifest


def _store_all(
    source: Source, packing: Packing, workers: int, writer: BetonWriter, journal: "_Journal", progress: Progress | None
) -> None:
    total, done = len(source.paths), journal.done
    noted_at = time.monotonic()
    try:
        for i, result in enumerate(packed_in_order(source, packing, workers, done), done):
            if isinstance(result, str):
                journal.refuse(i, result)
            elif len(result[1]) > writer.page_size:
                journal.refuse(i, f"{len(result[1]) >> 20} MiB as JPEG, too large to store")
            else:
                packed, data = result
                journal.keep(packed, writer.append(data), len(data))
            if time.monotonic() - noted_at > NOTE_S:
                writer.flush()
                journal.flush()
                noted_at = time.monotonic()
            if progress:
                progress(i + 1, total)
    finally:  # stopped by a signal or an error: what is done is kept
        writer.flush()
        journal.flush()


class _Journal:
    """What became of each candidate so far: a record each, and the reasons of the refused ones as JSON lines."""

    def __init__(self, folder: Path, called: str):
        """Take up the journal of an equal call, or start one."""
        self.folder = folder
        self._records, self._reasons, about = folder / "records", folder / "reasons.jsonl", folder / "call.json"
        there = about.exists() and about.read_text() == json.dumps(called)
        # without its pages: stopped between the file's new name and the manifest
        if not (there and self._records.exists() and self._reasons.exists() and (folder / "pages").exists()):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for file in (self._records, self._reasons, folder / "pages"):
                file.touch()
            about.write_text(json.dumps(called))
        self._buffer: list[bytes] = []
        self._refused: list[bytes] = []
        self.done = self._records.stat().st_size // RECORD.itemsize
        os.truncate(self._records, self.done * RECORD.itemsize)
        records, reasons = self.read()
        lines = [json.dumps(entry).encode() + b"\n" for entry in reasons]
        self._reasons.write_bytes(b"".join(lines))
        ends = np.where(records["kept"] == 1, records["offset"] + records["size"], 0)
        self.resume_at = int(ends.max()) if ends.any() else 0
        if not (self.resume_at <= (folder / "pages").stat().st_size and len(reasons) == (records["kept"] == 0).sum()):
            raise DamagedFile(f"{folder} is damaged: delete it and run the command again")

    def keep(self, packed: Packed, offset: int, size: int) -> None:
        record = np.zeros(1, RECORD)
        record[0] = (
            *(1, packed.animated, packed.warned, packed.height, packed.width, packed.crc32, offset, size),
            *(bytes.fromhex(packed.digest), bytes(21)),
        )
        self._buffer.append(record.tobytes())

    def refuse(self, i: int, reason: str) -> None:
        self._buffer.append(bytes(RECORD.itemsize))
        self._refused.append(json.dumps([i, reason]).encode() + b"\n")

    def flush(self) -> None:
        """To the disk, reasons first: a record without its reason would not be told from a kept one."""
        for path, lines in ((self._reasons, self._refused), (self._records, self._buffer)):
            if lines:
                with open(path, "ab") as file:
                    file.write(b"".join(lines))
                    file.flush()
                    os.fsync(file.fileno())
                lines.clear()

    def read(self) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """(a record for each candidate so far, (candidate, reason) of the refused ones)."""
        records = np.fromfile(self._records, RECORD)
        reasons = {}
        for line in self._reasons.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):  # a torn last line belongs to a candidate without a record
                i, reason = json.loads(line)
                reasons[i] = reason
        return records, [(i, reason) for i, reason in sorted(reasons.items()) if i < len(records)]


def _copies(records: np.ndarray, part: np.ndarray) -> dict[int, int]:
    """Candidate of `part` -> the first one there of which the same is stored: see `Packed.digest`."""
    _, first, group = np.unique(records[["height", "width", "digest"]][part], return_index=True, return_inverse=True)
    original = part[first[group]]
    different = original != part
    return dict(zip(part[different].tolist(), original[different].tolist(), strict=True))


# ---------------------------------------------------------------- one file instead of a folder


def pack(source: Source, out: Path, **options: Any) -> Ingested:
    """`ingest` with these options into one file, `out`, with what belongs to it as `out`.json, `out`.paths.jsonl, ...

    Works in a hidden folder beside it, so that the same call goes on where it was stopped, and does nothing once it has
    finished.
    """
    if out.suffix != ".beton":
        raise UserError(f"{out} does not end with .beton: give a name such as {out.stem or 'images'}.beton")
    size = options["size"]
    kind = (options.get("jpeg_side") or size, options.get("format", "auto"), options.get("quality", 90))
    if out.exists() and manifest_path(out).exists():
        finished, packing = manifest_beside(out), _packing(source, size, *kind)
        if finished.listing == _call(source, packing, options.get("drop_duplicates", False)):
            beton.verify(out)
            return finished
    folder = out.parent / f".{out.name}.packing"
    manifest = ingest(source, folder, **options)
    try:
        for suffix in (*BESIDE, ".manifest.json"):
            _beside(out, suffix).unlink(missing_ok=True)
        for suffix, name in BESIDE.items():
            if (folder / name).exists():
                commit(folder / name, _beside(out, suffix))
        commit(folder / "dataset.beton", out)
        commit(folder / "manifest.json", _beside(out, ".manifest.json"))  # last: it makes the set complete
        shutil.rmtree(folder)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    return manifest


def adopt(packed: Path, out_dir: Path) -> Ingested:
    """Make `out_dir` the folder of a data set that `pack` wrote: links to the file, copies of the lists.

    Raises:
        UserError: the file is not one of ours.
        DamagedFile: it is, but it or what belongs to it is damaged.
    """
    manifest = manifest_beside(packed)
    if beton.verify(packed).fingerprint != manifest.fingerprint:
        raise DamagedFile(f"{packed} does not belong to its manifest: pack the images again")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name in ("manifest.json", "labels.npy"):
            (out_dir / name).unlink(missing_ok=True)
        for suffix, name in {**BESIDE, "": "dataset.beton", ".manifest.json": "manifest.json"}.items():
            found = _beside(packed.absolute(), suffix)
            if name in LINKED:
                (out_dir / name).unlink(missing_ok=True)
                (out_dir / name).symlink_to(found)
            elif found.exists():
                shutil.copyfile(found, out_dir / name)
    except OSError as error:
        raise UserError(f"cannot write into {out_dir}: {error.strerror or error}") from error
    return manifest


def packed_source(packed: Path) -> Source:
    """The images of a file that `pack` wrote, by the names that they had."""
    manifest = manifest_beside(packed)
    names, labels = _read_paths(_beside(packed, ".paths.jsonl")), _beside(packed, ".labels.npy")
    samples = beton.Samples(beton.verify(packed))
    crc32 = samples.info.crc32
    return Source(
        str(packed.absolute()),
        names,
        (lambda i: samples.raw(np.array([i]))[0])
        if manifest.format == "raw"
        else (lambda i: bytes(samples.encoded(i))),
        np.load(labels, allow_pickle=False) if labels.exists() else None,
        encoded=manifest.format != "raw",
        stamps=lambda i: "" if crc32 is None else str(crc32[i]),
        extra=manifest.extra,
        held_out=manifest.held_out,
    )


def manifest_beside(packed: Path) -> Ingested:
    path = manifest_path(packed)
    if not path.exists():
        raise UserError(
            f"{packed} was not packed by this program: {path.name} is not beside it; "
            "pack the images again, or read it as untrusted images with --trust-foreign-beton"
        )
    return _read_manifest(path)


def manifest_path(packed: Path) -> Path:
    """Where the manifest of a file that `pack` wrote is."""
    return _beside(packed, ".manifest.json")


def _beside(packed: Path, suffix: str) -> Path:
    return packed.with_name(packed.name + suffix)


# ---------------------------------------------------------------- what belongs to a data set


def read_manifest(folder: Path) -> Ingested:
    """The manifest of a folder that `ingest` filled; DamagedFile if it is missing, altered or of another version."""
    return _read_manifest(folder / "manifest.json")


def _read_manifest(path: Path) -> Ingested:
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or content.get("version") != 2:
            raise ValueError("another version")
        manifest = Ingested(**content)
        if min(manifest.clustered, manifest.size) < 1 or len(manifest.fingerprint) != 64:
            raise ValueError("values out of range")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DamagedFile(f"{path} is not a finished manifest ({error}): delete the folder and pack again") from error
    return manifest


def read_paths(folder: Path) -> list[str]:
    """The name of every image, in image order, exactly as the source gave it."""
    return _read_paths(folder / "paths.jsonl")


def _read_paths(path: Path) -> list[str]:
    try:
        return [json.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{path} is unreadable ({error}): pack again") from error


def fingerprint_of(names: list[str], digests: Any) -> str:
    """SHA-256 over, for each image: length of its name, its name, its `Packed.digest` (32 bytes)."""
    total = hashlib.sha256()
    for name, digest in zip(names, digests, strict=True):
        encoded = os.fsencode(name)
        total.update(len(encoded).to_bytes(8, "little") + encoded + bytes(digest))
    return total.hexdigest()


def _write_quarantine(path: Path, source: Source, bad: Sequence[tuple[str, str, int | None]]) -> None:
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["path", "reason", "bytes"])
    for name, reason, i in bad:
        rows.writerow([csv_cell(name), csv_cell(reason), "" if i is None else _bytes_of(source, i)])
    with publish(path) as file:
        file.write(text.getvalue().encode("utf-8"))


def _bytes_of(source: Source, i: int) -> int | str:
    """Size of the file of candidate i, if it is one that can be asked."""
    try:
        return source.file(i).lstat().st_size if source.file else ""
    except OSError:
        return ""


def _check_share(num_good: int, num_bad: int, max_bad: float, quarantine: Path, example: str) -> None:
    total = num_good + num_bad
    if num_good == 0:
        raise UserError(f"none of the {total} images can be used, e.g. {example}: see {quarantine}")
    if num_bad > max_bad * total:
        raise UserError(
            f"{num_bad} of {total} images cannot be used, more than the {max_bad:.1%} allowed: see {quarantine}; "
            "repair them, or raise the limit with --max-bad"
        )
