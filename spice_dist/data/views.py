"""Kinds of random views: what is drawn and how strongly, and the views that the papers draw."""

from dataclasses import dataclass, replace

from spice_dist.settings import setting

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel of the images that a network was made for, on values in [0, 1]."""
IMAGENET: Statistics = (IMAGENET_MEAN, IMAGENET_STD)  # MoCo and SPICE take them for every data set


@dataclass(frozen=True)
class View:
    """One kind of random view, in the order in which the operations are applied."""

    crop_scale: tuple[float, float] = setting(
        (1.0, 1.0), "RandomResizedCrop: share of the area, ratio 3/4 to 4/3; (1, 1): off"
    )
    size: int = setting(0, "pixels, side of the crop; 0: the image's")
    pad: int = setting(0, "RandomCrop after this much padding, pixels")
    reflect: bool = setting(False, "pad with mirrored pixels instead of black")
    flip: float = setting(0.0, "probability of a horizontal flip")
    rotate: float = setting(0.0, "degrees, uniform in +-rotate")
    shift: float = setting(0.0, "share of the side, uniform in +-shift, each axis")
    zoom: float = setting(0.0, "scale uniform in 1 +- zoom, each axis")
    shear: float = setting(0.0, "tangent, uniform in +-shear")
    operations: int = setting(0, "how many of SCAN's 14 operations are drawn, with replacement")
    reach: float = setting(0.1, "of these, tangent of a shear and share of the side of a translation, at most")
    erase: float = setting(0.0, "largest side of a square painted grey after them, share of the width")
    operations_first: bool = setting(False, "operations and erase before the geometry, as FixMatch has it")
    jitter: float = setting(0.0, "probability of brightness, contrast, saturation and hue, in random order")
    brightness: float = setting(0.0, "factor uniform in 1 +- brightness")
    contrast: float = setting(0.0, "factor uniform in 1 +- contrast")
    saturation: float = setting(0.0, "factor uniform in 1 +- saturation")
    hue: float = setting(0.0, "turns, uniform in +-hue")
    grey: float = setting(0.0, "probability of dropping the colour")
    blur: float = setting(0.0, "probability of a Gaussian blur")
    blur_sigma: tuple[float, float] = setting((0.1, 2.0), "pixels, from least to most")
    noise: float = setting(0.0, "largest standard deviation of Gaussian pixel noise, uniform in 0..noise per image")
    cutout: float = setting(0.0, "largest side of an erased square, share of the image; erased to the mean colour")


PLAIN = View()
MOCO_V2 = View(
    crop_scale=(0.2, 1.0),
    flip=0.5,
    jitter=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    grey=0.2,
    blur=0.5,
)
SCAN_WEAK = View(pad=4, flip=0.5)
SCAN_STRONG = View(flip=0.5, operations=4, cutout=0.5)  # cutout of 16 at 32 pixels; SPICE has 32 at 96 and at 224
FIXMATCH_WEAK = View(pad=4, flip=0.5)  # as SPICE has it; FixMatch itself reflects at the border
FIXMATCH_STRONG = View(pad=4, flip=0.5, operations=3, reach=0.3, erase=0.5, operations_first=True)
# of a size that follows from the image's, see `imc_swav.crop_sizes`
IMC_GLOBAL = replace(MOCO_V2, grey=0.25, blur=0.0)
IMC_LOCAL = replace(IMC_GLOBAL, crop_scale=(0.08, 0.4))
