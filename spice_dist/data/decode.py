"""One untrusted image -> the bytes that are stored of it; run as a program, many of them in a bounded process.

How pixels become RGB (the rule per Pillow mode):
    RGB                         as it is
    1, L                        the grey value three times
    any kind of transparency    composed over white, the page that most such images were drawn for
    P without transparency      its palette
    I;16, I within 0 .. 65535   value / 257, rounded, as grey (16-bit colour is cut to its high byte by Pillow)
    I beyond that, F            refused: they do not say what is white
    CMYK, YCbCr, HSV            Pillow's conversion
Animations give their first frame; EXIF orientation is applied. Then, by the format of the data set:
    raw     the central square, resized to size x size; one whose side is `size` is only cropped
    jpg     the whole image, its shorter side reduced to `size` if it is longer, as JPEG with 4:2:0 colour; a JPEG of
            three 8-bit components that is small enough and upright already is stored byte for byte
A triangle filter reduces, as in torchvision's Resize; a bicubic one enlarges.
A JPEG of four times the size needed or more is decoded at a half, a quarter or an eighth of it, as its format allows.
One that is stored unchanged is decoded at an eighth, to check it: that reads all of its compressed data.
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
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
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
    """Facts about a stored image, without its bytes."""

    height: int
    width: int
    crc32: int  # of the stored bytes
    digest: str  # SHA-256, hex, of what is stored, metadata aside: pixels, or a JPEG without EXIF, comments, ...
    animated: bool = False  # only the first frame was taken
    warned: bool = False  # the decoder complained about the file, but decoded it


def pack_image(data: np.ndarray | bytes, packing: Packing) -> tuple[Packed, bytes] | str:
    """Return the facts and the bytes to store of one image, or the reason why it cannot be used."""
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
    with warnings.catch_warnings(record=True) as complaints, _opened(data) as image:
        warnings.simplefilter("always")
        animated = _is_animated(image)
        if packing.format == "jpg" and _is_fit(image, data, packing.size):
            packed, stored = _keep(image, data), data
        else:
            packed, stored = _store(_decode(image, packing.size), packing)
    return replace(packed, animated=animated, warned=bool(complaints)), stored


def _store(image: "Image.Image", packing: Packing) -> tuple[Packed, bytes]:
    if packing.format == "raw":
        height = width = packing.size
        stored = _square(image, packing.size).tobytes()
    else:
        reduced = _reduced(image, packing.size)
        width, height = reduced.size
        stored = _jpeg(reduced, packing.quality)
    return Packed(height, width, zlib.crc32(stored), hashlib.sha256(stored).hexdigest()), stored


def _of_array(array: UInt8[np.ndarray, "..."]) -> "Image.Image":
    from PIL import Image

    if min(array.shape[:2]) < MIN_SIDE:
        raise BadImage(f"{array.shape[1]}x{array.shape[0]} pixels, at least {MIN_SIDE} a side are needed")
    grey = array.reshape(array.shape[:2]) if array.ndim == 2 or array.shape[2] == 1 else None
    rgb = array if grey is None else np.repeat(grey[:, :, None], 3, axis=2)
    return Image.fromarray(np.ascontiguousarray(rgb))


@contextmanager
def _opened(data: bytes) -> Iterator["Image.Image"]:
    """Open an image without decoding a pixel; BadImage if its header states a size that is out of range."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImage(f"{width}x{height} pixels, at most {MAX_PIXELS // 1_000_000} million are read")
        if min(width, height) < MIN_SIDE or max(width, height) > MAX_SIDE:
            raise BadImage(f"{width}x{height} pixels, sides must be {MIN_SIDE} .. {MAX_SIDE}")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise BadImage(f"{width}x{height} pixels, one side more than {MAX_ASPECT} times the other")
        yield image


def _decode(image: "Image.Image", size: int) -> "Image.Image":
    """Return the first frame, upright and in RGB."""
    from PIL import ImageOps

    if image.format == "JPEG" and min(image.size) >= 4 * size:
        scale = 2 * size / min(image.size)
        image.draft(None, (max(1, int(image.width * scale)), max(1, int(image.height * scale))))
    image.load()
    with suppress(Exception):  # the pixels are decoded: metadata that is damaged is no reason to lose them
        image = image if _is_upright(image) else ImageOps.exif_transpose(image)
    return _to_rgb(image)


def _is_animated(image: "Image.Image") -> bool:
    return image.format != "MPO" and getattr(image, "n_frames", 1) > 1  # MPO: a JPEG with a preview behind it


def _is_upright(image: "Image.Image") -> bool:
    return image.getexif().get(ORIENTATION, 1) == 1


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
    """Reduce the image to a shorter side of at most `size` and a longer one of at most MAX_STORED_SIDE."""
    from PIL import Image

    scale = min(1.0, size / min(image.size), MAX_STORED_SIDE / max(image.size))
    if scale == 1:
        return image
    width, height = (max(MIN_SIDE, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)


def _is_fit(image: "Image.Image", data: bytes, size: int) -> bool:
    """Return whether the file can be stored as it is: an upright, small JPEG of three 8-bit components."""
    if image.format != "JPEG" or image.mode != "RGB" or jpeg_size(data) != (image.height, image.width):
        return False
    if min(image.size) > size or max(image.size) > MAX_STORED_SIDE:
        return False
    try:
        return _is_upright(image)
    except Exception:  # damaged metadata: stored anew, without it
        return False


def _keep(image: "Image.Image", data: bytes) -> Packed:
    """Decode a JPEG that is stored as it is, to check it, and return the facts about it."""
    width, height = image.size
    image.draft(None, (max(1, width // 8), max(1, height // 8)))
    image.load()
    return Packed(height, width, zlib.crc32(data), _digest_of_jpeg(data))


def _digest_of_jpeg(data: bytes) -> str:
    """Hash a file that has a `jpeg_size` by SHA-256, without the segments that do not affect its pixels."""
    total = hashlib.sha256()
    position = 2
    while (marker := data[position + 1]) != 0xDA:
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        segment = data[position:end]
        # the presence of a JFIF segment determines the colours, its density does not
        if marker == 0xE0 and segment[4:9] == b"JFIF\0":
            total.update(segment[4:9])
        elif not 0xE0 <= marker <= 0xEF and marker != 0xFE or marker == 0xEE and segment[4:9] == b"Adobe":
            total.update(segment)
        position = end
    total.update(memoryview(data)[position:])
    return total.hexdigest()


def _jpeg(image: "Image.Image", quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Make Pillow refuse bombs and truncated files, whatever the process had set."""
    from PIL import Image, ImageFile

    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, MAX_PIXELS  # beyond twice that Pillow raises
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before


# ---------------------------------------------------------------- the child: see decode_pool.py for its parent


def serve(connection: Connection, packing: Packing) -> None:
    """Answer requests until the other end closes.

    A request is a JSON list with, for each image, the path of a file or null, for which the bytes follow as a message.
    The answer is a JSON list of reasons and Packed, then the bytes of the latter, one message each.
    """
    while True:
        try:
            paths = json.loads(connection.recv_bytes())
            items = [connection.recv_bytes() if path is None else Path(os.fsdecode(path)) for path in paths]
        except EOFError:
            return
        results = [_pack_item(item, packing) for item in items]
        answers = [result if isinstance(result, str) else asdict(result[0]) for result in results]
        connection.send_bytes(json.dumps(answers).encode("ascii"))
        for result in results:
            if not isinstance(result, str):
                connection.send_bytes(result[1])


def _pack_item(item: bytes | Path, packing: Packing) -> tuple[Packed, bytes] | str:
    try:
        return pack_image(item if isinstance(item, bytes) else read_file(item), packing)
    except BadImage as error:
        return str(error)


def _limit_memory() -> None:
    """Limit the address space beyond its present use: a larger image is a MemoryError instead of a dead node."""
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
