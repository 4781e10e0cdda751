"""Opening a packed data set: verify it, choose what decodes it, and keep it on the device if it fits."""

import logging
from functools import cache
from pathlib import Path

import psutil
import torch

from spice_dist.data import beton
from spice_dist.data.dataset import LOADERS
from spice_dist.data.ffcv_decoder import FFCVDecoder, why_no_ffcv
from spice_dist.data.images import Images
from spice_dist.data.manifest import read_manifest
from spice_dist.data.packed import Decoder, PackedImages
from spice_dist.data.resident import load_resident
from spice_dist.data.torchvision_decoder import TorchvisionDecoder
from spice_dist.errors import DamagedFile, UserError

RESIDENT_BYTES = 2 << 30  # of images that stay in a CPU's memory
RESIDENT_SHARE = 1 / 3  # of the free memory, of a GPU or beside it, that images may take
FULL_CHECK_BYTES = 8 << 30  # larger files: the structure is checked whole, the samples of SPREAD_CHECK images
SPREAD_CHECK = 4_096

log = logging.getLogger("spice_dist.data")


def open_images(
    data_dir: Path,
    *,
    device: torch.device,
    size: int,
    channels: int = 3,
    loader: str = "auto",
    resident_bytes: int | None = None,
    threads: int | None = None,
) -> Images:
    """Open data_dir/dataset.beton after verifying it.

    Args:
        size: side in pixels of what `batches` gives.
        channels: 3, or 1 for luma (ITU-R 601).
        loader: decoder: "auto" takes FFCV where it is installed, "ffcv" forces it, "torch" does without. Raw
            squares of `size` need no decoder.
        resident_bytes: a set of raw squares of at most this size is read once and stays on the device; default:
            `resident_limit`.
        threads: number of decoding threads; default: torch's, the share of this worker.

    Raises:
        UserError: unknown loader or channels, no data set, or "ffcv" where it is not installed.
        DamagedFile: the data set is truncated, altered or not the one of the manifest.
    """
    if loader not in LOADERS:
        raise UserError(f"unknown loader {loader!r}: choose one of {', '.join(LOADERS)}")
    if channels not in (1, 3):
        raise UserError(f"channels is {channels}: choose 3 (colour) or 1 (grey)")
    info = _verified(data_dir)
    needs_no_decoder = info.format == "raw" and (info.heights[0], info.widths[0]) == (size, size)
    decoder = _decoder("torch" if needs_no_decoder and loader == "auto" else loader)  # importing FFCV takes seconds
    images = PackedImages(info, decoder, device, size, channels, threads or torch.get_num_threads())
    limit = resident_limit(device) if resident_bytes is None else resident_bytes
    if images.decodes or _bytes(images) > limit:
        return images
    try:
        return load_resident(images, device)
    finally:
        images.close()


def resident_limit(device: torch.device) -> int:
    """Return how many bytes of images may stay on the device: RESIDENT_BYTES, or a share of a GPU's free memory."""
    if device.type != "cuda":
        return RESIDENT_BYTES
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(RESIDENT_SHARE * (torch.cuda.mem_get_info(device)[0] + unused))


def as_squares(images: Images, device: torch.device, reads: int, processes: int = 1) -> Images:
    """Return the same central squares, decoded once, if more than all of them will be read and memory suffices.

    They stay on the device, or on the host of a GPU that has no room. `images` is closed if it is not returned.

    Args:
        reads: images that will be read, with repetitions.
        processes: how many of them may do the same on this host.
    """
    if not images.decodes or reads <= images.n:
        return images
    on_host = int(RESIDENT_SHARE * psutil.virtual_memory().available / processes)
    if _bytes(images) <= resident_limit(device):
        kept = device
    elif device.type == "cuda" and _bytes(images) <= on_host:
        kept = torch.device("cpu")
    else:
        return images
    try:
        return load_resident(images, kept, device)
    finally:
        images.close()


def _bytes(images: Images) -> int:
    return images.n * images.channels * images.size**2


def _verified(data_dir: Path) -> beton.BetonInfo:
    path = data_dir / "dataset.beton"
    if not path.exists():
        raise UserError(f"no data set in {data_dir}: {path.name} is missing; pack the images first")
    info = beton.verify(path)
    if (data_dir / "manifest.json").exists():
        manifest = read_manifest(data_dir)
        if info.n != manifest.n or info.fingerprint != manifest.fingerprint:
            raise DamagedFile(f"{path} was written from other images than {data_dir} holds: delete it and pack again")
    beton.check_pixels(info, spread=None if info.file_size <= FULL_CHECK_BYTES else SPREAD_CHECK)
    return info


@cache
def _decoder(loader: str) -> Decoder:
    if loader == "torch":
        return TorchvisionDecoder()
    missing = why_no_ffcv()
    if missing is None:
        return FFCVDecoder()
    if loader == "ffcv":
        raise UserError(missing)
    log.warning("%s; torchvision's decoder, which is slower, takes its place", missing)
    return TorchvisionDecoder()
