"""The 14 operations that SCAN and FixMatch draw from, and the colour and affine maps that they share with other views.

Images (B, C, H, W) hold values in [0, 1]. Each image of a batch has its own magnitude, factor or matrix.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from spice_dist.transfer import constant

SMOOTH = (1.0, 1.0, 1.0, 1.0, 5.0, 1.0, 1.0, 1.0, 1.0)  # times 1/13: Pillow's filter of 3 x 3

# ---------------------------------------------------------------- colour


def column(values: Float[Tensor, " B"]) -> Float[Tensor, "B 1 1 1"]:
    return values[:, None, None, None]


def luma(x: Tensor) -> Tensor:
    """Return ITU-R 601 grey, as Pillow computes it; a single channel as it is."""
    if x.shape[1] == 1:
        return x
    return (x[:, :1] * 0.299).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:], alpha=0.114)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Give x at factor 1, `other` at 0, and beyond x above 1; clipped to [0, 1] as images are. Changes x."""
    factor = column(factor)
    rest = other * (1 - factor)  # before x changes: `other` may be x
    return x.mul_(factor).add_(rest).clamp_(0, 1)


def brighten(x: Tensor, factor: Float[Tensor, " B"]) -> Tensor:
    """Multiply by the factor and clip. Changes x."""
    return x.mul_(column(factor)).clamp_(0, 1)


def change_contrast(x: Tensor, factor: Float[Tensor, " B"]) -> Tensor:
    """Blend with the mean grey of the image. Changes x."""
    return _blend(x, luma(x).mean((1, 2, 3), keepdim=True), factor)


def saturate(x: Tensor, factor: Float[Tensor, " B"]) -> Tensor:
    """Blend with the grey image. Changes x."""
    return _blend(x, luma(x), factor)


def turn_hue(x: Float[Tensor, "B 3 H W"], turn: Float[Tensor, " B"]) -> Float[Tensor, "B 3 H W"]:
    """Rotate the hue in HSV space by `turn` of a full circle. Changes x."""
    red, green, blue = x.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    lowest = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - lowest
    sixth = chroma.clamp(min=1e-8).reciprocal_()
    hue = torch.where(
        value == red,
        (green - blue).mul_(sixth),
        torch.where(value == green, (blue - red).mul_(sixth).add_(2), (red - green).mul_(sixth).add_(4)),
    )
    hue.add_(6 * turn[:, None, None])
    hue.sub_((hue * (1 / 6)).floor_().mul_(6))  # in [0, 6)
    # a channel is v at its own sixth of the circle and the next to either side, v - c opposite, linear between
    for channel, (centre, sign, offset) in enumerate(((3.0, 1.0, -1.0), (2.0, -1.0, 2.0), (4.0, -1.0, 2.0))):
        share = (hue - centre).abs_().mul_(sign).add_(offset).clamp_(0, 1)
        torch.addcmul(lowest, chroma, share, out=x[:, channel])
    return x


# ---------------------------------------------------------------- affine maps


def resample(x: Tensor, transform: Float[Tensor, "B 3 3"], mode: str = "bilinear") -> Tensor:
    """Map images by `transform`, from output to input coordinates in [-1, 1] from edge to edge; black outside."""
    grid = F.affine_grid(transform[:, :2], list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode=mode, padding_mode="zeros", align_corners=False)


def matrix(
    scale_x: Tensor | float = 1.0,
    scale_y: Tensor | float = 1.0,
    shear_x: Tensor | float = 0.0,
    shear_y: Tensor | float = 0.0,
    shift_x: Tensor | float = 0.0,
    shift_y: Tensor | float = 0.0,
) -> Float[Tensor, "B 3 3"]:
    """Stack rows (scale_x, shear_x, shift_x), (shear_y, scale_y, shift_y), (0, 0, 1), one matrix per image."""
    entries = [scale_x, shear_x, shift_x, shear_y, scale_y, shift_y, 0.0, 0.0, 1.0]
    template = next(entry for entry in entries if isinstance(entry, Tensor))
    columns = [entry if isinstance(entry, Tensor) else torch.full_like(template, entry) for entry in entries]
    return torch.stack(columns, dim=1).view(-1, 3, 3)


def rotation(angle: Tensor, height: int, width: int) -> Tensor:
    """Turn by `angle` radians, measured in pixels, so that a non-square image is not sheared."""
    cos, sin = angle.cos(), angle.sin()
    return matrix(scale_x=cos, shear_x=-sin * (height / width), shear_y=sin * (width / height), scale_y=cos)


