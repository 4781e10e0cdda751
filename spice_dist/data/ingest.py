"""Untrusted images -> a packed data set: every image is read once, checked, and stored in one .beton.

Decoding is done in bounded children (decode_pool.py) by the rules of decode.py. What is stored is noted in a journal
(journal.py), so that an ingest that was stopped goes on there. Memory: the names of the source, and at the end about
150 bytes for each image; nothing else grows with their number.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from spice_dist.data import beton
from spice_dist.data.beton_writer import BetonWriter, publish_beton
from spice_dist.data.checksums import differing, publish_sealed, sha256
from spice_dist.data.decode import LEAST_BITS, MAX_MEGAPIXELS, MIN_SIDE, Packing
from spice_dist.data.files import Progress, csv_line, path_cell, publish, publish_json, text_cell
from spice_dist.data.journal import JOURNAL, RECORD, Journal, page_size_of, read_call, store
from spice_dist.data.manifest import Ingested, fingerprint_of, read_manifest
from spice_dist.data.pieces import PIECES, Pieces
from spice_dist.data.sources import Source, digest_of_image, hash_of_contents, listing
from spice_dist.errors import DamagedFile, UserError

MAX_SIZE, MOST_MEGAPIXELS = 4_096, 1_000
RAW_SIZE, RAW_BYTES = 128, 8 << 30  # "auto" stores raw squares up to this side and this much in all
HASHED = 1 << 30  # bytes of a packed file that are read to see whether it is whole
LISTS = ("paths.jsonl", "labels.npy", "classes.json", "quarantine.csv")  # whose digests the manifest holds
OF_LABELS = ("labels.npy", "classes.json")
SEAL = ("manifest.json", *OF_LABELS)
DIGEST_RULE = 3  # which bytes `Packed.digest` hashes: a journal of another rule is started anew


def ingest(
    source: Source,
    out_dir: Path,
    *,
    size: int,
    jpeg_side: int | None = None,
    format: str = "auto",
    quality: int = 90,
    grey_bits: int = 0,
    max_megapixels: int = MAX_MEGAPIXELS,
    fit: str = "crop",
    max_bad: float = 0.05,
    drop_duplicates: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Ingested:
    """Read all images of `source` into `out_dir`; nothing is done again if the same call has finished before.

    Leaves dataset.beton with its sidecar; paths.jsonl, one ASCII JSON string per image in image order; labels.npy (n,)
    int64 and classes.json, the names of the classes, if the source has labels; quarantine.csv (path, reason, bytes);
    manifest.json, last, as the seal.

    Args:
        size: side in pixels of raw squares.
        jpeg_side: largest shorter side of JPEGs; default `size`.
        format: "raw", "jpg", or "auto": raw up to 128 pixels and 8 GiB.
        quality: of JPEG, 1 .. 100.
        grey_bits: white is 2^bits - 1 in 16-bit greys, 1 .. 16; 0: as many bits as those of the source use.
        max_megapixels: larger images are not read; JPEGs may have five times as many.
        fit: "crop": squares are central ones; "squash": they are the whole images, distorted.
        max_bad: largest share of unusable images in [0, 1] with which a run may go on.
        drop_duplicates: leave out exact copies of earlier images; not held-out ones that equal a training image.
        workers: decoding processes; default: the cores that this process may use.

    Raises:
        UserError: too many bad images or no good one (quarantine.csv says why), the folder cannot be written, or the
            source is a file that was packed with another `fit`.
    """
    call = call_with(
        source,
        out_dir,
        size=size,
        jpeg_side=jpeg_side,
        format=format,
        quality=quality,
        grey_bits=grey_bits,
        max_megapixels=max_megapixels,
        fit=fit,
        max_bad=max_bad,
        drop_duplicates=drop_duplicates,
    )
    return call.carry_out(workers or len(os.sched_getaffinity(0)), progress)


def call_with(
    source: Source, out_dir: Path, *, max_bad: float = 0.05, drop_duplicates: bool = False, **options: Any
) -> "Call":
    """Return the call of `ingest` with these options, which is not carried out yet; raise what it raises for them."""
    packing = checked_packing(source, **options)
    return Call(source, out_dir, packing, call_hash_of(source, packing, drop_duplicates), drop_duplicates, max_bad)


@dataclass(frozen=True)
class Call:
    """A call of `ingest` whose options are checked."""

    source: Source
    out_dir: Path
    packing: Packing  # its grey_bits as asked for
    call_hash: str
    drop_duplicates: bool
    max_bad: float

    @property
    def pieces(self) -> Pieces:
        """The pieces that several workers may store of it."""
        return Pieces(self.out_dir, self.call_hash, len(self.source.paths))

    def finished(self) -> Ingested | None:
        """Return the manifest of an equal call whose files are still there."""
        try:
            manifest = read_manifest(self.out_dir)
        except DamagedFile:
            return None
        is_whole = all(
            (self.out_dir / name).exists() for name in ("dataset.beton", "dataset.beton.json", "paths.jsonl")
        )
        is_equal = manifest.listing == self.call_hash
        return manifest if is_whole and is_equal and not damaged_files(self.out_dir) else None

    def done(self, grey_bits: int) -> int:
        """Return how many of the first candidates the data set has already, with these bits or more."""
        journal = read_call(self.out_dir / JOURNAL / "call.json")
        if journal["hash"] != self.call_hash or journal["grey_bits"] < grey_bits:
            return 0
        return (self.out_dir / JOURNAL / "records").stat().st_size // RECORD.itemsize

    def carry_out(self, processes: int, progress: Progress | None) -> Ingested:
        """Do what `ingest` says in so many decoding processes."""
        out_dir, max_bad, quarantine = self.out_dir, self.max_bad, self.out_dir / "quarantine.csv"
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            if finished := self.finished():
                _check_share(finished.n + finished.dropped, finished.bad, max_bad, quarantine, "")
                return finished
            for name in SEAL:  # break the seal of an earlier call before anything of it changes
                (out_dir / name).unlink(missing_ok=True)
            manifest = self._made(processes, progress)
            shutil.rmtree(out_dir / JOURNAL)
            shutil.rmtree(out_dir / PIECES, ignore_errors=True)
            return manifest
        except OSError as error:
            raise UserError(f"cannot write into {out_dir}: {error.strerror or error}") from error

    def _made(self, processes: int, progress: Progress | None) -> Ingested:
        source, pieces, quarantine = self.source, self.pieces, self.out_dir / "quarantine.csv"
        fixed, total = self.packing.grey_bits, len(source.paths)
        bits = fixed or max(LEAST_BITS, pieces.grey_bits())
        while True:  # once more for each image whose greys need more bits than those before it
            journal = Journal(self.out_dir / JOURNAL, self.call_hash, bits)
            scaled = replace(self.packing, grey_bits=journal.grey_bits)
            writer = BetonWriter(journal.folder / "pages", total, page_size_of(scaled), journal.resume_at)
            results = pieces.results(source, scaled, processes, journal.done)
            with closing(writer), closing(results):
                bits = store(results, scaled, writer, journal, fixed > 0, pieces.drop, _out_of(total, progress))
                if bits == scaled.grey_bits:
                    outcome = _outcome(source, journal, self.drop_duplicates)
                    _write_quarantine(quarantine, source, outcome)
                    example = outcome.bad[0][1] if outcome.bad else ""
                    _check_share(outcome.num_good, len(outcome.bad), self.max_bad, quarantine, example)
                    return _publish_all(self.out_dir, source, scaled, self.call_hash, writer, outcome)


def _out_of(total: int, progress: Progress | None) -> Callable[[int], None] | None:
    return progress and (lambda done: progress(done, total))


def checked_packing(
    source: Source,
    *,
    size: int,
    jpeg_side: int | None = None,
    format: str = "auto",
    quality: int = 90,
    grey_bits: int = 0,
    max_megapixels: int = MAX_MEGAPIXELS,
    fit: str = "crop",
    **_: Any,
) -> Packing:
    """Return how `ingest` stores images when it is called with these options; the others do not matter.

    Raises:
        UserError: an option is out of range, or the source is a file that was packed with another `fit`.
    """
    jpeg_side = jpeg_side or size
    require_fit(source, fit, source.name)
    for name, value in (("size", size), ("JPEG size", jpeg_side)):
        if not MIN_SIDE <= value <= MAX_SIZE:
            raise UserError(f"image {name} {value} is out of range: give {MIN_SIDE} .. {MAX_SIZE} pixels")
    if format not in ("auto", "raw", "jpg"):
        raise UserError(f"unknown format {format!r}: choose auto, raw or jpg")
    if not 1 <= quality <= 100:
        raise UserError(f"quality is {quality}: give 1 .. 100, such as 90")
    if not 0 <= grey_bits <= 16:
        raise UserError(f"data.grey_bits is {grey_bits}: give 1 .. 16, or 0, as many as the images use")
    if not 1 <= max_megapixels <= MOST_MEGAPIXELS:
        raise UserError(f"--max-megapixels is {max_megapixels}: give 1 .. {MOST_MEGAPIXELS} million pixels")
    format = stored_format(format, size, len(source.paths))
    return Packing(format, size if format == "raw" else jpeg_side, quality, grey_bits, max_megapixels, fit)


def require_fit(images: Source | Ingested, fit: str, data: str) -> None:
    """Raise a UserError if the images are packed, and with another fit."""
    if images.fit not in ("", fit):
        raise UserError(
            f"{data} was packed with --fit {images.fit}, but data.fit is {fit}: pack the images again with "
            f"--fit {fit}, or train with --set data.fit={images.fit}"
        )


def stored_format(wanted: str, size: int, images: int) -> str:
    """Choose "raw" or "jpg" where `wanted` is "auto"."""
    if wanted != "auto":
        return wanted
    return "raw" if size <= RAW_SIZE and images * size * size * 3 <= RAW_BYTES else "jpg"


def call_hash_of(source: Source, packing: Packing, drop_duplicates: bool) -> str:
    """Hash what a data set depends on: equal calls give equal data sets."""
    content = [listing(source), asdict(packing), drop_duplicates, DIGEST_RULE]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def damaged_files(folder: Path) -> list[str]:
    """Return which files of a packed data set are missing or altered; labels, which are not packed, do not count.

    The packed file is hashed up to HASHED bytes. In a larger one each image is compared when it is read.
    """
    try:
        manifest = read_manifest(folder)
    except DamagedFile:
        return ["manifest.json"]
    try:
        info = beton.verify(folder / "dataset.beton")
    except DamagedFile:
        return ["dataset.beton"]
    packed = {"dataset.beton": info.sha256} if info.sha256 and info.file_size <= HASHED else {}
    lists = {name: digest for name, digest in manifest.sha256.items() if name not in OF_LABELS}
    return differing(folder, lists | packed)


@dataclass(frozen=True)
class _Outcome:
    """What became of the candidates, the images of a source by their number there."""

    bad: list[tuple[str, str, int | None]]  # (path, reason, candidate) of those that cannot be used
    copies: dict[int, int]  # candidate that is left out -> the earlier one that it equals
    num_good: int  # candidates that can be used, copies among them
    num_duplicates: int  # of these, how many equal an earlier one, training or held out
    images: np.ndarray  # (n,) candidate of each image of the data set
    records: np.ndarray  # (n,) RECORD of each
    content: str  # as `sources.content_of`


def _outcome(source: Source, journal: Journal, drop_duplicates: bool) -> _Outcome:
    records, reasons = journal.read()
    bad: list[tuple[str, str, int | None]] = [(path, reason, None) for path, reason in source.refused]
    bad += [(source.paths[i], reason, i) for i, reason in reasons]
    good = np.flatnonzero(records["stored"])
    copies: dict[int, int] = {}
    if drop_duplicates:
        # a held-out image that equals a training image is counted, but never left out
        copies |= _copies(records, good[good < source.training])
        copies |= _copies(records, good[good >= source.training])
    images = np.setdiff1d(good, list(copies))
    content = _content(source, records, [i for i, _ in reasons])
    return _Outcome(bad, copies, len(good), len(_copies(records, good)), images, records[images], content)


def _content(source: Source, records: np.ndarray, refused: list[int]) -> str:
    """Compute `sources.content_of` from what is known of the stored images; only the refused ones are read again."""
    if not source.encoded:
        return ""
    digests = [bytes(digest) for digest in records["source"]]
    for i in refused:
        digests[i] = digest_of_image(source, i)
    return hash_of_contents(source.paths, digests)


def _copies(records: np.ndarray, candidates: np.ndarray) -> dict[int, int]:
    """Map each of the candidates that equals an earlier one to the first of these: see `Packed.digest`."""
    content = records[["height", "width", "digest"]][candidates]
    _, first, group = np.unique(content, return_index=True, return_inverse=True)
    original = candidates[first[group]]
    is_copy = original != candidates
    return dict(zip(candidates[is_copy].tolist(), original[is_copy].tolist(), strict=True))


def _publish_all(
    out_dir: Path, source: Source, packing: Packing, call_hash: str, writer: BetonWriter, outcome: _Outcome
) -> Ingested:
    """Write all files of the data set but the quarantine list, the manifest last."""
    images, records = outcome.images, outcome.records
    sides = (records[name].astype(np.uint16) for name in ("height", "width"))
    places = (records[name].astype(np.int64) for name in ("offset", "size"))
    writer.finish(packing.format, *sides, *places)
    names = [source.paths[i] for i in images]
    fingerprint = fingerprint_of(names, records["digest"])
    publish_beton(writer.path, out_dir / "dataset.beton", records["crc32"].astype(np.uint32), fingerprint)
    with publish(out_dir / "paths.jsonl") as file:
        file.writelines(json.dumps(name).encode("ascii") + b"\n" for name in names)
    if source.labels is not None:
        with publish(out_dir / "labels.npy") as file:
            np.save(file, source.labels[images].astype(np.int64), allow_pickle=False)
        publish_json(out_dir / "classes.json", source.label_names)
    is_extra = (images >= source.clustered) & (images < source.training)
    manifest = Ingested(
        version=2,
        n=len(images),
        format=packing.format,
        size=packing.size,
        source=source.name,
        bad=len(outcome.bad),
        animated=int(records["animated"].sum()),
        warned=int(records["warned"].sum()),
        duplicates=outcome.num_duplicates,
        dropped=len(outcome.copies),
        extra=int(is_extra.sum()),
        held_out=int((images >= source.training).sum()),
        listing=call_hash,
        fingerprint=fingerprint,
        content=outcome.content,
        ignored=source.ignored,
        closed=len(source.refused),
        pages=int(records["pages"].sum()),
        faint=int(records["faint"].sum()),
        grey_bits=packing.grey_bits if records["grey_bits"].any() else 0,
        fit=packing.fit,
        sha256={name: sha256(out_dir / name) for name in LISTS if (out_dir / name).exists()},
    )
    publish_sealed(out_dir / "manifest.json", asdict(manifest))
    return manifest


def _write_quarantine(path: Path, source: Source, outcome: _Outcome) -> None:
    """List what is left out: (path, reason, bytes) of bad images, then of duplicates."""
    duplicates = [(source.paths[i], f"duplicate of {source.paths[first]}", i) for i, first in outcome.copies.items()]
    with publish(path) as file:
        file.write(csv_line(["path", "reason", "bytes"]).encode())
        for name, reason, i in [*outcome.bad, *duplicates]:
            size = "" if i is None else _bytes_of(source, i)
            file.write(csv_line([path_cell(name), text_cell(reason), size]).encode())


def _bytes_of(source: Source, i: int) -> int | str:
    """Return the size of the file of candidate i; empty for other sources and missing files."""
    try:
        return source.file(i).lstat().st_size if source.file else ""
    except (OSError, ValueError):
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
