"""Recipes: functions that return the whole configuration for one kind of data; their docstrings have time and scores.

Change single settings by `--set name=value`. Times and scores are measured, scores in percent, mean ± standard
deviation over seeds; tables with their commands are in tests/bench/README.md.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from spice_dist.catalog import USING_LABELS
from spice_dist.config import Config
from spice_dist.data.dataset import DataConfig
from spice_dist.data.views import MOCO_V2, SCAN_STRONG, View
from spice_dist.errors import UserError
from spice_dist.methods.byol import BYOLConfig
from spice_dist.methods.imc_swav import ImcSwavConfig
from spice_dist.methods.moco import MoCoConfig
from spice_dist.methods.reliable import ReliableConfig
from spice_dist.methods.scan import ScanConfig, SelfLabelConfig
from spice_dist.methods.spice_self import SpiceSelfConfig
from spice_dist.methods.spice_semi import SpiceSemiConfig
from spice_dist.models.backbone import BackboneConfig


def digits(num_images: int = 1797) -> Config:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, on a laptop.

    Six minutes on two CPU cores beside other work. Three seeds: ACC 97.3 ± 0.8, NMI 96.0 ± 0.8, ARI 94.5 ± 1.6; with
    `--method imc_swav` ACC 96.6 ± 1.0, with `--method scan` 96.9 ± 1.0.

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
        byol=BYOLConfig(epochs=200, hidden=512, dim=128, view=view),
        spice_self=SpiceSelfConfig(epochs=30, weak=weak, strong=view),
        reliable=ReliableConfig(max_neighbors=10),  # a twentieth of a cluster: its rarer shapes count too
        spice_semi=SpiceSemiConfig(steps=400, ema=0.99, init="scratch", weak=weak, strong=view),
        imc_swav=ImcSwavConfig(
            epochs=60,
            batch=128,
            lr=2e-3,
            warmup=50,
            prototypes=100,
            epsilon=0.02,  # at 0.05 all images end up alike
            hidden=256,
            classifiers=4,
            local_views=2,
            global_view=replace(view, size=8),
            local_view=replace(view, crop_scale=(0.35, 0.7), size=6),
        ),
        scan=ScanConfig(lr=5e-4, heads=3, view=view),
        self_label=SelfLabelConfig(epochs=30, batch=256, view=view),
    )


def photos(num_images: int = 10_000) -> Config:
    """Any folder of colour images from scratch, also without a GPU: 64 pixels, a narrow ResNet-18 of 0.5 M parameters.

    Where a trained network can be had, `trained` changes this configuration for it. Stage 1 takes about 100,000 images
    in all (20 to 400 epochs), so that its time hardly grows up to 5,000 photos. With a GPU use --set moco.epochs=500.

    1,000 CIFAR-10 images of five classes took six minutes in all on two CPU cores, with an earlier version: ACC 45.0
    (features and k-means 43.9, pixels 34.1; one seed).
    """
    batch = min(128, max(2, num_images * 9 // 10 // 2 * 2))  # up to a tenth of the files may be unreadable
    # a key of the query's own image would be a false negative
    batches_in_queue = max(1, min(8, num_images // batch - 1))
    strong = View(crop_scale=(0.4, 1.0), flip=0.5, operations=3, cutout=0.4)
    epochs = min(400, max(20, 100_000 // num_images))
    return Config(
        bn_groups=2,
        data=DataConfig(size=64),
        backbone=BackboneConfig(name="resnet18", stem="native", widths=(32, 64, 96, 128), depths=(1, 1, 1, 1)),
        moco=MoCoConfig(
            epochs=epochs,
            batch=batch,
            queue=batches_in_queue * batch,
            lr=0.03,
            momentum=0.99,
            weight_decay=5e-4,
        ),
        byol=BYOLConfig(epochs=epochs, batch=batch, hidden=512, dim=128),
        spice_self=SpiceSelfConfig(epochs=30, strong=strong),
        spice_semi=SpiceSemiConfig(steps=300, labelled=32, ratio=3, ema=0.99, init="stage2", strong=strong),
        scan=ScanConfig(epochs=max(5, epochs // 8), batch=batch, heads=5, view=strong),
        self_label=SelfLabelConfig(epochs=max(5, epochs // 8), batch=batch, view=strong),
    )


def trained(config: Config, num_images: int, shorter_side: int | None) -> Config:
    """Change `photos` for a trained network: no stage 1, groups from the neighbours of its features.

    A convolutional network takes images at half its size if its size is more than ENLARGED times their shorter side:
    224 pixels gave 12 points of NMI more than 112 for CIFAR-10 (32 pixels), 14 less for the digits (8 pixels). On a CPU
    more than EMBEDDED images are taken at 160 pixels, and many more at 112, so that embedding takes about ten minutes
    on two cores. Images are stored as squares while these fit a gigabyte, which saves another encoding and decoding.

    EfficientNet-lite0 on two CPU cores, five seeds: 3,781 clothing photos in 2.7 minutes, ACC 66.3 ± 1.5 and NMI
    58.4 ± 0.7; 4,000 CIFAR-10 images in 2.6 minutes, 78.0 ± 0.7 and 67.1 ± 0.5; 5,000 of Fashion-MNIST in 3.0 minutes,
    68.5 ± 0.9 and 71.1 ± 0.6. All 70,000 of Fashion-MNIST took 14.4 minutes, 78.5 and 72.9 (one seed).
    """
    size = config.data.size
    if not config.backbone.name.startswith("vit"):
        if shorter_side is not None and size > ENLARGED * shorter_side:
            size //= 2
        if not torch.cuda.is_available():
            smaller = [side for side in (size, 160, 112) if side <= size]
            size = next((side for side in smaller if num_images * side**2 <= EMBEDDED * 224**2), smaller[-1])
    stored = "raw" if num_images * size**2 * config.data.channels <= 1 << 30 else "auto"
    return replace(
        config,
        pretext="none",
        stage2="spice_graph",
        stage3="none",
        backbone=replace(config.backbone, intermediate=True),
        data=replace(config.data, size=size, format=stored),
    )


def fashion_mnist(num_images: int = 70_000) -> Config:
    """Fashion-MNIST's grey 28x28 pictures on a laptop: a narrow ResNet-18 of 0.6 M parameters, few epochs.

    All 70,000 on two CPU cores: 35 minutes, 29 of them stage 1 beside other work; ACC 67.1 ± 0.4, NMI 62.8 ± 0.3 (three
    seeds of stages 2 and 3 on one stage 1). With `--method imc_swav` 5 minutes, 64.6 ± 0.8 and 62.0 ± 0.3.
    """
    view = View((0.3, 1.0), flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4, blur=0.5, blur_sigma=(0.1, 1.0))
    strong = View(flip=0.5, operations=3, cutout=0.4)
    return Config(
        clusters=10,
        bn_groups=2,
        data=DataConfig(size=28, channels=1),
        backbone=BackboneConfig(name="resnet18", stem="pooled", widths=(32, 64, 128, 128), depths=(1, 1, 1, 1)),
        moco=MoCoConfig(epochs=15, batch=256, lr=0.06, momentum=0.99, temperature=0.1, queue=4096, view=view),
        byol=BYOLConfig(epochs=15, hidden=512, dim=128, view=view),
        spice_self=SpiceSelfConfig(epochs=2, strong=strong),
        spice_semi=SpiceSemiConfig(steps=300, ema=0.99, init="stage2", strong=strong),
        imc_swav=ImcSwavConfig(
            epochs=max(2, 75_000 // num_images),
            batch=128,
            lr=2e-3,
            warmup=50,
            prototypes=128,
            epsilon=0.02,
            hidden=256,
            classifiers=4,
            local_views=2,
            global_view=replace(view, size=24),
            local_view=replace(view, crop_scale=(0.1, 0.4), size=16),
        ),
        scan=ScanConfig(epochs=2, batch=256, heads=5, view=strong),
        self_label=SelfLabelConfig(epochs=2, batch=256, view=strong),
    )


def cifar10(num_images: int = 60_000) -> Config:
    """SPICE's settings for CIFAR-10, train and test merged: 1,000 epochs, then 2^20 steps of a WideResNet-28-2.

    Not run here.
    """
    return Config(
        clusters=10,
        umap_baseline=True,
        data=DataConfig(size=32),
        backbone=BackboneConfig(name="resnet34", stem="pooled"),
        spice_self=SpiceSelfConfig(epochs=30),
        reliable=ReliableConfig("official", ratio=0.99),
        spice_semi=SpiceSemiConfig(
            network="wrn_28_2",
            mean=(125.3 / 255, 123.0 / 255, 113.9 / 255),
            std=(63.0 / 255, 62.1 / 255, 66.7 / 255),
        ),
    )


def cifar10_short(num_images: int = 60_000) -> Config:
    """CIFAR-10 on one GPU: stage 1 as MoCo's authors show it for CIFAR, ResNet-18 and 200 epochs.

    They report 82.6 % for a weighted kNN on features of the train part (85.3 with --set moco.symmetric=True). Reliable
    labels are selected by the adaptive rule, which leaves no cluster without any. Not run here.
    """
    return replace(
        cifar10(),
        bn_groups=8,
        backbone=BackboneConfig(name="resnet18", stem="small"),
        reliable=ReliableConfig(ratio=0.99),
        moco=MoCoConfig(
            epochs=200,
            batch=512,
            lr=0.06,
            weight_decay=5e-4,
            momentum=0.99,
            temperature=0.1,
            queue=4096,
            view=replace(MOCO_V2, crop_scale=(0.08, 1.0), blur=0.0),
        ),
        byol=BYOLConfig(epochs=200, batch=512, lr=0.06, warmup=10),
        spice_semi=replace(cifar10().spice_semi, steps=20_000),
    )


def cifar100_20(num_images: int = 60_000) -> Config:
    """SPICE's settings for the 20 superclasses of CIFAR-100, stage 3 with a WideResNet-28-8.

    Two settings are not published: the queue is that of CIFAR-10, the weight decay of stage 3 is FixMatch's. Not run
    here.
    """
    semi = SpiceSemiConfig(
        weight_decay=1e-3,
        network="wrn_28_8",
        mean=(129.3 / 255, 124.1 / 255, 112.4 / 255),
        std=(68.2 / 255, 65.4 / 255, 70.4 / 255),
    )
    return replace(
        cifar10(),
        clusters=20,
        spice_self=SpiceSelfConfig(epochs=100),
        spice_semi=semi,
        scan=ScanConfig(epochs=100, batch=512),
    )


def cifar100(num_images: int = 60_000) -> Config:
    """The 100 classes of CIFAR-100: SPICE's settings for its superclasses, and those that IMC-SwAV publishes.

    Reliable labels are selected by the adaptive rule: the published one keeps none if one cluster has none
    (--set reliable.rule=official). Not run here.
    """
    return replace(cifar100_20(), clusters=100, reliable=ReliableConfig(ratio=0.99), imc_swav=ImcSwavConfig(batch=512))


def stl10(num_images: int = 113_000) -> Config:
    """SPICE's settings for STL-10 of 96 pixels, whose unlabelled images train stages 1 and 3.

    Stage 3 trains a wide ResNet of four groups. Not run here.
    """
    strong = replace(SCAN_STRONG, cutout=32 / 96)
    return Config(
        clusters=10,
        umap_baseline=True,
        data=DataConfig(size=96),
        backbone=BackboneConfig(name="resnet34", stem="pooled"),
        moco=MoCoConfig(queue=65_536),
        spice_self=SpiceSelfConfig(strong=strong),
        reliable=ReliableConfig("official", ratio=0.9),
        spice_semi=SpiceSemiConfig(network="wrn_37_2"),
        scan=ScanConfig(epochs=100, view=strong),
        self_label=SelfLabelConfig(epochs=100, view=strong),
    )


def imagenet_10(num_images: int = 13_000) -> Config:
    """SPICE's settings for ImageNet-10, squashed to 224 pixels, 5,000 epochs; the queue is not published.

    SCAN publishes no settings for it: those are of STL-10. Not run here.
    """
    strong = replace(SCAN_STRONG, cutout=32 / 224)
    return Config(
        clusters=10,
        umap_baseline=True,
        data=DataConfig(size=224, fit="squash"),
        backbone=BackboneConfig(name="resnet34", stem="native"),
        moco=MoCoConfig(epochs=5000),
        spice_self=SpiceSelfConfig(strong=strong),
        reliable=ReliableConfig("official", ratio=0.9),
        spice_semi=SpiceSemiConfig(linear_head=True),
        scan=ScanConfig(epochs=100, view=strong),
        self_label=SelfLabelConfig(epochs=100, view=strong),
    )


def imagenet_dogs(num_images: int = 19_500) -> Config:
    """SPICE's settings for 15 dog breeds of ImageNet, 3,000 epochs. Not run here."""
    of_ten = imagenet_10()
    spice_self = replace(of_ten.spice_self, batch=8000)
    return replace(of_ten, clusters=15, moco=MoCoConfig(epochs=3000), spice_self=spice_self)


