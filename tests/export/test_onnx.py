"""`--to onnx`: onnxruntime computes from bytes of images what the run's network does."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from spice_dist import artifacts
from spice_dist.data.loaders import open_images
from spice_dist.data.sources import open_source
from spice_dist.errors import UserError
from spice_dist.export import onnx_network
from spice_dist.export.trained import trained
from spice_dist.group_names import labels_of
from spice_dist.inference import probabilities
from spice_dist.model_folder import load_model
from spice_dist.models.backbone import BackboneConfig
from tests.export.conftest import Made, Make, make_run, pictures

CPU = torch.device("cpu")

NETWORKS = {
    "a middle stage": Made(
        BackboneConfig("test_efficientnet", "native", mean=(0.1, 0.2, 0.3), intermediate=True),
        size=64,
        names={"1": "<b>dresses</b>"},
    ),
    "two networks and a classifier": Made(
        BackboneConfig("test_resnet", "native", others=("test_vit",)), channels=1, classifier=True
    ),
}


@dataclass(frozen=True)
class Exported:
    run: Path
    file: Path
    lines: list[str]


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("onnx")
    photos = pictures(folder / "photos", [b"%02d.jpg" % i for i in range(9)])
    run = make_run(folder / "run", open_source(str(photos)), NETWORKS[request.param])
    return Exported(run, folder / "network.onnx", onnx_network.export(run, folder / "network.onnx"))


def test_any_number_of_images_gets_the_probabilities_of_the_run(exported: Exported):
    assert "opset 20" in exported.lines[0]
    net, task = load_model(artifacts.model(exported.run), CPU)
    size, channels = task.data.size, task.data.channels
    images = open_images(artifacts.data(exported.run), device=CPU, size=size, channels=channels, loader="torch")
    (pixels, _), *_ = images.batches(np.arange(images.n), images.n)
    expected = probabilities(net, images, task.backbone.statistics)
    assert expected.std(0).max() > 2e-4, "images that differ"
    session = onnxruntime.InferenceSession(str(exported.file))
    (given,) = session.get_inputs()
    assert (given.type, given.shape[1:]) == ("tensor(uint8)", [size, size, channels])
    for count in (1, images.n):
        batch = pixels[:count].permute(0, 2, 3, 1).contiguous().numpy()
        probs, features = map(np.asarray, session.run(["probabilities", "features"], {"images": batch}))
        np.testing.assert_allclose(probs, expected[:count], atol=2e-5)
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)


def test_the_file_says_what_it_takes_and_what_its_groups_are_called(exported: Exported):
    model = onnx.load(str(exported.file))
    onnx.checker.check_model(model)
    assert {entry.version for entry in model.opset_import if entry.domain == ""} == {20}
    about = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    _, task = load_model(artifacts.model(exported.run), CPU)
    assert about["clusters"] == labels_of(artifacts.model(exported.run), 3)
    assert about["preprocessing"]["input_size"] == [task.data.channels, task.data.size, task.data.size]


def test_a_file_that_gives_other_probabilities_is_not_written(exported: Exported, tmp_path: Path):
    content = onnx.load(str(exported.file))
    (scale,) = [tensor for tensor in content.graph.initializer if tensor.name == "scale"]
    scale.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(scale), scale.name))
    with trained(exported.run) as model, pytest.raises(UserError, match="nothing was written"):
        onnx_network._write_checked(content, {}, model, tmp_path / "network.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_cannot_be_converted_is_one_line(make: Make):
    class Stateful(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(np.sort(images.numpy()))

    with trained(make()) as model:
        deployed = onnx_network.Deployed(model.net, model.task).eval()
        deployed.net.backbone = Stateful()
        with pytest.raises(UserError, match="torch cannot convert test_resnet to ONNX") as error:
            onnx_network.converted(deployed, model.task)
    assert "\n" not in str(error.value)
