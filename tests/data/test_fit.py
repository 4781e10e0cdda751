"""Images of unequal sides become squares: the central one, or the whole image squashed, by every decoder alike."""

import io
import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from spice_dist.config import Config
from spice_dist.data.beton import verify
from spice_dist.data.dataset import DataConfig, open_data, prepare
from spice_dist.data.decode import Packing, pack_image
from spice_dist.data.ffcv_decoder import FFCVDecoder
from spice_dist.data.manifest import read_manifest
from spice_dist.data.packed import Decoder, PackedImages
from spice_dist.data.packed_files import pack
from spice_dist.data.pillow_decoder import PillowDecoder
from spice_dist.data.stream import Stream
from spice_dist.data.torchvision_decoder import TorchvisionDecoder
from spice_dist.errors import UserError
from spice_dist.export.trained import cropping, preprocessing
from spice_dist.stages import check_settings, stage_settings
from spice_dist.task import Task

CPU = torch.device("cpu")
SIZE, CORNER = 48, 40  # the corner ends before the central square of 4:3 begins
SQUASH = DataConfig(size=SIZE, format="raw", fit="squash")


def photograph() -> Image.Image:
    """A photograph of 400 x 300 pixels whose upper left corner is pure red."""
    image = Image.fromarray(load_sample_image("china.jpg")).resize((400, 300))
    image.paste((255, 0, 0), (0, 0, CORNER, CORNER))
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photograph, and it lying on its side with an EXIF tag that sets it upright."""
    made = tmp_path_factory.mktemp("photographs")
    photograph().save(made / "a.png")
    tag = Image.Exif()
    tag[0x0112] = 6  # turn by 90 degrees clockwise
    photograph().transpose(Image.Transpose.ROTATE_90).save(made / "b.jpg", quality=98, subsampling=0, exif=tag)
    return made


def oracle(size: int = SIZE) -> np.ndarray:
    return np.asarray(photograph().resize((size, size), Image.Resampling.BILINEAR))


def red(pixels: np.ndarray) -> tuple[int, int]:
    """Width and height of the red corner in pixels."""
    mask = (pixels[..., 0] > 127) & (pixels[..., 1:].max(-1) < 127)
    return int(mask[0].cumprod().sum()), int(mask[:, 0].cumprod().sum())


def decoded(folder: Path, decoder: Decoder) -> np.ndarray:
    with closing(PackedImages(verify(folder / "dataset.beton"), decoder, CPU, SIZE, 3, 1)) as images:
        return torch.cat([batch for batch, _ in images.batches(np.arange(images.n), 10)]).permute(0, 2, 3, 1).numpy()


def test_a_raw_square_is_pillows_whole_image(folder: Path, tmp_path: Path):
    prepare(open_data(str(folder)), SQUASH, tmp_path)
    upright, turned = decoded(tmp_path, TorchvisionDecoder())
    assert np.array_equal(upright, oracle())
    assert np.abs(turned.astype(int) - oracle()).mean() < 2  # it was a JPEG
    assert red(turned) == red(oracle())


@pytest.mark.parametrize("decoder", [FFCVDecoder, TorchvisionDecoder, PillowDecoder])
def test_every_decoder_of_stored_jpegs_shows_the_whole_image(folder: Path, tmp_path: Path, decoder: type[Decoder]):
    kept = {fit: tmp_path / fit for fit in ("squash", "crop")}
    for fit, out in kept.items():
        prepare(open_data(str(folder)), DataConfig(size=SIZE, format="jpg", quality=98, fit=fit), out)
    width, height = red(oracle())
    for view in decoded(kept["squash"], decoder()):
        assert abs(red(view)[0] - width) <= 1
        assert abs(red(view)[1] - height) <= 1
        assert np.abs(view.astype(int) - oracle()).mean() < 8
    assert [red(view) for view in decoded(kept["crop"], decoder())] == [(0, 0)] * 2


@pytest.mark.parametrize("format", ["raw", "jpg"])
def test_images_on_the_way_to_a_model_are_those_of_a_packed_set(folder: Path, tmp_path: Path, format: str):
    data = DataConfig(size=SIZE, format=format, fit="squash")
    prepare(open_data(str(folder)), data, tmp_path)
    with (
        closing(Stream(data, CPU, 1)) as decoding,
        closing(decoding.batches(open_data(str(folder)), 10, {})) as batches,
    ):
        on_the_way = torch.cat([batch for batch, _ in batches]).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(on_the_way, decoded(tmp_path, TorchvisionDecoder()))


@pytest.mark.parametrize("sides", [(30, 20), (20, 20), (60, 30), (500, 40)])
def test_small_images_are_enlarged_as_a_whole_and_no_jpeg_is_larger_than_its_image(sides: tuple[int, int]):
    image = photograph().resize(sides)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    raw = pack_image(np.asarray(image), Packing("raw", SIZE, fit="squash"))
    assert not isinstance(raw, str)
    wanted = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    assert np.array_equal(np.frombuffer(raw[1], np.uint8).reshape(SIZE, SIZE, 3), np.asarray(wanted))
    jpg = pack_image(file.getvalue(), Packing("jpg", SIZE, fit="squash"))
    assert not isinstance(jpg, str)
    assert (jpg[0].width, jpg[0].height) == (min(SIZE, max(sides)),) * 2
    assert (jpg[1] == file.getvalue()) == (sides[0] == sides[1])


def test_a_packed_file_is_only_taken_with_the_fit_that_it_was_packed_with(folder: Path, tmp_path: Path):
    file = tmp_path / "x.beton"
    assert pack(open_data(str(folder)), file, size=SIZE, fit="squash").fit == "squash"
    source = open_data(str(file))
    assert prepare(source, SQUASH, tmp_path / "run") == read_manifest(tmp_path / "run")
    words = "packed with --fit squash, but data.fit is crop: pack the images again with --fit crop, or train with --set"
    with pytest.raises(UserError, match=words):
        prepare(source, DataConfig(size=SIZE), tmp_path / "other")
    with pytest.raises(UserError, match=words):
        check_settings(Config(data=DataConfig(size=SIZE)), source, str(file))
    with pytest.raises(UserError, match=words):
        pack(source, tmp_path / "again.beton", size=8)
    before = os.stat(file).st_mtime_ns
    pack(open_data(str(folder)), file, size=SIZE, fit="squash")
    assert os.stat(file).st_mtime_ns == before, "the same call does nothing"
    pack(open_data(str(folder)), file, size=SIZE)
    assert read_manifest(tmp_path / "run") != prepare(open_data(str(file)), DataConfig(size=SIZE), tmp_path / "crop")


def test_another_fit_is_another_data_set_to_every_stage(folder: Path):
    source = open_data(str(folder))
    crop, squash = (stage_settings(Config(data=DataConfig(fit=fit)), source) for fit in ("crop", "squash"))
    assert all(crop[stage] != squash[stage] for stage in crop)


def test_exports_describe_the_fit():
    crop, squash = (Task(data=DataConfig(size=SIZE, fit=fit)) for fit in ("crop", "squash"))
    assert (preprocessing(crop)["crop_mode"], preprocessing(squash)["crop_mode"]) == ("center", "squash")
    assert "the whole image" in cropping(squash)
    assert "central square" in cropping(crop)