def tiny_imagenet(num_images: int = 100_000) -> Config:
    """Tiny-ImageNet's 200 classes of 64 pixels.

    SPICE does not publish all settings for it: epochs and queue are those of CIFAR-10, and stage 3 trains the backbone
    of stages 1 and 2 anew. SCAN publishes none: those are of the CIFAR-100 superclasses, with batches that hold every
    cluster. Reliable labels are selected by the adaptive rule: the published one keeps none if one cluster has none
    (--set reliable.rule=official). Not run here.
    """
    return replace(
        cifar10(),
        clusters=200,
        data=DataConfig(size=64),
        spice_self=SpiceSelfConfig(),
        reliable=ReliableConfig(ratio=0.9),
        imc_swav=ImcSwavConfig(batch=512),
        spice_semi=SpiceSemiConfig(),
        scan=ScanConfig(epochs=100, batch=512),
    )


ENLARGED = 16
EMBEDDED = 15_000  # images of 224 pixels that two cores embed in about ten minutes
CIFAR100_STATISTICS = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
# ResNet-18, with the mean and deviation of the data set
IMC_BACKBONES = {
    "cifar10": BackboneConfig(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)),
    "cifar100_20": BackboneConfig(mean=CIFAR100_STATISTICS[0], std=CIFAR100_STATISTICS[1]),
    "cifar100": BackboneConfig(mean=CIFAR100_STATISTICS[0], std=CIFAR100_STATISTICS[1]),
    "stl10": BackboneConfig(stem="halved", mean=(0.43, 0.42, 0.39), std=(0.27, 0.26, 0.27)),
    "tiny_imagenet": BackboneConfig(stem="halved"),
}


