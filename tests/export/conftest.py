"""Finished runs, made by hand in a second: real pixels, a network whose every tensor is random, groups at random."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn

from spice_dist import artifacts
from spice_dist.assignments import write_assignments
from spice_dist.data.dataset import DataConfig, prepare
from spice_dist.data.files import publish_json
from spice_dist.data.manifest import read_paths
from spice_dist.data.sources import Source, open_source
from spice_dist.model_folder import save_model
from spice_dist.models.backbone import Backbone, BackboneConfig
from spice_dist.models.heads import ClassifierNet, Classifiers, ClusterHeads, ClusterNet
from spice_dist.task import Task

K = 3
TINY = BackboneConfig("test_resnet", "native")
# names of files that some system, terminal or reader takes for something else
HOSTILE = [
    b"a/1.jpg",
    b"b/1.jpg",
    b"c/1.JPG",
    b"CON.jpg",
    b"nul.jpg",
    b"=cmd|calc.jpg",
    b"two\nlines.jpg",
    b"\x1b[31mred.jpg",
    b"not-utf8-\xff\xfe.jpg",
    b"back\\slash..jpg",
    b"dots...jpg",
    "\u202egpj.exe.jpg".encode(),
    b"q\"uote'<b>&amp;.jpg",
    b"semi;colon:star*.jpg",
    b"x" * 240 + b".jpg",
    "e\u0301.jpg".encode(),
    "\u00e9.jpg".encode(),
    b"space .jpg",
]


def pictures(folder: Path, names: list[bytes]) -> Path:
    """Crops of a photograph by these names."""
    photograph = load_sample_image("china.jpg")
    for i, name in enumerate(names):
        path = folder / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        left = 5 * (i % 100)
        Image.fromarray(photograph[3 * i % 300 :][:40, left : left + 50]).save(path, "JPEG")
    return folder


@torch.no_grad()
def randomise(net: nn.Module) -> None:
    """Give every tensor values that differ, also running statistics, so that no two can be taken for each other."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0, generator=generator)
        elif tensor.is_floating_point() and tensor.ndim < 2:
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)


@dataclass(frozen=True)
class Made:
    """How to make a run."""

    backbone: BackboneConfig = TINY
    size: int = 32
    channels: int = 3
    format: str = "raw"
    classifier: bool = False
    names: dict[str, str] = field(default_factory=dict)


def make_run(run: Path, source: Source, made: Made) -> Path:
    """Write all files of a run that exports read."""
    data = DataConfig(size=made.size, channels=made.channels, loader="torch", format=made.format)
    manifest = prepare(source, data, artifacts.data(run))
    torch.manual_seed(0)
    backbone = Backbone(made.backbone, made.channels, made.size)
    head = Classifiers(1, backbone.dim, 8, K) if made.classifier else ClusterHeads(1, backbone.dim, K)
    net = ClassifierNet(backbone, head) if isinstance(head, Classifiers) else ClusterNet(backbone, head)
    randomise(net)
    if isinstance(head, Classifiers):
        head.in_weight.data.mul_(1_000)  # so that images of one photograph get different probabilities
    if backbone.mixture is not None:
        backbone.mixture.weight.fill_(0.6)
    save_model(net.eval(), Task(clusters=K, data=data, backbone=made.backbone), artifacts.model(run))
    rng = np.random.default_rng(0)
    cluster = np.arange(manifest.n) % K
    confidence = rng.uniform(0.34, 1, manifest.n)
    write_assignments(
        artifacts.assignments_file(run), read_paths(artifacts.data(run)), cluster, confidence, cluster > 0
    )
    features = rng.normal(size=(manifest.n, 6)) * [3, 2, 1, 1, 1, 1]
    artifacts.features_file(run).parent.mkdir()
    np.save(artifacts.features_file(run), (features / np.linalg.norm(features, axis=1)[:, None]).astype(np.float16))
    verdict = {"level": "fair", "why": "heads agree by 0.78 of 1", "remedy": "", "text": ""}
    metrics = {"method": "spice", "n": manifest.n, "k": K, "verdict": verdict, "select": {"agreement": 0.78}}
    publish_json(artifacts.metrics_file(run), metrics)
    if made.names:
        publish_json(artifacts.names_file(run), made.names)
    return run


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Make a run of a few photos; keywords are the fields of Made."""

    def run(**made: object) -> Path:
        folder = tmp_path / "photos"
        if not folder.exists():
            pictures(folder, [b"%02d.jpg" % i for i in range(9)])
        return make_run(tmp_path / "run", open_source(str(folder)), replace(Made(), **made))  # pyright: ignore

    return run


@pytest.fixture(scope="session")
def hostile_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("hostile") / "photos", HOSTILE)


@pytest.fixture
def hostile_run(hostile_photos: Path, tmp_path: Path) -> Path:
    """A run of files with hostile names, two of whose groups have hostile names too."""
    names = {"0": "../../escaped\x1b[31m", "1": "CON", "2": "con"}
    return make_run(tmp_path / "run", open_source(str(hostile_photos)), Made(names=names))
