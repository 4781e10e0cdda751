"""Sharper pictures of the images in the galleries, in WebP: a page shows one where such an image is opened."""

import base64
import io
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from spice_dist.report.gallery import Gallery, ReadImages
from spice_dist.report.sprites import EDGES

EDGE = 224  # px
SHARE = 0.2  # of the megabytes of a page
BYTES_EACH = 1500  # on average over the images of a page, so that a page of 1,000 images stays small
AT_ONCE = 256  # read together: 39 MB of pixels


def make(run: Path, galleries: Sequence[Gallery], images: ReadImages, budget: float) -> dict[int, str]:
    """Return pictures in base64 by the images' index, of at most `budget` bytes: the first ones of all groups first.

    There are none if the run keeps its images no larger than thumbnails.

    Raises:
        UserError, OSError: the images cannot be read.
    """
    order = in_turn(galleries)
    made: dict[int, str] = {}
    for start in range(0, len(order), AT_ONCE):
        chunk = order[start : start + AT_ONCE]
        pixels = images(run, np.array(chunk), EDGE)
        if max(pixels.shape[1:3]) <= EDGES[0]:
            break
        for index, image in zip(chunk, pixels, strict=True):
            text = _encode(image)
            budget -= len(text)
            if budget < 0:
                return made
            made[index] = text
    return made


def in_turn(galleries: Sequence[Gallery]) -> list[int]:
    """List the images of all galleries, each once: the first of every row, then the second of every row."""
    rows = [row for gallery in galleries for row in (gallery.nearest, gallery.uncertain)]
    return list(dict.fromkeys(t.index for turn in zip_longest(*rows) for t in turn if t is not None))


def _encode(image: UInt8[np.ndarray, "H W 3"]) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", quality=72, method=2)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