# ---------------------------------------------------------------- the 14 operations
# Every one is called with the same four arguments and takes those that it needs:
#   x          (B, C, H, W), which it may change
#   magnitude  (B,) in [0, 1), which spans the published range of the operation
#   sign       (B,) of -1 or 1
#   reach      tangent of a shear and share of the side of a translation, at most


def identity(x: Tensor, magnitude: Tensor, sign: Tensor, reach: float) -> Tensor:
    return x


def autocontrast(x: Tensor, magnitude: Tensor, sign: Tensor, reach: float) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-8), x)


def equalize(x: Tensor, magnitude: Tensor, sign: Tensor, reach: float) -> Tensor:
    """Equalise the histogram of each channel as Pillow does, by an 8-bit table from the cumulative histogram."""
    batch, channels, height, width = x.shape
    levels = (x * 255).round().long().view(batch * channels, -1)
    histogram = torch.zeros(batch * channels, 256, dtype=torch.long, device=x.device)
    histogram.scatter_add_(1, levels, torch.ones_like(levels))
    last = histogram.gather(1, levels.amax(1, keepdim=True))  # the count of the highest level present
    step = (height * width - last) // 255
    before = histogram.cumsum(1) - histogram
    table = ((before + step // 2) // step.clamp(min=1)).clamp(0, 255)
    table = torch.where(step > 0, table, torch.arange(256, device=x.device))
    return (table.gather(1, levels).float() / 255).view_as(x)


def rotate(x: Tensor, magnitude: Tensor, sign: Tensor, reach: float) -> Tensor:
    """Turn by up to 30 degrees about the centre."""
    return resample(x, rotation(sign * magnitude * (math.pi / 6), *x.shape[2:]), "nearest")


def solarize(x: Tensor, magnitude: Tensor, sign: Tensor, reach: float) -> Tensor:
    return torch.where(x * 255 >= column(256 * magnitude), 1 - x, x)


def color(x: Tensor, magnitude: Tensor, sign: Tensor, reach: float) -> Tensor:
    return saturate(x, _factor(magnitude))


def contrast(x: Tensor, magnitude: Tensor, sign: Tensor, reach: float) -> Tensor:
    return change_contrast(x, _factor(magnitude))


def brightness(x: Tensor, magnitude: Tensor, sign: Tensor, reach: float) -> Tensor:
    return brighten(x, _factor(magnitude))


def sharpness(x: Tensor, magnitude: Tensor, sign: Tensor, reach: float) -> Tensor:
    return _blend(x, _smooth(x), _factor(magnitude))


def shear_x(x: Tensor, magnitude: Tensor, sign: Tensor, reach: float) -> Tensor:
    """Shear about the upper left corner, as Pillow does."""
    height, width = x.shape[2:]
    shear = sign * reach * magnitude * (height / width)
    return resample(x, matrix(shear_x=shear, shift_x=shear), "nearest")


def shear_y(x: Tensor, magnitude: Tensor, sign: Tensor, reach: float) -> Tensor:
    """Shear about the upper left corner, as Pillow does."""
    height, width = x.shape[2:]
    shear = sign * reach * magnitude * (width / height)
    return resample(x, matrix(shear_y=shear, shift_y=shear), "nearest")


def translate_x(x: Tensor, magnitude: Tensor, sign: Tensor, reach: float) -> Tensor:
    return resample(x, matrix(shift_x=2 * reach * sign * magnitude), "nearest")


def translate_y(x: Tensor, magnitude: Tensor, sign: Tensor, reach: float) -> Tensor:
    return resample(x, matrix(shift_y=2 * reach * sign * magnitude), "nearest")


def posterize(x: Tensor, magnitude: Tensor, sign: Tensor, reach: float) -> Tensor:
    """Keep 4 to 7 bits: SCAN draws a real number below 8 and drops its fraction."""
    bits = (4 + 4 * magnitude).floor()
    step = column(2.0 ** (8 - bits))
    return ((x * 255).round() / step).floor() * step / 255


# the order is that of the numbers drawn
OPERATIONS = (
    identity,
    autocontrast,
    equalize,
    rotate,
    solarize,
    color,
    contrast,
    brightness,
    sharpness,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
    posterize,
)


def _factor(magnitude: Tensor) -> Tensor:
    return 0.05 + 0.9 * magnitude


def _smooth(x: Tensor) -> Tensor:
    """Apply Pillow's SMOOTH filter, which its sharpness blends with; the border stays."""
    if min(x.shape[2:]) < 3:
        return x
    kernel = constant(SMOOTH, x.device).view(3, 3) / 13
    inner = F.conv2d(x, kernel.expand(x.shape[1], 1, 3, 3), groups=x.shape[1])
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = inner
    return smooth
