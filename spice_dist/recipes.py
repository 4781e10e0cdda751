"""Whole configurations as functions: the settings for one kind of data, with what they take and give.

A recipe is the place to read which settings a result was made with. Change single ones by `--set name=value`.
"""

from collections.abc import Callable

from spice_dist.config import Config
from spice_dist.data.augment import View
from spice_dist.data.dataset import DataConfig
from spice_dist.errors import UserError
from spice_dist.methods.moco import MoCoConfig
from spice_dist.methods.reliable import ReliableConfig
from spice_dist.methods.spice_self import SpiceSelfConfig
from spice_dist.methods.spice_semi import SpiceSemiConfig
from spice_dist.models.backbone import BackboneConfig


def digits(num_images: int = 1797) -> Config:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, on a laptop: see the README for time and scores.

    Affine views of white on black, brightness, contrast and noise; no flips, which would turn a 2 into something else.
    """
    view = View(rotate=14, shift=0.14, zoom=0.175, shear=0.21, jitter=1.0, brightness=0.4, contrast=0.4, noise=0.1)
    weak = View(rotate=6, shift=0.06, zoom=0.075, shear=0.09)
    return Config(
        clusters=10,
        bn_groups=2,
        data=DataConfig(size=8, channels=1),
        backbone=BackboneConfig(name="resnet18", stem="small", widths=(32, 32, 64, 128), depths=(1, 1, 1, 1)),
        moco=MoCoConfig(epochs=200, batch=256, lr=0.06, momentum=0.99, queue=1024, view=view),
        spice_self=SpiceSelfConfig(epochs=30, weak=weak, strong=view),
        reliable=ReliableConfig(neighbors=20, ratio=0.75),  # a ninth of a cluster: its rarer shapes count too
        spice_semi=SpiceSemiConfig(steps=400, ema=0.99, init="scratch", weak=weak, strong=view),
    )


def photos(num_images: int) -> Config:
    """Any folder of colour images, also without a GPU: 64 pixels, a narrow ResNet-18 of 0.5 M parameters.

    Stage 1 passes over about 100,000 images (20 to 400 epochs), so that its time hardly grows up to 5,000 photos; 1,000
    took six minutes in all on two cores. A GPU deserves more: --set moco.epochs=500.
    """
    batch = min(128, max(2, num_images * 9 // 10 // 2 * 2))  # a tenth of the files may turn out unreadable
    batches_in_queue = max(
        1, min(8, num_images // batch - 1)
    )  # a key of the query's own image would be a false negative
    strong = View(crop_scale=(0.4, 1.0), flip=0.5, operations=3, cutout=0.4)
    return Config(
        bn_groups=2,
        data=DataConfig(size=64),
        backbone=BackboneConfig(name="resnet18", stem="native", widths=(32, 64, 96, 128), depths=(1, 1, 1, 1)),
        moco=MoCoConfig(
            epochs=min(400, max(20, 100_000 // num_images)),
            batch=batch,
            queue=batches_in_queue * batch,
            lr=0.03,
            momentum=0.99,
            weight_decay=5e-4,
        ),
        spice_self=SpiceSelfConfig(epochs=30, strong=strong),
        reliable=ReliableConfig(ratio=0.9),
        spice_semi=SpiceSemiConfig(steps=300, labelled=32, ratio=3, ema=0.99, init="stage2", strong=strong),
    )


RECIPES: dict[str, Callable[[int], Config]] = {"digits": digits, "photos": photos}


def recipe(name: str, num_images: int) -> Config:
    """The named settings for a data set of this size; UserError if there is no such recipe."""
    if name not in RECIPES:
        raise UserError(f'there is no recipe "{name}"; there are {", ".join(RECIPES)}')
    return RECIPES[name](num_images)
