"""The number of groups: scores against other libraries, and data whose number of groups is known by construction."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, is_valid_linkage, ward
from sklearn.metrics import adjusted_rand_score, silhouette_samples

from spice_dist.errors import UserError
from spice_dist.suggest import (
    PLATEAU,
    composite,
    cut,
    describe,
    merge_tree,
    silhouettes,
    structureless,
    suggest,
)

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch):
    """Fewer repetitions: what is asked here does not depend on them."""
    for name, value in {"SUBSAMPLES": 3, "NULLS": 4, "STABILITY_DRAWS": 5, "GRID": 8, "SAMPLE": 1_000}.items():
        monkeypatch.setattr(f"spice_dist.suggest.{name}", value)


def mixture(k: int, n: int, noise: float, dimensions: int = 32, seed: int = 0) -> np.ndarray:
    """Features (n, dimensions) around k random centers, of equal weights."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((k, dimensions))
    return (centers[np.arange(n) % k] + noise * rng.standard_normal((n, dimensions))).astype(np.float32)


def test_silhouettes_are_scikit_learns_of_squared_distances():
    x = RNG.standard_normal((200, 7)) + 100.0  # far from the origin, where float32 squares would lose all digits
    labels = RNG.integers(0, 9, 200)
    labels[:2] = 9, 11  # two images alone in their clusters, and no cluster 10
    expected = np.asarray(silhouette_samples(x, labels, metric="sqeuclidean"))
    np.testing.assert_allclose(silhouettes(x, labels), expected, atol=1e-9)
    assert expected.std() > 0.1


def test_silhouettes_of_unit_vectors_are_those_of_cosine_distances():
    x = mixture(3, 90, 0.5)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    labels = np.arange(90) % 3
    np.testing.assert_allclose(
        silhouettes(x, labels), np.asarray(silhouette_samples(x, labels, metric="cosine")), atol=1e-5
    )


def test_silhouettes_of_copies_are_zero_and_not_nan():
    assert (silhouettes(np.ones((6, 2)), np.array([0, 0, 0, 1, 1, 1])) == 0).all()


def test_composite_follows_its_formula_and_lies_between_micro_and_macro():
    micro, macro = np.array([0.3, 0.2, 0.4]), np.array([0.1, 0.25, 0.4])
    weights = [(1 + np.tanh((a - b) / 0.2)) / 2 for a, b in zip(micro, macro, strict=True)]
    expected = [w * a + (1 - w) * b for w, a, b in zip(weights, micro, macro, strict=True)]
    np.testing.assert_allclose(composite(micro, macro), expected)
    np.testing.assert_array_equal(composite(micro, micro), micro)


def test_structureless_data_have_the_covariance_and_the_tails_but_not_the_groups():
    rng = np.random.default_rng(1)
    x = rng.standard_t(5, (20_000, 3)) * [3.0, 1.0, 0.1]
    blank = structureless(x, rng)
    np.testing.assert_allclose(np.cov(blank.T), np.diag(x.var(0)), atol=0.25)
    np.testing.assert_allclose(
        np.linalg.norm(blank / x.std(0), axis=1).std(), np.linalg.norm(x / x.std(0), axis=1).std(), rtol=0.02
    )
    poles = np.where(rng.random(2_000) < 0.5, -1.0, 1.0)[:, None] * [[1.0, 0.0]] + 0.1 * rng.standard_normal((2_000, 2))
    near_zero = [np.mean(np.abs(part[:, 0]) < 0.3) for part in (poles, structureless(poles, rng))]
    assert near_zero[0] < 0.01 < 0.1 < near_zero[1]


@pytest.mark.parametrize("k", [2, 3, 8, 25])
def test_separated_groups_are_counted_exactly(k: int):
    answer = suggest(mixture(k, 40 * k + 100, 0.4), seed=1, largest=30)
    assert (answer.found, answer.clusters) == (True, k)
    assert answer.coarse == k or 3 * answer.coarse <= 2 * k
    assert answer.fine == k or 2 * answer.fine >= 3 * k
    assert answer.low <= k <= answer.high
    assert len(answer.stability) == k
    assert min(answer.stability) > 0.95
    assert answer.images_per_cluster == pytest.approx((40 * k + 100) / k)
    assert answer.candidates == sorted(set(answer.candidates))
    for k_low, score in zip(answer.candidates, answer.scores, strict=True):
        assert (score >= PLATEAU * max(answer.scores)) <= (answer.low <= k_low <= answer.high)


def test_a_scan_goes_on_where_the_best_is_at_its_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("spice_dist.suggest.FIRST", 6)
    calls = []
    answer = suggest(mixture(12, 600, 0.3), progress=lambda done, total: calls.append((done, total)))
    assert answer.clusters == 12
    done = [pair[0] for pair in calls]
    assert done == sorted(done)
    assert calls[-1][0] == calls[-1][1]


NOISE = {
    "gaussian": lambda rng: rng.standard_normal((600, 1280)),
    "uniform cube": lambda rng: rng.random((600, 1280)),
    "heavy tails": lambda rng: rng.standard_t(3, (600, 1280)),
    "unequal spread": lambda rng: 5 + rng.standard_normal((600, 64)) * np.arange(1, 65) ** -0.5,
    "few images": lambda rng: rng.standard_normal((30, 1280)),
}


