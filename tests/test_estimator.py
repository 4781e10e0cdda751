"""SpiceClusterer keeps scikit-learn's promises."""

import copy
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import joblib
import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.metrics import silhouette_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator

from spice_dist import SpiceClusterer, estimator
from spice_dist.cli import parser
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


def test_clusters_have_names(fitted, tmp_path):
    assert fitted.names_ == ["group-00", "group-01", "group-02", "group-03"]
    shutil.copytree(fitted.run_ / "model", tmp_path / "model")
    (tmp_path / "model/names.json").write_text('{"2": "twos\\n"}')
    named = SpiceClusterer.load(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    assert pickle.loads(pickle.dumps(named)).names_ == ["group-00", "group-01", "twos", "group-03"]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"n_clusters": 1}, "^n_clusters is 1;"),
        ({"seed": -1}, "^seed is -1;"),
        ({"backbone": "resnet18", "weights": "timm", "recipe": "nothing"}, "nothing"),
        ({"weights": "timm"}, "^weights needs the network that they belong to: give backbone NAME"),
        ({"run": ""}, "^run is empty; give a path"),
    ],
    ids=str,
)
def test_a_mistake_in_python_names_the_parameter(parameters, words):
    model = SpiceClusterer(**{"n_clusters": 4, "settings": TINY, **parameters})
    with pytest.raises(UserError, match=words) as caught:
        model.fit(pixels())
    assert "--" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("raise the limit with --max-bad", 'raise the limit with settings={"data.max_bad": ...}'),
        ("use --set reliable.rule=adaptive", "use settings={\"reliable.rule\": 'adaptive'}"),
        ("(--set moco.batch=...)", '(settings={"moco.batch": ...})'),
        ("give another --out", "give another run"),
        ("is read by --trust-foreign-beton", "is read by the command's --trust-foreign-beton"),
        ("a -- b, photos/--out/x--seed", "a -- b, photos/--out/x--seed"),
    ],
)
def test_options_in_messages_become_parameters(text, expected):
    with pytest.raises(UserError) as caught, estimator._in_python():
        raise UserError(text)
    assert str(caught.value) == expected


def test_the_options_that_become_parameters_exist_and_so_do_the_parameters():
    commands = parser()._actions[-1].choices
    assert isinstance(commands, dict)
    options = {name for command in commands.values() for action in command._actions for name in action.option_strings}
    assert {f"--{name}" for name in estimator.PARAMETERS} <= options
    assert {name for name in estimator.PARAMETERS.values() if "=" not in name} <= SpiceClusterer().get_params().keys()


def unfitted(model: SpiceClusterer, **parameters: object) -> SpiceClusterer:
    """A clone, with these parameters changed."""
    copied = clone(model)
    assert isinstance(copied, SpiceClusterer)
    return copied.set_params(**parameters)


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
    with pytest.raises(UserError, match="give backbone"):
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


def test_a_finished_run_is_opened_as_it_was_fitted(tmp_path):
    fitted = SpiceClusterer(n_clusters=4, settings=TINY, run=tmp_path / "run").fit(pixels())
    opened = SpiceClusterer.load(tmp_path / "run")
    for name in ("labels_", "confidence_"):
        assert np.array_equal(getattr(opened, name), getattr(fitted, name)), name
    for name in ("n_clusters_", "metrics_", "paths_"):
        assert getattr(opened, name) == getattr(fitted, name), name
    assert np.array_equal(opened.predict_proba(pixels()), fitted.predict_proba(pixels()))
    assert (tmp_path / "run/report.html").samefile(opened.report(tmp_path / "run/report.html"))
    shutil.copytree(tmp_path / "run/model", tmp_path / "model")
    of_model = SpiceClusterer.load(tmp_path / "model")
    assert np.array_equal(of_model.predict(pixels()), fitted.labels_)
    with pytest.raises(UserError, match="load the run folder"):
        of_model.report(tmp_path / "page.html")
    with pytest.raises(UserError, match="holds no model"):
        SpiceClusterer.load(tmp_path / "run/data")


def test_probabilities_belong_to_the_predicted_clusters(fitted):
    proba = fitted.predict_proba(pixels())
    assert proba.shape == (80, 4)
    np.testing.assert_allclose(proba.sum(1), 1, rtol=1e-5)
    assert np.array_equal(proba.argmax(1), fitted.labels_)
    np.testing.assert_allclose(proba.max(1), fitted.confidence_, atol=1e-4)  # stored with four digits


def test_the_score_is_the_silhouette_of_the_features(fitted):
    features, labels = fitted.transform(pixels()), fitted.predict(pixels())
    expected = silhouette_score(features, labels, metric="cosine") if len(set(labels)) > 1 else 0.0
    assert fitted.score(pixels()) == pytest.approx(expected, abs=1e-5)
    assert fitted.score(pixels(), np.zeros(80)) == fitted.score(pixels()), "labels are not looked at"


