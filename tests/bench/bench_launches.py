"""What a step asks of a GPU: operations that would start a kernel, bytes that cross, waits.

    python -m tests.bench.bench_launches

Nothing here runs on a GPU. Operations are counted on a device that pretends to be one (tests/pretend_gpu.py). The
number does not depend on the speed of the machine; CUDA may start some more kernels for one operation, or fuse none.
"""

from dataclasses import replace

import pytest
import torch

from spice_dist.data import augment, views
from spice_dist.data.views import View
from spice_dist.models.backbone import Backbone, BackboneConfig
from spice_dist.models.momentum import copy_buffers, slow_copy
from spice_dist.models.presets import for_small_images
from spice_dist.models.split_batch_norm import update_statistics
from spice_dist.transfer import send
from tests.pretend_gpu import DEVICE, PretendGPU, pretend_gpu

BATCH = 256
VIEWS = {
    "MoCo's view, 32 pixels": (views.MOCO_V2, 32),
    "MoCo's view, 96 pixels": (views.MOCO_V2, 96),
    "SCAN's strong view, 32 pixels": (views.SCAN_STRONG, 32),
    "FixMatch's weak view, 32 pixels": (views.FIXMATCH_WEAK, 32),
    "FixMatch's strong view, 32 pixels": (views.FIXMATCH_STRONG, 32),
    "IMC-SwAV's large crop, 96 pixels": (replace(views.IMC_GLOBAL, size=76), 96),
    "IMC-SwAV's small crop, 96 pixels": (replace(views.IMC_LOCAL, size=52), 96),
}


def main() -> None:
    torch.set_num_threads(1)
    print("| | launches | bytes sent | waits |\n|---|---|---|---|")
    with pretend_gpu(pytest.MonkeyPatch()) as gpu:
        for name, (view, size) in VIEWS.items():
            count_view(name, view, size, gpu)
        for name in ("resnet18", "wrn_28_2"):
            count_network(name, for_small_images(name, views.IMAGENET), gpu)


def count_view(name: str, view: View, size: int, gpu: PretendGPU) -> None:
    images = send(torch.randint(0, 256, (BATCH, 3, size, size), dtype=torch.uint8), DEVICE)
    index = torch.randperm(100_000)[:BATCH]
    for epoch in range(2):  # constants are sent once
        gpu.reset()
        augment.apply(view, images, index, (0, epoch, 0))
    launches, sent, waits = gpu.launches, gpu.sent, len(gpu.waits)
    print(f"| {name} | {launches} | {sent:,} | {waits} |")


def count_network(name: str, config: BackboneConfig, gpu: PretendGPU) -> None:
    net = Backbone(config, 3, 32).to(DEVICE).train()
    average = slow_copy(net)
    net(torch.zeros((4, 3, 32, 32), device=DEVICE))
    for what in ("update_statistics", "copy_buffers"):
        gpu.reset()
        if what == "update_statistics":
            update_statistics(net)
        else:
            copy_buffers(average, net)
        print(f"| `{what}`, {name} | {gpu.launches} | {gpu.sent:,} | {len(gpu.waits)} |")


if __name__ == "__main__":
    main()
