"""One untrusted image -> the bytes that are stored of it; run as a program, many of them in a bounded process.

How pixels become RGB (the rule per Pillow mode):
    RGB                         as it is
    1, L                        the grey value three times
    any kind of transparency    composed over white, the page that most such images were drawn for
    P without transparency      its palette
    I;16, I within 0 .. 65535   grey, with 2^bits - 1 as white: see `Packing.grey_bits`; 0 is white where a TIFF says so
                                (16-bit colour is cut to its high byte by Pillow)
    I beyond that, F            refused: they do not say what is white
    CMYK, YCbCr, HSV            Pillow's conversion
Animations and TIFFs give their first frame or page; EXIF orientation is applied. Then, by the format of the data set:
    raw     the central square, resized to size x size; one whose side is `size` is only cropped
    jpg     the whole image, its shorter side reduced to `size` if it is longer, as JPEG with 4:2:0 colour; a JPEG of
            three 8-bit components that is small enough and upright already is stored byte for byte
So it is with fit "crop". With "squash" the whole image is resized to a square of side `size`, and a JPEG is never
larger than its longer side: whoever reads the data set finds squares.
A triangle filter reduces, as in torchvision's Resize; a bicubic one enlarges.
A JPEG of four times the size needed or more is decoded at a half, a quarter or an eighth of it, as its format allows.
One that is stored unchanged is decoded at an eighth, to check it: that reads all of its compressed data.
"""

import hashlib
import io
import json
import os
import resource
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from spice_dist.data.beton import MAX_STORED_SIDE, jpeg_size
from spice_dist.data.left_out import HEIC_HINT
from spice_dist.data.sources import BadImage, file_digest, read_file

if TYPE_CHECKING:
    from PIL import Image