@pytest.mark.parametrize("name", NOISE)
def test_noise_has_no_groups(name: str):
    answer = suggest(NOISE[name](np.random.default_rng(2)), largest=40)
    assert not answer.found
    assert {answer.clusters, answer.coarse, answer.fine, answer.low, answer.high} == {1}
    assert answer.stability == []
    assert "no groups found" in describe(answer)


def test_one_image_repeated_or_too_few_are_one_clear_answer():
    for features in (
        np.tile(RNG.random((1, 64)), (500, 1)),
        np.zeros((50, 8)),
        RNG.random((12, 64)),
        RNG.random((1, 3)),
    ):
        answer = suggest(features)
        assert not answer.found
        assert "distinct images" in answer.notes[0]


def test_copies_do_not_change_the_answer():
    x = mixture(4, 300, 0.4)
    copies = np.concatenate([x, np.repeat(x[:5], 200, axis=0)])
    assert suggest(copies, largest=15).clusters == 4
    noise = np.random.default_rng(3).standard_normal((300, 64))
    assert not suggest(np.concatenate([noise, np.repeat(noise[:5], 100, axis=0)]), largest=15).found


def test_the_scale_and_the_precision_of_features_do_not_matter():
    x = mixture(5, 200, 0.4)
    one = suggest(x, largest=12)
    other = suggest(x.astype(np.float64) * 1e300, largest=12)
    assert other.candidates == one.candidates
    np.testing.assert_allclose(other.scores, one.scores, atol=1e-4)
    assert suggest(x.astype(np.float16), largest=12).clusters == one.clusters == 5


def test_features_with_many_equal_distances_are_scored_for_every_k():
    """Corners of a cube: Ward's mergers tie, which a cut by height would turn into fewer clusters than asked for."""
    corners = (np.arange(256)[:, None] >> np.arange(8)) & 1
    answer = suggest(np.column_stack([corners, 1 - corners]).astype(np.float32), largest=12)
    assert answer.candidates[0] == 2
    assert answer.candidates[-1] == 12
    assert np.isfinite([answer.scores, answer.errors, answer.null, answer.lifts]).all()


def test_a_seed_repeats_itself():
    x = mixture(3, 150, 0.5)
    assert suggest(x, seed=5, largest=8) == suggest(x, seed=5, largest=8)


def test_what_a_user_can_get_wrong_is_told():
    x = mixture(3, 60, 0.4)
    x[7, 3] = np.nan
    x[9, 0] = np.inf
    with pytest.raises(UserError, match="2 of 60 images are not finite"):
        suggest(x)
    with pytest.raises(UserError, match="at least 2"):
        suggest(mixture(3, 60, 0.4), largest=1)


def test_the_merge_tree_of_single_images_is_scipys_ward():
    x = RNG.standard_normal((25, 4))
    tree = merge_tree(x, np.arange(25))
    assert is_valid_linkage(tree)
    np.testing.assert_allclose(tree, ward(x), atol=1e-9)


def test_the_merge_tree_weighs_clusters_by_their_sizes():
    """Ward's own tree of images that lie on their cluster's mean merges them at height 0, then as ours."""
    labels = np.repeat(np.arange(6), [1, 9, 2, 5, 30, 3])
    x = RNG.standard_normal((6, 3))[labels]
    np.testing.assert_allclose(merge_tree(x, labels)[:, 2], ward(x)[-5:, 2], atol=1e-9)


def test_empty_clusters_are_merged_first():
    x = mixture(3, 30, 0.1)
    tree = merge_tree(x, np.array([0, 2, 4])[np.arange(30) % 3], num_clusters=6)
    assert (tree[:3, 2] == 0).all()
    assert (tree[3:, 2] > 0).all()
    assert len(set(cut(tree, 3)[[0, 2, 4]].tolist())) == 3


def test_cut_gives_scipys_groups_in_order_of_appearance():
    tree = merge_tree(RNG.standard_normal((20, 3)), np.arange(20))
    for count in range(1, 21):
        groups = cut(tree, count)
        assert adjusted_rand_score(groups, fcluster(tree, count, "maxclust")) == 1
        assert np.unique(groups, return_index=True)[1].tolist() == sorted(np.unique(groups, return_index=True)[1])
        assert len(set(groups.tolist())) == count
    for count in (0, 21):
        with pytest.raises(ValueError, match="cannot be cut"):
            cut(tree, count)


def test_the_description_has_a_bar_for_each_k_and_never_one_number_alone():
    answer = suggest(mixture(3, 150, 0.4), largest=8)
    text = describe(replace(answer, stability=[0.9, 0.8, 0.3]))
    assert sum(" #" in line and line.lstrip()[0].isdigit() for line in text.splitlines()) == len(answer.candidates)
    for part in (
        "suggested: 3 groups",
        "plausible: 3 to 3",
        f"coarser: {answer.coarse}",
        f"finer: {answer.fine}",
        "about 50 images",
    ):
        assert part in text
    assert "1 very stable, 1 stable, 1 do not trust" in text
    assert "note: " in describe(replace(answer, notes=["a sentence"]))
