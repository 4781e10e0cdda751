"""SpiceClusterer keeps scikit-learn's promises."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError

from spice_dist import SpiceClusterer
from spice_dist.errors import UserError

TINY = {
    "data.size": 8,
    "data.loader": "torch",
    "backbone.stem": "small",
    "backbone.widths": (8, 8, 8, 16),
    "moco.epochs": 2,
    "spice_self.epochs": 2,
    "spice_self.heads": 2,
    "spice_semi.steps": 3,
}


def pixels(count: int = 80) -> np.ndarray:
    rows, _ = load_digits(return_X_y=True)
    return (np.asarray(rows)[:count].reshape(-1, 8, 8) * 15).astype(np.uint8)


@pytest.fixture(scope="module")
def fitted() -> SpiceClusterer:
    return SpiceClusterer(n_clusters=4, settings=TINY, seed=3).fit(pixels())


def test_a_trained_backbone_takes_the_place_of_stage_1(tmp_path):
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.safetensors")
    few = {name: value for name, value in TINY.items() if not name.startswith("backbone")} | {"data.size": 32}
    trained = {"backbone": "test_resnet", "weights": tmp_path / "weights.safetensors"}
    model = SpiceClusterer(n_clusters=3, run=tmp_path / "run", settings=few, **trained).fit(pixels(30))
    assert len(model.labels_) == 30
    assert not (tmp_path / "run/moco").exists()
    with pytest.raises(UserError, match="give --backbone"):
        SpiceClusterer(weights="timm").fit(pixels(30))


def test_parameters_survive_cloning_and_fitting_changes_none():
    model = SpiceClusterer(n_clusters=7, settings=TINY, seed=5)
    copied = clone(model)
    assert isinstance(copied, SpiceClusterer)
    assert copied.get_params() == model.get_params()
    assert not hasattr(model, "labels_")


def test_before_fitting_it_says_so():
    with pytest.raises(NotFittedError):
        SpiceClusterer().predict(pixels())


def test_predicting_the_training_images_gives_their_labels(fitted):
    assert fitted.labels_.shape == (80,)
    assert set(fitted.labels_) <= set(range(4))
    assert np.array_equal(fitted.predict(pixels()), fitted.labels_)
    assert fitted.predict(pixels()[:5]).tolist() == fitted.labels_[:5].tolist()


def test_transform_gives_one_unit_vector_per_image(fitted):
    features = fitted.transform(pixels()[:10])
    assert features.shape == (10, 16)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)


def test_the_same_seed_gives_the_same_labels_again_and_from_files(fitted, tmp_path):
    files = []
    for i, image in enumerate(pixels()):
        files.append(tmp_path / f"{i:03d}.png")
        Image.fromarray(image).save(files[-1])
    again = SpiceClusterer(n_clusters=4, settings=TINY, seed=3).fit(files)
    assert np.array_equal(again.labels_, fitted.labels_)
    assert again.paths_ == [str(file) for file in files]


def test_report_is_written_where_asked(fitted, tmp_path):
    out = fitted.report(tmp_path / "page.html")
    assert out == Path(tmp_path / "page.html")
    assert "80 images" in out.read_text()
