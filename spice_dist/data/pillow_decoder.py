"""The same decoding and resizing as FFCV's with Pillow."""

import io

import numpy as np
from jaxtyping import Int64, UInt8

from spice_dist.errors import DamagedFile


class PillowDecoder:
    """`Decoder` whose pixels differ from FFCV's, which takes short cuts in the inverse cosine transform.

    Photographs differ by 2 of 255 on average, single edge pixels of a resized image by up to 40.
    """

    def decode(self, data: bytearray, out: UInt8[np.ndarray, "h w 3"]) -> None:
        """Decode into `out`, whose size the caller has checked; DamagedFile if that fails."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                out[:] = np.asarray(image.convert("RGB"))
        except (OSError, ValueError) as error:
            raise DamagedFile(f"a stored image cannot be decoded ({error}): write the data set again") from error

    def resize(self, pixels: UInt8[np.ndarray, "h w 3"], box: Int64[np.ndarray, "4"], out: np.ndarray) -> None:
        """Cut the box (left, top, width, height) and resize it by Hamming, Pillow's sharpest cheap filter."""
        from PIL import Image

        left, top, width, height = box.tolist()
        corners = (left, top, left + width, top + height)
        size = (out.shape[1], out.shape[0])
        out[:] = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.HAMMING, box=corners))
