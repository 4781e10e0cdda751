"""Untrusted images -> clean pixels: every image is read once, checked, and made RGB uint8 of one size.

How pixels become RGB (the rule per Pillow mode):
    RGB                         kept
    1, L                        the grey value three times
    any kind of transparency    composed over white, the page that most such images were drawn for
    P without transparency      its palette
    I;16, I within 0 .. 65535   value / 257, rounded, as grey (16-bit colour is cut to its high byte by Pillow)
    I beyond that, F            refused: they do not say what is white
    CMYK, YCbCr, HSV            Pillow's conversion
Animations give their first frame; EXIF orientation is applied. Then the central square is resized to size x size
(bicubic, antialiased); an image whose shorter side is `size` already is only cropped, so its pixels are untouched.
"""

import csv
import hashlib
import io
import json
import os
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from spice_dist.data.files import Progress, csv_cell, publish, publish_json
from spice_dist.data.sources import BadImage, Source
from spice_dist.errors import DamagedFile, UserError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # others have a long record of decoder holes
MAX_PIXELS = 50_000_000  # 200 MB decoded as RGBA; peak memory is about three times that for each thread
MIN_SIDE, MAX_SIDE = 2, 32_768
MAX_SIZE = 4_096


@dataclass(frozen=True)
class Ingested:
    """manifest.json: what a folder of clean images holds."""

    version: int
    n: int
    size: int
    source: str
    bad: int  # rows of quarantine.csv
    duplicates: int  # images whose pixels equal an earlier one's, exactly
    fingerprint: str  # of names, pixels and their order: see `fingerprint_of`


def ingest(
    source: Source, size: int, out_dir: Path, max_bad: float = 0.05, progress: Progress | None = None
) -> Ingested:
    """Read all images of `source` into `out_dir`; memory beyond the names does not grow with their number.

    Leaves images.npy (n, size, size, 3) uint8; paths.jsonl, one ASCII JSON string per image in image order;
    labels.npy (n,) int64 if the source has labels; quarantine.csv (path, reason); manifest.json, last, as the seal.

    Args:
        size: side in pixels of the square images that are kept.
        max_bad: largest share of unusable images in [0, 1] with which a run may go on.

    Raises:
        UserError: too many bad images or no good one (quarantine.csv says why), or the folder cannot be written.
    """
    if not MIN_SIDE <= size <= MAX_SIZE:
        raise UserError(f"image size {size} is out of range: give {MIN_SIDE} .. {MAX_SIZE} pixels")
    _clear(out_dir)
    kept: list[int] = []
    bad = list(source.refused)
    total = len(source.paths)
    digests = np.empty((total, 32), np.uint8)
    with publish(out_dir / "images.npy") as file:
        file.write(_npy_header(total, size))
        for i, result in enumerate(_in_order(source, size)):
            if isinstance(result, str):
                bad.append((source.paths[i], result))
            else:
                pixels, digest = result
                file.write(pixels.data)
                digests[len(kept)] = np.frombuffer(digest, np.uint8)
                kept.append(i)
            if progress:
                progress(i + 1, total)
        _write_quarantine(out_dir / "quarantine.csv", bad)
        _check_share(len(kept), bad, max_bad, out_dir / "quarantine.csv")
        file.seek(0)
        file.write(_npy_header(len(kept), size))  # of the same length: NumPy leaves room for the first axis

    names = [source.paths[i] for i in kept]
    with publish(out_dir / "paths.jsonl") as file:
        file.writelines(json.dumps(name).encode("ascii") + b"\n" for name in names)
    if source.labels is not None:
        with publish(out_dir / "labels.npy") as file:
            np.save(file, source.labels[kept].astype(np.int64), allow_pickle=False)
    digests = digests[: len(kept)]
    duplicates = len(kept) - len(np.unique(digests, axis=0))
    manifest = Ingested(1, len(kept), size, source.name, len(bad), duplicates, fingerprint_of(names, digests))
    publish_json(out_dir / "manifest.json", asdict(manifest))
    return manifest


def read_manifest(folder: Path) -> Ingested:
    """The manifest of a folder that `ingest` filled; DamagedFile if it is missing, altered or of another version."""
    path = folder / "manifest.json"
    try:
        manifest = Ingested(**json.loads(path.read_bytes()))
        if manifest.version != 1 or min(manifest.n, manifest.size) < 1 or len(manifest.fingerprint) != 64:
            raise ValueError("values out of range")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DamagedFile(f"{path} is not a finished manifest ({error}): delete the folder and pack again") from error
    return manifest