# what becomes the square that a network sees
FITS = {"crop": "the largest central square", "squash": "the whole image, its sides not kept in proportion"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # others have a long record of decoder holes
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
MAX_MEGAPIXELS = 50  # 200 MB decoded as RGBA; peak memory is about three times that
JPEG_FACTOR = 5  # a JPEG may have as many times more pixels: it is decoded at an eighth of its sides or so
MIN_SIDE, MAX_SIDE = 2, 32_768
MAX_ASPECT = 100  # a strip, whose central square says nothing of it
CHILD_BYTES = 1536 << 20  # address space of a decoding process beyond what it has when it starts
MEGAPIXEL_BYTES = 24 << 20  # more for each million pixels above MAX_MEGAPIXELS
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 0x0112, 0x0102, 0x0106  # EXIF and TIFF tags
LEAST_BITS = 8  # of white in 16-bit greys, when the images say it
FAINT = 24  # an image whose values differ by less shows nothing: it is black, white or of one colour


@dataclass(frozen=True)
class Packing:
    """How images are stored."""

    format: str  # "raw" or "jpg"
    size: int  # pixels: side of a raw square, largest shorter side of a JPEG
    quality: int = 90
    grey_bits: int = 16  # white is 2^bits - 1 in 16-bit greys; 0: as many bits as the image itself uses, LEAST_BITS up
    max_megapixels: int = MAX_MEGAPIXELS  # a larger image is refused, a JPEG from JPEG_FACTOR times as many on
    fit: str = "crop"  # one of FITS


@dataclass(frozen=True)
class Packed:
    """Facts about a stored image, without its bytes."""

    height: int
    width: int
    crc32: int  # of the stored bytes
    digest: str  # SHA-256, hex, of what is stored, metadata aside: pixels, or a JPEG without EXIF, comments, ...
    animated: bool = False  # only the first frame was taken
    warned: bool = False  # the decoder complained about the file, but decoded it
    source: str = ""  # the file's `file_digest`, hex
    pages: int = 0  # of a TIFF, after the one that was taken
    grey_bits: int = 0  # that its 16-bit greys use
    faint: bool = False  # values of each channel differ by less than FAINT


def pack_image(data: np.ndarray | bytes, packing: Packing) -> tuple[Packed, bytes] | str:
    """Return the facts and the bytes to store of one image, or the reason why it cannot be used."""
    from PIL import Image, UnidentifiedImageError

    try:
        return _pack(data, packing)
    except BadImage as error:
        return str(error)
    except UnidentifiedImageError:
        if isinstance(data, bytes) and data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS and "HEIF" not in formats():
            return HEIC_HINT
        return f"not a readable image of the formats {', '.join(formats())}"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return f"more than {packing.max_megapixels} million pixels: raise --max-megapixels"
    except MemoryError:
        return "decoding needs more memory than there is"
    except Exception as error:  # decoders raise anything on hostile input: one image must not stop the run
        return f"cannot decode: {error or type(error).__name__}"


@cache
def formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats that are read; HEIC is one where pillow-heif is installed."""
    try:
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]
    except ImportError:
        return FORMATS
    register_heif_opener()
    return (*FORMATS, "HEIF")


def _pack(data: np.ndarray | bytes, packing: Packing) -> tuple[Packed, bytes]:
    if not isinstance(data, bytes):
        return _store(_of_array(data), packing)
    readable, is_negative = _positive(data)
    with warnings.catch_warnings(record=True) as complaints, _opened(readable, packing) as image:
        warnings.simplefilter("always")
        frames, is_tiff = _frames(image), image.format == "TIFF"
        grey_bits = 0
        if packing.format == "jpg" and _is_fit(image, data, packing):
            packed, stored = _keep(image, data), data
        else:
            rgb, grey_bits = _decode(image, packing, is_negative)
            packed, stored = _store(rgb, packing)
    about = replace(
        packed,
        animated=frames > 1 and not is_tiff,
        warned=bool(complaints),
        source=file_digest(data).hex(),
        pages=min(frames - 1, 65_535) if is_tiff else 0,
        grey_bits=grey_bits,
    )
    return about, stored


def _store(image: "Image.Image", packing: Packing) -> tuple[Packed, bytes]:
    if packing.format == "raw":
        height = width = packing.size
        square = _square(image, packing)
        stored, faint = square.tobytes(), bool((np.ptp(square, axis=(0, 1)) < FAINT).all())
    else:
        reduced = _reduced(image, packing)
        width, height = reduced.size
        stored, faint = _jpeg(reduced, packing.quality), _is_faint(reduced)
    return Packed(height, width, zlib.crc32(stored), hashlib.sha256(stored).hexdigest(), faint=faint), stored


def _is_faint(rgb: "Image.Image") -> bool:
    return all(high - low < FAINT for low, high in rgb.getextrema())  # pyright: ignore[reportGeneralTypeIssues]


def _of_array(array: UInt8[np.ndarray, "..."]) -> "Image.Image":
    from PIL import Image

    if min(array.shape[:2]) < MIN_SIDE:
        raise BadImage(f"{array.shape[1]}x{array.shape[0]} pixels, at least {MIN_SIDE} a side are needed")
    grey = array.reshape(array.shape[:2]) if array.ndim == 2 or array.shape[2] == 1 else None
    rgb = array if grey is None else np.repeat(grey[:, :, None], 3, axis=2)
    return Image.fromarray(np.ascontiguousarray(rgb))


@contextmanager
def _opened(data: bytes, packing: Packing) -> Iterator["Image.Image"]:
    """Open an image without decoding a pixel; BadImage if its header states a size that is out of range."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=formats()) as image:
        width, height = image.size
        most = packing.max_megapixels * (JPEG_FACTOR if image.format in ("JPEG", "MPO") else 1)
        if width * height > most * 1_000_000:
            limit = f"at most {most} million are read of this format: raise --max-megapixels"
            raise BadImage(f"{width}x{height} pixels, {limit} from {packing.max_megapixels}")
        if min(width, height) < MIN_SIDE or max(width, height) > MAX_SIDE:
            raise BadImage(f"{width}x{height} pixels, sides must be {MIN_SIDE} .. {MAX_SIDE}")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise BadImage(f"{width}x{height} pixels, one side more than {MAX_ASPECT} times the other")
        yield image


def _decode(image: "Image.Image", packing: Packing, is_negative: bool) -> tuple["Image.Image", int]:
    """Return the first frame, upright and in RGB, and how many bits its 16-bit greys use."""
    from PIL import ImageOps

    if image.format in ("JPEG", "MPO") and min(image.size) >= 4 * packing.size:
        scale = 2 * packing.size / min(image.size)
        image.draft(None, (max(1, int(image.width * scale)), max(1, int(image.height * scale))))
    image.load()
    with suppress(Exception):  # the pixels are decoded: metadata that is damaged is no reason to lose them
        image = image if _is_upright(image) else ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return _of_deep_grey(image, packing.grey_bits, is_negative)
    return _to_rgb(image), 0


def _frames(image: "Image.Image") -> int:
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a JPEG with a preview behind it


def _positive(data: bytes) -> tuple[bytes, bool]:
    """Return a 16-bit TIFF whose white is 0 as one whose black is 0, and whether it was one.

    Pillow reads it without inverting it, or in big-endian order not at all.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None or len(data) < 10:
        return data, False
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    bits, place = 0, 0
    with suppress(struct.error):  # Pillow says what is wrong with such a file
        (count,) = struct.unpack_from(f"{order}H", data, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", data, at)
            bits = value if tag == BITS_PER_SAMPLE else bits
            place = at + 8 if tag == PHOTOMETRIC and value == 0 else place
    if not place or bits != 16:
        return data, False
    return data[:place] + struct.pack(f"{order}H", 1) + data[place + 2 :], True


def _of_deep_grey(image: "Image.Image", bits: int, is_negative: bool) -> tuple["Image.Image", int]:
    """Return 16-bit greys, or 32-bit ones within 0 .. 65535, in RGB, and how many bits they use."""
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65_535:
        raise BadImage("32-bit pixels beyond 0 .. 65535 do not say what is white: convert to 8 bit")
    used = int(values.max()).bit_length()
    white = (1 << (bits or max(used, LEAST_BITS))) - 1
    values = values.clip(max=white)
    if is_negative:
        values = white - values
    return Image.fromarray(((values * 510 + white) // (2 * white)).astype(np.uint8)).convert("RGB"), used


def _is_upright(image: "Image.Image") -> bool:
    return image.getexif().get(ORIENTATION, 1) == 1


def _to_rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if image.mode == "F":
        raise BadImage("floating-point pixels do not say what is white: convert to 8 bit")
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colour.size, (255, 255, 255, 255)), colour).convert("RGB")
    return image.convert("RGB")


def _square(image: "Image.Image", packing: Packing) -> UInt8[np.ndarray, "size size 3"]:
    from PIL import Image

    side, size = min(image.size), packing.size
    width, height = image.size if packing.fit == "squash" else (side, side)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    box = (left, top, left + width, top + height)
    if width == height == size:
        return np.array(image.crop(box))
    resample = Image.Resampling.BICUBIC if side < size else Image.Resampling.BILINEAR
    return np.array(image.resize((size, size), resample, box=box))


def _reduced(image: "Image.Image", packing: Packing) -> "Image.Image":
    """Reduce the image to the size at which its JPEG is stored, sides of at most MAX_STORED_SIDE."""
    from PIL import Image

    if packing.fit == "squash":
        width = height = min(packing.size, max(image.size))
    else:
        scale = min(1.0, packing.size / min(image.size), MAX_STORED_SIDE / max(image.size))
        width, height = (max(MIN_SIDE, round(side * scale)) for side in image.size)
    if (width, height) == image.size:
        return image
    return image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)


def _is_fit(image: "Image.Image", data: bytes, packing: Packing) -> bool:
    """Return whether the file can be stored as it is: an upright, small JPEG of three 8-bit components."""
    if image.format != "JPEG" or image.mode != "RGB" or jpeg_size(data) != (image.height, image.width):
        return False
    if min(image.size) > packing.size or max(image.size) > MAX_STORED_SIDE:
        return False
    if packing.fit == "squash" and image.width != image.height:
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
    return Packed(height, width, zlib.crc32(data), _digest_of_jpeg(data), faint=_is_faint(image))


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
def strict_pillow(max_megapixels: int = MAX_MEGAPIXELS) -> Iterator[None]:
    """Make Pillow refuse bombs and truncated files, whatever the process had set."""
    from PIL import Image, ImageFile

    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    # beyond that Pillow warns, beyond twice that it raises; `_opened` is stricter where the format is known
    Image.MAX_IMAGE_PIXELS = max_megapixels * JPEG_FACTOR * 1_000_000
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


def _limit_memory(max_megapixels: int = MAX_MEGAPIXELS) -> None:
    """Limit the address space beyond its present use: a larger image is a MemoryError instead of a dead node."""
    from PIL import Image

    Image.init()  # what is loaded later would count
    formats()
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = in_use + CHILD_BYTES + MEGAPIXEL_BYTES * max(0, max_megapixels - MAX_MEGAPIXELS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _main(descriptor: str, packing: str) -> None:
    wanted = Packing(**json.loads(packing))
    _limit_memory(wanted.max_megapixels)
    with strict_pillow(wanted.max_megapixels):
        serve(Connection(int(descriptor)), wanted)


if __name__ == "__main__":
    _main(*sys.argv[1:])
