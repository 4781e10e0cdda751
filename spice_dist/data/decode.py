"""One untrusted image -> the bytes that are stored of it; run as a program, many of them in a bounded process.

How pixels become RGB (the rule per Pillow mode):
    RGB                         kept
    1, L                        the grey value three times
    any kind of transparency    composed over white, the page that most such images were drawn for
    P without transparency      its palette
    I;16, I within 0 .. 65535   value / 257, rounded, as grey (16-bit colour is cut to its high byte by Pillow)
    I beyond that, F            refused: they do not say what is white
    CMYK, YCbCr, HSV            Pillow's conversion
Animations give their first frame; EXIF orientation is applied. Then, by the format of the data set:
    raw     the central square, resized to size x size; one whose side is `size` is only cropped
    jpg     the whole image, its shorter side reduced to `size` if it is longer, as JPEG with 4:2:0 colour; a JPEG of
            three 8-bit components that is small enough and upright already is kept byte for byte
Reduced is by a triangle filter as in torchvision's Resize, enlarged bicubically.
A JPEG of four times the size needed or more is decoded at a half, a quarter or an eighth of it, as its format allows.
"""

import hashlib
import io
import json
import os
import resource
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from spice_dist.data.beton import jpeg_size
from spice_dist.data.sources import BadImage, read_file

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # others have a long record of decoder holes
MAX_PIXELS = 50_000_000  # 200 MB decoded as RGBA; peak memory is about three times that
MIN_SIDE, MAX_SIDE = 2, 32_768
MAX_ASPECT = 100  # a strip, whose central square says nothing of it
MAX_STORED_SIDE = 4_096  # longest side of a stored JPEG: a longer one is a strip of little use, and must fit a page
CHILD_BYTES = 1536 << 20  # address space of a decoding process beyond what it has when it starts
ORIENTATION = 0x0112  # EXIF tag


@dataclass(frozen=True)
class Packing:
    """How images are stored."""

    format: str  # "raw" or "jpg"
    size: int  # pixels: side of a raw square, largest shorter side of a JPEG
    quality: int = 90


@dataclass(frozen=True)
class Packed:
    """What is known of a stored image; its bytes travel beside."""

    height: int
    width: int
    crc32: int  # of the stored bytes
    digest: str  # SHA-256 of its pixels before they were stored, hex
    animated: bool = False  # only the first frame was taken
    warned: bool = False  # the decoder complained about the file, but decoded it


def pack_image(data: np.ndarray | bytes, packing: Packing) -> tuple[Packed, bytes] | str:
    """The stored bytes of one image, decoded or not, or the reason why it cannot be used."""
    from PIL import Image, UnidentifiedImageError

    try:
        return _pack(data, packing)
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


def _pack(data: np.ndarray | bytes, packing: Packing) -> tuple[Packed, bytes]:
    if not isinstance(data, bytes):
        return _store(_of_array(data), packing)
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        image, as_stored, animated = _decode(data, packing)
        kept = data if packing.format == "jpg" and as_stored and jpeg_size(data) == image.size[::-1] else None
        packed, stored = _store(image, packing, kept)
    return Packed(**{**asdict(packed), "animated": animated, "warned": bool(complaints)}), stored


def _store(image: "Image.Image", packing: Packing, kept: bytes | None = None) -> tuple[Packed, bytes]:
    if packing.format == "raw":
        pixels = _square(image, packing.size)
        stored = pixels.tobytes()
    else:
        reduced = _reduced(image, packing.size)
        pixels = np.asarray(reduced)
        stored = kept if kept is not None and reduced is image else _jpeg(reduced, packing.quality)
    height, width = pixels.shape[:2]
    return Packed(height, width, zlib.crc32(stored), hashlib.sha256(pixels.data).hexdigest()), stored


