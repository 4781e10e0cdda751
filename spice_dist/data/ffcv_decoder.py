"""FFCV's native JPEG decoder and area resizing, called without the GIL, on bytes whose checksum has been compared.

Of stock FFCV 1.0.2 the format and the native code are used, not its Loader: that hangs its consumer when its thread
fails, leaks a thread per early break, does not check indices, takes no given order, compiles for seconds, draws its
crops from a generator without a seed, and ignores the decoder's return code, which leaves another image's pixels in the
buffer.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8

from spice_dist.errors import DamagedFile


def why_no_ffcv() -> str | None:
    """Return None where FFCV can be imported, else one line that says what to install."""
    try:
        _native()
    except Exception as error:  # a missing system library is an OSError, an incompatible numba nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"FFCV cannot be imported ({reason}): pip install 'spice_dist[ffcv]' (it needs OpenCV and libjpeg-turbo)"
    return None


@cache
def _native() -> Any:
    """Return FFCV's compiled functions. Importing them sets torch to one thread, which is undone."""
    threads = torch.get_num_threads()
    try:
        import ffcv.libffcv

        return ffcv.libffcv
    finally:
        torch.set_num_threads(threads)


class FFCVDecoder:
    """`Decoder` with libjpeg-turbo and OpenCV as FFCV links them."""

    def decode(self, data: bytearray, out: UInt8[np.ndarray, "h w 3"]) -> None:
        """Decode into `out`, whose size the caller has checked; DamagedFile if that fails."""
        height, width = out.shape[:2]
        encoded = np.frombuffer(data, np.uint8)
        if _native().imdecode(encoded, out, height, width, height, width):
            raise DamagedFile("a stored image cannot be decoded: write the data set again")

    def resize(self, pixels: UInt8[np.ndarray, "h w 3"], box: Int64[np.ndarray, "4"], out: np.ndarray) -> None:
        """Cut the box (left, top, width, height) and resize it, by area where it shrinks."""
        left, top, width, height = box.tolist()
        _native().resize_crop(pixels, top, top + height, left, left + width, out)
