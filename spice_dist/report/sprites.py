"""Thumbnails of the images of a page, many on one picture: sheets of COLUMNS x COLUMNS tiles."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from spice_dist.data.files import publish
from spice_dist.report.gallery import PIXELATED_BELOW, ReadImages

COLUMNS = 16
PER_SHEET = COLUMNS**2
SHEETS_AT_ONCE = 10  # read together: 71 MB of pixels at 96 px
EDGES = (96, 64)  # px of a tile: the first whose sheets fit
BYTES_EACH = 3000  # most for a tile of the larger size, so that a page of 1,000 images stays small
RUN_TOGETHER = 64  # images of one cluster that lie side by side; the first sheets hold the typical ones of all


@dataclass(frozen=True)
class Sheets:
    tile: int  # px
    kind: str  # the media type
    pixelated: bool  # shown with hard pixels
    inside: list[bytes]  # the first sheets, which the page holds
    outside: list[bytes]  # the other ones, which lie beside it

    @property
    def count(self) -> int:
        return len(self.inside) + len(self.outside)


def places(labels: Int[np.ndarray, " S"]) -> Int[np.ndarray, " S"]:
    """Return each image's tile, of images that come by cluster: the first of every cluster on the first sheets."""
    starts = np.r_[0, np.flatnonzero(np.diff(labels)) + 1]
    rank = np.arange(len(labels)) - np.repeat(starts, np.diff(np.r_[starts, len(labels)]))
    order = np.lexsort((rank, labels, rank // RUN_TOGETHER))
    place = np.empty(len(labels), np.int64)
    place[order] = np.arange(len(labels))
    return place


def make(
    run: Path, shown: Int[np.ndarray, " S"], place: Int[np.ndarray, " S"], images: ReadImages, budget: int
) -> Sheets:
    """Make the sheets of the images `shown`; those beyond `budget` bytes of text go beside the page.

    Raises:
        UserError, OSError: the images cannot be read.
    """
    large: list[bytes] = []
    small: list[bytes] = []
    height = EDGES[0]
    for tiles in _tiles(run, shown[np.argsort(place)], images):
        height = tiles.shape[1]
        large.append(_encode(tiles, min(EDGES[0], height)))
        small.append(large[-1] if height <= EDGES[1] else _encode(tiles, EDGES[1]))
    fits = _text_bytes(large) <= min(budget, BYTES_EACH * len(shown) + PER_SHEET * BYTES_EACH)
    return _split(min(EDGES[0 if fits else 1], height), large if fits else small, budget)


def _split(tile: int, sheets: list[bytes], budget: int) -> Sheets:
    inside = 0
    while inside < len(sheets) and _text_bytes(sheets[: inside + 1]) <= budget:
        inside += 1
    pixelated = tile < PIXELATED_BELOW
    return Sheets(tile, "image/png" if pixelated else "image/webp", pixelated, sheets[:inside], sheets[inside:])


def _text_bytes(sheets: list[bytes]) -> int:
    return sum(-(-len(sheet) // 3) * 4 for sheet in sheets)


def _tiles(run: Path, indices: Int[np.ndarray, " S"], images: ReadImages) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
    for start in range(0, len(indices), SHEETS_AT_ONCE * PER_SHEET):
        pixels = images(run, indices[start : start + SHEETS_AT_ONCE * PER_SHEET], EDGES[0])
        yield from (pixels[first : first + PER_SHEET] for first in range(0, len(pixels), PER_SHEET))


def _encode(tiles: UInt8[np.ndarray, "n H W 3"], edge: int) -> bytes:
    """Encode tiles as one picture of COLUMNS x COLUMNS squares of `edge` px: PNG if they are small, else WebP."""
    from PIL import Image

    height, width = tiles.shape[1:3]
    whole = np.zeros((PER_SHEET, height, width, 3), np.uint8)
    whole[: len(tiles)] = tiles
    rows = whole.reshape(COLUMNS, COLUMNS, height, width, 3).transpose(0, 2, 1, 3, 4)
    picture = Image.fromarray(rows.reshape(COLUMNS * height, COLUMNS * width, 3))
    if (height, width) != (edge, edge):
        # a box filter, because no wider one keeps tiles apart
        picture = picture.resize((COLUMNS * edge, COLUMNS * edge), Image.Resampling.BOX)
    buffer = io.BytesIO()
    if edge < PIXELATED_BELOW:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "WEBP", quality=72, method=2)
    return buffer.getvalue()


def write_beside(sheets: Sheets, folder: Path) -> None:
    """Write the sheets that the page does not hold to `folder`, and remove those of an earlier page."""
    for stale in folder.glob("sheet-*.*"):
        stale.unlink()
    if sheets.outside and not folder.is_dir():
        folder.mkdir()
    for number, sheet in enumerate(sheets.outside, len(sheets.inside)):
        with publish(folder / f"sheet-{number}.{sheets.kind.split('/')[1]}") as file:
            file.write(sheet)
