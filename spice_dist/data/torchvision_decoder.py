"""JPEG by torchvision's decoder, where FFCV is not installed: the pixels of Pillow's, a quarter faster.

torchvision 0.29 announces that a later release will do without it; Pillow then decodes.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from spice_dist.data.pillow_decoder import PillowDecoder


class TorchvisionDecoder(PillowDecoder):
    """`Decoder` that resizes with Pillow; both read JPEG by libjpeg-turbo, whose pixels are the same bit for bit."""

    def decode(self, data: bytearray, out: UInt8[np.ndarray, "h w 3"]) -> None:
        """Decode into `out`, whose size the caller has checked; DamagedFile if that fails."""
        try:
            from torchvision.io import ImageReadMode, decode_jpeg

            pixels: Any = decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), mode=ImageReadMode.RGB)
        except (RuntimeError, ImportError):  # damaged, or a torchvision without the decoder
            super().decode(data, out)
            return
        out[:] = pixels.permute(1, 2, 0).numpy()