def read_paths(folder: Path) -> list[str]:
    """The name of every image, in image order, exactly as the source gave it."""
    try:
        return [json.loads(line) for line in (folder / "paths.jsonl").read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{folder / 'paths.jsonl'} is unreadable ({error}): pack again") from error


def fingerprint_of(names: list[str], digests: UInt8[np.ndarray, "n 32"]) -> str:
    """SHA-256 over, for each image: length of its name, its name, SHA-256 of its pixels."""
    total = hashlib.sha256()
    for name, digest in zip(names, digests, strict=True):
        encoded = os.fsencode(name)
        total.update(len(encoded).to_bytes(8, "little") + encoded + digest.tobytes())
    return total.hexdigest()


def check_fingerprint(folder: Path) -> None:
    """Read images.npy whole and compare it, with the names, with the manifest; DamagedFile if anything differs."""
    manifest = read_manifest(folder)
    try:
        images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
        joined = b"".join(hashlib.sha256(image.data).digest() for image in images)
        digests = np.frombuffer(joined, np.uint8).reshape(len(images), 32)
        same = fingerprint_of(read_paths(folder), digests) == manifest.fingerprint
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{folder / 'images.npy'} is unreadable ({error}): pack again") from error
    if not same:
        raise DamagedFile(f"{folder} holds other pixels or names than its manifest says: pack again")


# ---------------------------------------------------------------- one image


def to_pixels(data: np.ndarray | bytes, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """One image, decoded or not, by the rules on top of this file; BadImage or a decoder's error otherwise."""
    if isinstance(data, bytes):
        return _square(_decode(data), size)
    from PIL import Image

    if min(data.shape[:2]) < MIN_SIDE:
        raise BadImage(f"{data.shape[1]}x{data.shape[0]} pixels, at least {MIN_SIDE} a side are needed")
    grey = data.reshape(data.shape[:2]) if data.ndim == 2 or data.shape[2] == 1 else None
    rgb = data if grey is None else np.repeat(grey[:, :, None], 3, axis=2)
    return _square(Image.fromarray(np.ascontiguousarray(rgb)), size)


def _decode(data: bytes) -> "Image.Image":
    """An RGB image. The size in the header is judged before a single pixel is decoded."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImage(f"{width}x{height} pixels, at most {MAX_PIXELS // 1_000_000} million are read")
        if min(width, height) < MIN_SIDE or max(width, height) > MAX_SIDE:
            raise BadImage(f"{width}x{height} pixels, sides must be {MIN_SIDE} .. {MAX_SIDE}")
        image.load()
        try:
            rotated = ImageOps.exif_transpose(image)
        except Exception:  # the pixels are decoded: metadata that is damaged is no reason to lose them
            rotated = image
        return _to_rgb(rotated)


def _to_rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65_535:
            raise BadImage("32-bit pixels beyond 0 .. 65535 do not say what is white: convert to 8 bit")
        return Image.fromarray(((values * 2 + 257) // 514).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage("floating-point pixels do not say what is white: convert to 8 bit")
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colour.size, (255, 255, 255, 255)), colour).convert("RGB")
    return image.convert("RGB")


def _square(image: "Image.Image", size: int) -> UInt8[np.ndarray, "size size 3"]:
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    if side == size:
        return np.array(image.crop(box))
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


# ---------------------------------------------------------------- all images


def _in_order(source: Source, size: int) -> Iterator[tuple[np.ndarray, bytes] | str]:
    """For each image in turn (pixels, SHA-256 of them), or the reason why not. A few are decoded ahead, in threads."""
    threads = min(8, len(os.sched_getaffinity(0)))
    ahead: deque[Future[tuple[np.ndarray, bytes] | str]] = deque()
    pool = ThreadPoolExecutor(threads, "ingest")
    try:
        with _strict_pillow():
            for i in range(len(source.paths)):
                ahead.append(pool.submit(_read_one, source, i, size))
                if len(ahead) >= 4 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read_one(source: Source, i: int, size: int) -> tuple[np.ndarray, bytes] | str:
    from PIL import Image, UnidentifiedImageError

    try:
        pixels = to_pixels(source.read(i), size)
    except BadImage as error:
        return str(error)
    except UnidentifiedImageError:
        return f"not a readable image of the formats {', '.join(FORMATS)}"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return f"more than {MAX_PIXELS // 1_000_000} million pixels"
    except MemoryError:
        return "decoding needs more memory than there is"
    except Exception as error:  # decoders raise anything on hostile input: one image must not stop the run
        return f"cannot decode: {error or type(error).__name__}"
    return pixels, hashlib.sha256(pixels.data).digest()


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Bomb warnings are errors and truncated files are refused, whatever the process had set. Filters are global."""
    from PIL import Image, ImageFile

    before = ImageFile.LOAD_TRUNCATED_IMAGES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _clear(out_dir: Path) -> None:
    """Break the seal of an earlier run before anything of it changes."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name in ("manifest.json", "labels.npy"):
            (out_dir / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {out_dir}: {error.strerror}") from error


def _npy_header(n: int, size: int) -> bytes:
    header = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": (n, size, size, 3)}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def _write_quarantine(path: Path, bad: list[tuple[str, str]]) -> None:
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["path", "reason"])
    rows.writerows([csv_cell(name), csv_cell(reason)] for name, reason in bad)
    with publish(path) as file:
        file.write(text.getvalue().encode("utf-8"))


def _check_share(num_good: int, bad: list[tuple[str, str]], max_bad: float, quarantine: Path) -> None:
    total = num_good + len(bad)
    if num_good == 0:
        raise UserError(f"none of the {total} images can be used, e.g. {bad[0][1]}: see {quarantine}")
    if len(bad) > max_bad * total:
        raise UserError(
            f"{len(bad)} of {total} images cannot be used, more than the {max_bad:.1%} allowed: see {quarantine}; "
            "repair them, or raise the limit with --max-bad"
        )