def _of_array(array: UInt8[np.ndarray, "..."]) -> "Image.Image":
    from PIL import Image

    if min(array.shape[:2]) < MIN_SIDE:
        raise BadImage(f"{array.shape[1]}x{array.shape[0]} pixels, at least {MIN_SIDE} a side are needed")
    grey = array.reshape(array.shape[:2]) if array.ndim == 2 or array.shape[2] == 1 else None
    rgb = array if grey is None else np.repeat(grey[:, :, None], 3, axis=2)
    return Image.fromarray(np.ascontiguousarray(rgb))


def _decode(data: bytes, packing: Packing) -> tuple["Image.Image", bool, bool]:
    """(RGB image, whether its pixels stand in the file like this, whether there are more frames).

    The size in the header is judged before a single pixel is decoded.
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImage(f"{width}x{height} pixels, at most {MAX_PIXELS // 1_000_000} million are read")
        if min(width, height) < MIN_SIDE or max(width, height) > MAX_SIDE:
            raise BadImage(f"{width}x{height} pixels, sides must be {MIN_SIDE} .. {MAX_SIDE}")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise BadImage(f"{width}x{height} pixels, one side more than {MAX_ASPECT} times the other")
        if image.format == "JPEG" and min(width, height) >= 4 * packing.size:
            wanted = 2 * packing.size / min(width, height)
            image.draft(None, (max(1, int(width * wanted)), max(1, int(height * wanted))))
        animated = image.format != "MPO" and getattr(image, "n_frames", 1) > 1  # MPO: a JPEG with a preview behind it
        image.load()
        try:
            upright = image.getexif().get(ORIENTATION, 1) == 1
            rotated = image if upright else ImageOps.exif_transpose(image)
        except Exception:  # the pixels are decoded: metadata that is damaged is no reason to lose them
            upright, rotated = False, image
        as_stored = image.format == "JPEG" and image.mode == "RGB" and upright
        return _to_rgb(rotated), as_stored, animated


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
    resample = Image.Resampling.BICUBIC if side < size else Image.Resampling.BILINEAR
    return np.array(image.resize((size, size), resample, box=box))


def _reduced(image: "Image.Image", size: int) -> "Image.Image":
    """The whole image with a shorter side of at most `size` and a longer one of at most MAX_STORED_SIDE."""
    from PIL import Image

    scale = min(1.0, size / min(image.size), MAX_STORED_SIDE / max(image.size))
    if scale == 1:
        return image
    width, height = (max(MIN_SIDE, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)


def _jpeg(image: "Image.Image", quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Bombs are errors and truncated files are refused, whatever the process had set."""
    from PIL import Image, ImageFile

    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, MAX_PIXELS  # beyond twice that Pillow raises
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before


# ---------------------------------------------------------------- the child: see decode_pool.py for its parent


def serve(connection: Connection, packing: Packing) -> None:
    """Answer requests until the other end is gone.

    A request is a JSON list with, for each image, the path of a file or null, for which the bytes follow as a message.
    The answer is a JSON list of reasons and Packed, then the bytes of the latter, one message each.
    """
    while True:
        try:
            wanted = json.loads(connection.recv_bytes())
            items = [connection.recv_bytes() if path is None else Path(os.fsdecode(path)) for path in wanted]
        except EOFError:
            return
        results = [_pack_item(item, packing) for item in items]
        about = [result if isinstance(result, str) else asdict(result[0]) for result in results]
        connection.send_bytes(json.dumps(about).encode("ascii"))
        for result in results:
            if not isinstance(result, str):
                connection.send_bytes(result[1])


def _pack_item(item: bytes | Path, packing: Packing) -> tuple[Packed, bytes] | str:
    try:
        return pack_image(item if isinstance(item, bytes) else read_file(item), packing)
    except BadImage as error:
        return str(error)


def _limit_memory() -> None:
    """Address space beyond what is in use now: an image that wants more is a MemoryError, and the node lives."""
    from PIL import Image

    Image.init()  # what is loaded later would count
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + CHILD_BYTES, in_use + CHILD_BYTES))


def _main(descriptor: str, packing: str) -> None:
    _limit_memory()
    with strict_pillow():
        serve(Connection(int(descriptor)), Packing(**json.loads(packing)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
