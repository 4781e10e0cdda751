"""Where a group is seen in its images: the cosine with its prototype, on the network's last map."""

from dataclasses import replace

import numpy as np
import torch

from spice_dist import artifacts, inference
from spice_dist.data.ingest import ingest
from spice_dist.data.loaders import open_images
from spice_dist.data.sources import open_source
from spice_dist.model_folder import save_model
from spice_dist.models.backbone import Backbone, BackboneConfig
from spice_dist.models.heads import ClusterHeads, ClusterNet
from spice_dist.report import attention
from spice_dist.report.gallery import Gallery, Thumbnail
from spice_dist.task import Task


def test_likeness_is_the_cosine_with_the_mean_over_the_places_of_the_group():
    maps, groups = np.random.default_rng(0).normal(size=(5, 3, 2, 4)), np.array([1, 0, 1, 0, 0])
    found = attention.likeness(maps, groups)
    for image, group in enumerate(groups):
        rows = np.concatenate([of.reshape(3, -1).T for of in maps[groups == group]])
        prototype = rows.mean(0)
        for y, x in np.ndindex(2, 4):
            place = maps[image, :, y, x]
            expected = place @ prototype / np.linalg.norm(place) / np.linalg.norm(prototype)
            np.testing.assert_allclose(found[image, y, x], expected)


def test_a_place_unlike_the_group_is_dark():
    likeness = np.ones((8, 8))
    likeness[:4, :4] = -1
    lit = attention._lit(np.full((64, 64, 3), 200, np.uint8), likeness)
    assert lit[8, 8].tolist() == [50] * 3
    assert lit[56, 56].tolist() == [200] * 3


def test_pictures_of_a_run_show_its_typical_images_by_the_last_map_of_its_network(tmp_path):
    torch.manual_seed(0)
    source = open_source("digits")
    ingest(replace(source, paths=source.paths[:12], labels=None), tmp_path / "data", size=32)
    config = BackboneConfig(widths=(8, 8, 16, 16), depths=(1, 1, 1, 1))
    task = Task(clusters=2, backbone=config)
    net = ClusterNet(Backbone(config, 3, 32), ClusterHeads(1, 16, 2)).eval()
    save_model(net, task, artifacts.model(tmp_path))

    index = np.array([7, 2, 5])
    seen = attention.last_maps(tmp_path, index)
    assert seen is not None
    images = open_images(tmp_path / "data", device=torch.device("cpu"), size=32, channels=3, loader="torch")
    features = torch.cat(list(inference.outputs(net.backbone, images, index, config.statistics)))
    (batch, _) = next(images.batches(index, 3))
    images.close()
    np.testing.assert_allclose(seen[1].mean((2, 3)), features.numpy(), atol=1e-5)
    np.testing.assert_array_equal(seen[0], batch.permute(0, 2, 3, 1).numpy())

    shown = [Thumbnail(int(i), "", f"{i}.png", 1.0, True) for i in index]
    galleries = [Gallery(0, 0, None, None), Gallery(1, 3, 1.0, 0.0, nearest=shown)]
    spots = attention.spotlights(tmp_path, galleries)
    assert {cluster: [path for _, path in of] for cluster, of in spots.items()} == {1: ["7.png", "2.png", "5.png"]}
    assert all(uri.startswith("data:image/png;base64,") for uri, _ in spots[1])
    (artifacts.model(tmp_path) / "model.json").unlink()
    assert attention.spotlights(tmp_path, galleries) == {}