ANSWER = """
import pickle, sys
import numpy as np
model = pickle.load(open(sys.argv[1], "rb"))
np.save(sys.argv[3], model.predict_proba(np.load(sys.argv[2])))
print(model.labels_.sum(), model)
"""


def test_a_pickle_carries_the_network_to_another_process(fitted, tmp_path):
    """Also after the temporary run folder is gone, and through joblib with compression."""
    gone = copy.deepcopy(fitted)
    gone.run_ = tmp_path / "gone"
    with open(tmp_path / "model.pickle", "wb") as file:
        pickle.dump(gone, file)
    np.save(tmp_path / "images.npy", pixels())
    files = [tmp_path / name for name in ("model.pickle", "images.npy", "answer.npy")]
    program = [sys.executable, "-c", ANSWER, *map(str, files)]
    printed = subprocess.run(program, check=True, capture_output=True, text=True, timeout=120).stdout
    assert np.array_equal(np.load(files[2]), fitted.predict_proba(pixels()))
    assert printed.startswith(f"{fitted.labels_.sum()} SpiceClusterer(n_clusters=4")
    joblib.dump(gone, tmp_path / "model.joblib", compress=3)
    assert np.array_equal(joblib.load(tmp_path / "model.joblib").predict(pixels()), fitted.labels_)
    with pytest.raises(UserError, match="not a folder"):
        gone.report(tmp_path / "page.html")


def test_an_unfitted_one_is_pickled_too():
    model = pickle.loads(pickle.dumps(SpiceClusterer(n_clusters=7, seed=5)))
    assert model.get_params() == SpiceClusterer(n_clusters=7, seed=5).get_params()
    with pytest.raises(NotFittedError):
        model.predict(pixels())


def test_a_list_of_arrays_is_as_good_as_an_array(fitted):
    images = pixels()
    assert np.array_equal(fitted.predict(list(images)), fitted.labels_)
    larger = [np.kron(image, np.ones((2, 2), np.uint8)) for image in images[:10]]
    mixed = [*larger, *(np.repeat(image[..., None], 3, 2) for image in images[10:])]
    assert fitted.transform(mixed).shape == (80, 16)
    assert np.array_equal(fitted.predict(mixed)[10:], fitted.labels_[10:])


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([], "list of images is empty"),
        ([np.zeros((8, 8))], r"image 0 of the list is float64 \(8, 8\)"),
        ([np.zeros((8, 8), np.uint8), np.zeros(8, np.uint8)], r"image 1 of the list is uint8 \(8,\)"),
        ([np.zeros((8, 8), np.uint8), "a.png"], "image 1 of the list is str"),
        ([Image.new("L", (8, 8))], "the list of images holds Image: give paths"),
        (np.zeros((3, 10)), "convert with"),
    ],
)
def test_lists_of_something_else_are_refused_in_one_line(fitted, images, words):
    with pytest.raises(UserError, match=words):
        fitted.predict(images)


def test_an_unreadable_file_shifts_no_row(fitted, tmp_path):
    files = []
    for i, image in enumerate(pixels()):
        files.append(str(tmp_path / f"{i:03d}.png"))
        Image.fromarray(image).save(files[-1])
    (tmp_path / "010.png").write_bytes(b"no image")
    readable = np.arange(80) != 10
    with pytest.warns(UserWarning, match="1 of 80 images cannot be used"):
        labels, proba = fitted.predict(files), None
    with pytest.warns(UserWarning, match="010.png"):
        proba = fitted.predict_proba(files)
    assert labels[10] == -1
    assert np.isnan(proba[10]).all()
    assert np.array_equal(labels[readable], fitted.labels_[readable])
    again = SpiceClusterer(n_clusters=4, settings=TINY, seed=3).fit(files)
    assert again.paths_ == files
    assert (again.labels_[10], np.isnan(again.confidence_[10])) == (-1, True)
    assert (again.labels_[readable] >= 0).all()
    assert again.n_clusters_ == 4
    strict = unfitted(again, unreadable="error")
    with pytest.raises(UserError, match="more than the 0.0% allowed"):
        strict.fit(files)
    again.set_params(unreadable="error")
    with pytest.raises(UserError, match="010.png"):
        again.transform(files)
    with pytest.raises(UserError, match="'keep' or 'error'"):
        again.set_params(unreadable="skip").predict(files)


def test_a_pipeline_and_set_output_take_its_features(fitted):
    features = fitted.transform(pixels())
    frame = copy.deepcopy(fitted).set_output(transform="pandas").transform(pixels())
    assert list(frame.columns) == [f"spiceclusterer{i}" for i in range(16)]
    np.testing.assert_array_equal(frame.to_numpy(), features)
    pipeline = make_pipeline(clone(fitted), KMeans(3, random_state=0))
    labels = pipeline.fit_predict(pixels())
    expected = KMeans(3, random_state=0).fit_predict(features)
    assert np.array_equal(labels, expected)


