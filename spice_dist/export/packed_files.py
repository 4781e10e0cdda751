"""The packed images of a run as files: the stored JPEG, or the stored pixels as PNG."""

import io
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from spice_dist import artifacts
from spice_dist.data import beton


@dataclass(frozen=True)
class PackedFiles:
    """The images of a verified packed file."""

    info: beton.BetonInfo

    @property
    def suffix(self) -> str:
        return ".png" if self.info.format == "raw" else ".jpg"

    @property
    def meaning(self) -> str:
        """Say what the files hold."""
        if self.info.format != "raw":
            return "the packed JPEG"
        return f"the packed pixels, {self.info.widths[0]} x {self.info.heights[0]}, as PNG"

    def size(self, index: int) -> int:
        """Return the bytes of the stored image, about the most that its file takes."""
        return int(self.info.sizes[index])

    def contents(self, indices: list[int]) -> Iterator[bytes]:
        """Yield the files of the images, checked by their checksums; DamagedFile if one differs."""
        with closing(beton.Samples(self.info)) as samples:
            for index in indices:
                stored = samples.encoded(index)
                yield bytes(stored) if self.info.format != "raw" else png(self._pixels(index, stored))

    def _pixels(self, index: int, stored: bytearray) -> UInt8[np.ndarray, "h w 3"]:
        return np.frombuffer(stored, np.uint8).reshape(self.info.heights[index], self.info.widths[index], 3)


def open_packed(run: Path) -> PackedFiles:
    return PackedFiles(beton.verify(artifacts.packed_file(run)))


def png(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Encode as PNG, grey where the three channels are equal."""
    from PIL import Image

    grey = bool((pixels == pixels[..., :1]).all())
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[..., 0] if grey else pixels)).save(buffer, "PNG")
    return buffer.getvalue()
