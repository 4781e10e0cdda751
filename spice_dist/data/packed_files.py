"""A packed data set as one file with its lists beside it: written, referred to by a run folder, read as a source."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from spice_dist.data import beton
from spice_dist.data.files import commit
from spice_dist.data.ingest import LISTS, SEAL, call_hash_of, checked_packing, ingest
from spice_dist.data.manifest import Ingested, beside, list_beside, manifest_beside, manifest_path, names_beside
from spice_dist.data.sources import Source
from spice_dist.errors import DamagedFile, UserError

# suffix behind the name of a packed file -> name in a folder
BESIDE = {
    ".json": "dataset.beton.json",
    ".paths.jsonl": "paths.jsonl",
    ".labels.npy": "labels.npy",
    ".classes.json": "classes.json",
    ".quarantine.csv": "quarantine.csv",
}
LINKED = ("dataset.beton", "dataset.beton.json")


def pack(source: Source, out: Path, into: Callable[..., Ingested] = ingest, **options: Any) -> Ingested:
    """Ingest with these options into one file, `out`; what belongs to it is `out`.json, `out`.paths.jsonl, ...

    It works in a hidden folder beside `out`, laid out as that of a run. The same call goes on where it was stopped and
    does nothing once it has finished.

    Args:
        into: called as `ingest`; it may do the same on other workers.
    """
    if out.suffix != ".beton":
        raise UserError(f"{out} does not end with .beton: give a name such as {out.stem or 'images'}.beton")
    if out.exists() and manifest_path(out).exists() and beton.is_ours(out):
        finished, packing = manifest_beside(out), checked_packing(source, **options)
        if finished.listing == call_hash_of(source, packing, options.get("drop_duplicates", False)):
            beton.verify(out)
            return finished
    folder = out.parent / f".{out.name}.packing/data"
    manifest = into(source, folder, **options)
    try:
        for suffix in (*BESIDE, ".manifest.json"):
            beside(out, suffix).unlink(missing_ok=True)
        for suffix, name in BESIDE.items():
            if (folder / name).exists():
                commit(folder / name, beside(out, suffix))
        commit(folder / "dataset.beton", out)
        commit(folder / "manifest.json", beside(out, ".manifest.json"))  # last: it makes the set complete
        shutil.rmtree(folder.parent)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    return manifest


def adopt(packed: Path, out_dir: Path) -> Ingested:
    """Make `out_dir` the folder of a data set that `pack` wrote: links to the file, copies of the lists.

    Links are relative, so that the file and the folder can be moved together.

    Raises:
        UserError: `pack` did not write the file.
        DamagedFile: the file or what belongs to it is damaged.
    """
    manifest = manifest_beside(packed)
    if beton.verify(packed).fingerprint != manifest.fingerprint:
        raise DamagedFile(f"{packed} does not belong to its manifest: pack the images again")
    for name in LISTS:
        list_beside(packed, name)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name in SEAL:
            (out_dir / name).unlink(missing_ok=True)
        for suffix, name in {**BESIDE, "": "dataset.beton", ".manifest.json": "manifest.json"}.items():
            original = beside(packed.absolute(), suffix)
            if name in LINKED:
                (out_dir / name).unlink(missing_ok=True)
                (out_dir / name).symlink_to(os.path.relpath(os.path.realpath(original), os.path.realpath(out_dir)))
            elif original.exists():
                shutil.copyfile(original, out_dir / name)
    except OSError as error:
        raise UserError(f"cannot write into {out_dir}: {error.strerror or error}") from error
    return manifest


def packed_source(packed: Path) -> Source:
    """Return the images of a file that `pack` wrote as a source, by the names that they had."""
    manifest = manifest_beside(packed)
    names, labels = names_beside(packed), list_beside(packed, "labels.npy")
    classes = list_beside(packed, "classes.json")
    samples = beton.Samples(beton.verify(packed))
    is_raw, crc32 = manifest.format == "raw", samples.info.crc32

    def read(i: int) -> np.ndarray | bytes:
        return samples.raw(np.array([i]))[0] if is_raw else bytes(samples.encoded(i))

    return Source(
        str(packed.absolute()),
        names,
        read,
        np.load(labels, allow_pickle=False) if labels.exists() else None,
        json.loads(classes.read_text()) if classes.exists() else [],
        encoded=not is_raw,
        stamps=lambda i: "" if crc32 is None else str(crc32[i]),
        extra=manifest.extra,
        held_out=manifest.held_out,
        fit=manifest.fit,
    )