def imc_swav(config: Config, name: str) -> Config:
    """Change the recipe `name` to IMC-SwAV, with the authors' network where it is published.

    The authors train on one GPU, so that a batch is one BatchNorm group; several workers need --set bn_groups=...
    They report, trained on the train and scored on the test part (--split split): CIFAR-10 89.1 %, CIFAR-100-20 49.0,
    STL-10 83.1, Tiny-ImageNet 27.9; their code scores with imc_swav.eval_bn=adapt_on_test.
    """
    config = replace(config, method="imc_swav", pretext="imc_swav")
    if name not in IMC_BACKBONES:
        return config
    return replace(config, bn_groups=1, backbone=IMC_BACKBONES[name])


def given_labels(config: Config, method: str) -> Config:
    """Change the recipe to a baseline that learns from true labels: stage 3 alone, from scratch or backbone weights."""
    ratio = 0 if method == "supervised" else config.spice_semi.ratio
    semi = replace(config.spice_semi, init="scratch", ratio=ratio)
    return replace(config, method=method, pretext="none", spice_semi=semi)


RECIPES: dict[str, Callable[..., Config]] = {
    function.__name__: function
    for function in (
        *(digits, photos, fashion_mnist, cifar10, cifar10_short),
        *(cifar100_20, cifar100, stl10, imagenet_10, imagenet_dogs, tiny_imagenet),
    )
}


def recipe(name: str, num_images: int | None = None, method: str = "spice") -> Config:
    """Return the named configuration for a data set of this size; UserError if there is no such recipe.

    SCAN starts from SPICE's stage 1; its authors use SimCLR with a ResNet-18.

    Args:
        num_images: None: as many as the recipe is meant for, or 10,000 photos.
    """
    if name not in RECIPES:
        raise UserError(f'there is no recipe "{name}"; there are {", ".join(RECIPES)}')
    config = RECIPES[name]() if num_images is None else RECIPES[name](num_images)
    if method in USING_LABELS:
        return given_labels(config, method)
    return imc_swav(config, name) if method == "imc_swav" else replace(config, method=method)