def test_fit_predict_and_the_number_of_numbers_of_an_image(fitted):
    assert fitted.n_features_in_ == 64
    colour = np.repeat(pixels(20)[..., None], 3, 3)
    model = unfitted(fitted, n_clusters=2)
    labels = model.fit_predict(colour)
    assert np.array_equal(labels, model.labels_)
    assert (model.n_features_in_, model.n_clusters_) == (192, 2)


def test_the_text_says_what_it_is_and_what_it_has_learnt(fitted):
    assert repr(SpiceClusterer(n_clusters=7)) == "SpiceClusterer(n_clusters=7)"
    assert f"  # fitted: 80 images in 4 clusters, {fitted.run_}" in repr(fitted)
    assert repr(eval(repr(SpiceClusterer("auto", seed=2)))) == "SpiceClusterer(seed=2)"


def test_predicting_changes_nothing_and_rows_do_not_depend_on_each_other(fitted):
    before = copy.copy(vars(fitted))
    assert np.array_equal(fitted.predict(pixels()[::-1]), fitted.labels_[::-1])
    parts = np.concatenate([fitted.transform(pixels()[i : i + 8]) for i in range(0, 80, 8)])
    np.testing.assert_allclose(parts, fitted.transform(pixels()), atol=1e-5)
    assert vars(fitted) == before


class OfTables(SpiceClusterer):
    """Says that it takes tables of numbers, so that scikit-learn runs its checks, which give it nothing else."""

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags


# the checks that fit a table of real numbers, which is no image; where their claim is tested on images here
NO_TABLES = {
    "check_fit_score_takes_y": "test_the_score_is_the_silhouette_of_the_features",
    "check_estimators_overwrite_params": "test_parameters_survive_cloning_and_fitting_changes_none",
    "check_dont_overwrite_parameters": "test_parameters_survive_cloning_and_fitting_changes_none",
    "check_estimators_fit_returns_self": "every fit here goes on with what fit returns",
    "check_n_features_in": "test_fit_predict_and_the_number_of_numbers_of_an_image",
    "check_pipeline_consistency": "test_a_pipeline_and_set_output_take_its_features",
    "check_estimators_pickle": "test_a_pickle_carries_the_network_to_another_process",
    "check_transformer_general": "test_transform_gives_one_unit_vector_per_image",
    "check_clustering": "test_predicting_the_training_images_gives_their_labels",
    "check_methods_sample_order_invariance": "test_predicting_changes_nothing_and_rows_do_not_depend_on_each_other",
    "check_methods_subset_invariance": "test_predicting_changes_nothing_and_rows_do_not_depend_on_each_other",
    "check_dict_unchanged": "test_predicting_changes_nothing_and_rows_do_not_depend_on_each_other",
    "check_fit_idempotent": "test_the_same_seed_gives_the_same_labels_again_and_from_files",
    "check_fit_check_is_fitted": "test_before_fitting_it_says_so",
    "check_dtype_object": "test_lists_of_something_else_are_refused_in_one_line",
    "check_estimators_empty_data_messages": "test_lists_of_something_else_are_refused_in_one_line",
    "check_fit1d": "test_lists_of_something_else_are_refused_in_one_line",
    "check_complex_data": "only uint8 is an image: a UserError says so, where the check wants a ValueError",
    "check_estimators_nan_inf": "uint8 holds no NaN",
    "check_estimators_dtypes": "only uint8 is an image",
    "check_transformer_preserve_dtypes": "features are float32 whatever the images are",
    "check_positive_only_tag_during_fit": "uint8 holds no negative number",
    "check_readonly_memmap_input": "a table is refused; images in an .npy file are read as a memory map",
    "check_f_contiguous_array_estimator": "a table is refused",
    "check_transformer_data_not_an_array": "a table is refused; anything with __array__ is made one",
    "check_estimator_sparse_tag": "images are never sparse",
    "check_estimator_sparse_array": "images are never sparse",
    "check_estimator_sparse_matrix": "images are never sparse",
    "check_n_features_in_after_fitting": "images of another size are resized, not refused",
    "check_fit2d_predict1d": "images of another size are resized, not refused",
    "check_fit2d_1sample": "a UserError says how many images are needed, where the check wants a ValueError",
    "check_fit2d_1feature": "a table is refused",
}


@pytest.fixture
def any_types() -> Iterator[None]:
    """Types of arguments are not checked: scikit-learn sets parameters to nonsense, which alone must not raise."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_the_checks_of_scikit_learn_pass_but_those_on_tables(any_types):
    """None fails that is not in the list, and all in the list do: whatever begins to pass must leave it."""
    checked = check_estimator(
        OfTables(n_clusters=3, settings=TINY), expected_failed_checks=NO_TABLES, on_skip=None, on_fail=None
    )
    failed, expected, passed = (
        {row["check_name"] for row in checked if row["status"] == status} for status in ("failed", "xfail", "passed")
    )
    assert failed == set()
    assert expected == set(NO_TABLES)
    assert len(passed) >= 15
    tests = {reason for reason in NO_TABLES.values() if reason.startswith("test_")}
    assert tests <= set(globals()), "a test that the list names is gone"
