"""Corrections spread as closed forms and enumeration say, and nothing that is fixed changes."""

import itertools

import numpy as np
import pytest

from spice_dist.methods import corrections
from spice_dist.methods.corrections import (
    Corrections,
    conditional_mean,
    conditioned,
    divided,
    learn,
    regrouped,
    resolved,
    spread_corrections,
)
from spice_dist.neighbors import without_itself
from spice_dist.pseudo_labels import UNRELIABLE

NONE = np.zeros((0, 2), np.int64)


def clumps(sizes: list[int], seed: int = 0, width: float = 0.3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit features around orthogonal directions, the clump of each, and its nearest others, nearest first."""
    rng = np.random.default_rng(seed)
    of_image = np.repeat(np.arange(len(sizes)), sizes)
    features = np.eye(8)[of_image] + width * rng.normal(size=(len(of_image), 8)) / np.sqrt(8)
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    near = np.argsort(-(features @ features.T), 1, kind="stable")[:, :16].astype(np.int32)
    return features, of_image, without_itself(near)


def no_corrections(images: int, groups: int) -> dict:
    return {
        "roots": np.arange(groups),
        "parts": {},
        "fixed": np.full(images, UNRELIABLE),
        "outside": np.zeros(images, bool),
        "same": NONE,
        "different": NONE,
        "learned_same": NONE,
        "learned_different": NONE,
    }


def posterior(labels: np.ndarray, groups: int, sure: float = 0.8) -> np.ndarray:
    return np.where(np.eye(groups)[labels] > 0, sure, (1 - sure) / (groups - 1))


def weights(neighbors: np.ndarray) -> np.ndarray:
    """The symmetric graph, dense: 1 for mutual neighbours, 1/2 where one is the other's."""
    dense = np.zeros((len(neighbors), len(neighbors)))
    for image, others in enumerate(neighbors):
        dense[image, others] = 1
    return (dense + dense.T) / 2


@pytest.mark.parametrize("smoothness", [1, 2, 3])
def test_the_mean_is_the_gaussian_conditional_in_closed_form(monkeypatch, smoothness):
    monkeypatch.setattr(corrections, "SMOOTHNESS", smoothness)
    _, _, neighbors = clumps([20, 20])
    rng = np.random.default_rng(1)
    known = np.isin(np.arange(40), [0, 3, 25])
    values = np.where(known[:, None], rng.normal(size=(40, 3)), 0)
    graph = weights(neighbors)
    root = np.sqrt(graph.sum(1))
    factor = np.eye(40) * (1 + corrections.GROUNDING) - graph / np.outer(root, root)
    precision = np.linalg.matrix_power(factor, smoothness)
    z = root[:, None] * values
    solved = -np.linalg.solve(precision[~known][:, ~known], precision[~known][:, known] @ z[known])
    expected = values.copy()
    expected[~known] = solved / root[~known, None]
    np.testing.assert_allclose(conditional_mean(values, known, neighbors), expected, atol=1e-4)


def test_without_grounding_and_of_smoothness_1_it_is_label_propagation_with_clamped_labels(monkeypatch):
    """Zhu and Ghahramani's iteration: each unlabelled image takes the mean of its neighbours until nothing changes."""
    monkeypatch.setattr(corrections, "SMOOTHNESS", 1)
    monkeypatch.setattr(corrections, "GROUNDING", 0.0)
    _, _, neighbors = clumps([30], width=0.8)
    known = np.isin(np.arange(30), [0, 7])
    values = np.zeros((30, 2))
    values[[0, 7], [0, 1]] = 1
    walk = weights(neighbors)
    walk /= walk.sum(1, keepdims=True)
    expected = values.copy()
    for _ in range(2000):
        expected[~known] = (walk @ expected)[~known]
    np.testing.assert_allclose(conditional_mean(values, known, neighbors), expected, atol=1e-3)


def test_a_correction_moves_images_like_it_and_leaves_another_clump_exactly_as_it_was():
    _, of_image, neighbors = clumps([30, 30, 30])
    labels = np.array([0, 0, 1])[of_image]  # clumps 0 and 1 are taken for one group; 2 is another
    probs = posterior(labels, 3, 0.6)
    known = np.isin(np.arange(90), [30, 31, 32, 0])
    target = probs.copy()
    target[[30, 31, 32]] = np.eye(3)[2]
    target[0] = np.eye(3)[0]
    spread = spread_corrections(probs, target, known, neighbors)
    np.testing.assert_array_equal(spread[known], target[known])
    np.testing.assert_allclose(spread.sum(1), 1)
    assert (spread[of_image == 1].argmax(1) == 2).mean() > 0.8
    assert (spread[of_image == 0].argmax(1) == 0).all()
    np.testing.assert_allclose(spread[of_image == 2], probs[of_image == 2], atol=1e-9)


def test_one_image_does_not_draw_the_whole_group_with_it():
    _, of_image, neighbors = clumps([30, 30])
    probs = posterior(of_image, 2, 0.7)
    known, target = np.arange(60) == 0, np.where((np.arange(60) == 0)[:, None], [0.0, 1.0], probs)
    changes = corrections.conditional_mean(np.where(known[:, None], target - probs, 0), known, neighbors)
    assert ((probs + changes)[:30].argmax(1) == 1).mean() > 0.5, "it would"
    spread = spread_corrections(probs, target, known, neighbors)
    assert spread[0].argmax() == 1
    assert (spread[:30].argmax(1) == 0).mean() >= 0.5
    assert (spread[1:30, 1] >= probs[1:30, 1]).all()


def test_without_corrections_the_posterior_is_unchanged():
    _, of_image, neighbors = clumps([20, 20])
    probs = posterior(of_image, 2)
    spread = spread_corrections(probs, probs, np.zeros(40, bool), neighbors)
    np.testing.assert_allclose(spread, probs, rtol=1e-12)


def test_pairs_condition_the_posterior_as_enumeration_does():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), 6)
    same, different = np.array([[0, 1], [1, 2]]), np.array([[3, 4]])
    result, told = conditioned(probs, np.zeros(6, bool), same, different, NONE, NONE)
    expected = np.zeros((6, 4))
    for groups in itertools.product(range(4), repeat=5):
        if groups[0] == groups[1] == groups[2] and groups[3] != groups[4]:
            weight = np.prod(probs[np.arange(5), groups])
            for image, group in enumerate(groups):
                expected[image, group] += weight
    np.testing.assert_allclose(result[:5], expected[:5] / expected[:5].sum(1, keepdims=True), rtol=1e-6)
    np.testing.assert_array_equal(result[5], probs[5])
    assert told.tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_pairs_that_come_one_after_the_other_are_worth_what_they_are_together(order):
    """And a pair that comes again, or follows from others, is worth nothing more."""
    probs = np.random.default_rng(1).dirichlet(np.ones(4), 6)
    pairs, none = np.array([[0, 1], [1, 2], [3, 4], [0, 2]]), np.zeros(6, bool)
    at_once, told = conditioned(probs, none, pairs, NONE, NONE, NONE)
    result = probs
    for number in range(len(order)):
        new, learned = pairs[[order[number]]], pairs[list(order[:number])]
        result, _ = conditioned(result, none, new, NONE, learned, NONE)
    np.testing.assert_allclose(result, at_once, rtol=1e-9)
    again, nothing = conditioned(result, none, pairs, NONE, pairs, NONE)
    np.testing.assert_array_equal(again, result)
    assert told.tolist() == [True] * 5 + [False]
    assert not nothing.any()


def test_of_two_sets_of_images_that_are_apart_another_pair_is_no_evidence():
    probs, none = np.random.default_rng(1).dirichlet(np.ones(4), 6), np.zeros(6, bool)
    same, different = np.array([[0, 1], [2, 3]]), np.array([[0, 2]])
    result, _ = conditioned(probs, none, same, different, NONE, NONE)
    again, told = conditioned(result, none, NONE, np.array([[3, 1], [2, 0]]), same, different)
    np.testing.assert_array_equal(again, result)
    assert not told.any()
    other, told = conditioned(result, none, NONE, np.array([[1, 4]]), same, different)
    assert told.tolist() == [True, True, False, False, True, False]
    expected = result[4] * (1 - result[1])
    np.testing.assert_allclose(other[4], expected / expected.sum(), rtol=1e-6)


def test_merging_adds_columns_and_dividing_shares_one():
    _, of_image, neighbors = clumps([10, 10, 10, 10])
    probs = np.random.default_rng(0).dirichlet(np.ones(4), 40)
    parts = np.where(of_image == 1, np.arange(40) % 2, UNRELIABLE)
    result, groups = regrouped(probs, np.array([0, 1, 0, 3]), {1: parts}, neighbors)
    assert groups == [[0], [1, 2], [0], [3]]
    np.testing.assert_allclose(result[:, 0], probs[:, 0] + probs[:, 2])
    np.testing.assert_allclose(result[:, 1] + result[:, 2], probs[:, 1])
    np.testing.assert_allclose(result[:, 3], probs[:, 3])
    np.testing.assert_allclose(
        result[of_image == 1, 1], np.where(parts[of_image == 1] == 0, probs[of_image == 1, 1], 0)
    )


@pytest.mark.parametrize("size", [5, 40])
def test_a_group_of_two_clumps_is_divided_into_them(size):
    features, of_image, _ = clumps([size, size])
    labels = divided(features, 2, seed=0)
    assert (labels == of_image).all() or (labels == 1 - of_image).all()


def test_every_pair_is_kept_or_the_impossible_is_said():
    """Oracle: all groupings of six images tell whether the pairs can be kept."""
    rng = np.random.default_rng(0)
    every = np.array(list(itertools.product(range(3), repeat=6)))
    outcomes = []
    for _ in range(60):
        probs = rng.dirichlet(np.ones(3), 8)
        pairs = np.array([(a, b) for a, b in rng.integers(6, size=(7, 2)) if a != b])
        same, different = pairs[:2], pairs[2:]
        fixed = np.full(8, UNRELIABLE)
        fixed[0] = 2
        kept = (every[:, same[:, 0]] == every[:, same[:, 1]]).all(1) & (every[:, 0] == 2)
        possible = (kept & (every[:, different[:, 0]] != every[:, different[:, 1]]).all(1)).any()
        outcomes.append(possible)
        if not possible:
            continue
        labels = resolved(probs, fixed, same, different)
        assert (labels[same[:, 0]] == labels[same[:, 1]]).all()
        assert (labels[different[:, 0]] != labels[different[:, 1]]).all()
        assert labels[0] == 2
        np.testing.assert_array_equal(labels[6:], probs[6:].argmax(1))
    assert sum(outcomes) > 20
    four_apart = np.array(list(itertools.combinations(range(4), 2)))
    with pytest.raises(ValueError, match="more images are kept apart than there are groups"):
        resolved(rng.dirichlet(np.ones(3), 8), np.full(8, UNRELIABLE), NONE, four_apart)


def test_what_has_been_learned_is_not_learned_again():
    """A new correction changes the posterior as if the earlier pairs and fixed images were none."""
    features, of_image, neighbors = clumps([20, 20, 20, 20])
    probs = 0.4 * np.eye(4)[of_image] + 0.15
    given = no_corrections(80, 4)
    given["same"], given["different"] = np.array([[0, 20]]), np.array([[1, 2]])
    once = learn(features, probs, of_image, neighbors, Corrections(**given), seed=0)
    given |= {"learned_same": given["same"], "learned_different": given["different"], "same": NONE, "different": NONE}
    again = learn(features, once.probs, once.labels, neighbors, Corrections(**given), seed=0)
    np.testing.assert_array_equal(again.labels, once.labels)
    np.testing.assert_allclose(again.probs, once.probs, atol=1e-5)

    given["fixed"][60] = once.labels[40]
    later = learn(features, once.probs, once.labels, neighbors, Corrections(**given), seed=0)
    given |= {"learned_same": NONE, "learned_different": NONE}
    alone = learn(features, once.probs, once.labels, neighbors, Corrections(**given), seed=0)
    np.testing.assert_allclose(later.probs, alone.probs, atol=1e-5)
    assert not np.allclose(later.probs, once.probs, atol=1e-2)


def test_a_later_correction_of_one_image_of_a_pair_is_one_of_both():
    features, of_image, neighbors = clumps([20, 20, 20])
    given = no_corrections(60, 3)
    given["learned_same"], given["fixed"][0] = np.array([[0, 1]]), 2
    learned = learn(features, posterior(of_image, 3), of_image, neighbors, Corrections(**given), seed=0)
    assert learned.labels[[0, 1]].tolist() == [2, 2]
    known = np.where(np.arange(60)[:, None] == 0, np.eye(3)[2], posterior(of_image, 3))
    result, told = conditioned(known, np.arange(60) == 0, NONE, NONE, given["learned_same"], NONE)
    assert np.flatnonzero(told).tolist() == [0, 1], "so that it spreads from both"
    assert result[:2].argmax(1).tolist() == [2, 2]


def test_where_a_pair_decides_against_the_posterior_the_posterior_follows():
    """Two images kept apart before, whose best groups are one: the less sure one has the other group, and surely."""
    features, of_image, neighbors = clumps([20, 20])
    given = no_corrections(40, 2)
    given["learned_different"] = np.array([[0, 1]])
    probs = np.where(of_image[:, None] == 0, [0.999, 0.001], [0.001, 0.999])
    probs[1] = 0.9, 0.1
    learned = learn(features, probs, of_image, neighbors, Corrections(**given), seed=0)
    np.testing.assert_array_equal(learned.labels, np.where(np.arange(40) == 1, 1, of_image))
    np.testing.assert_array_equal(learned.probs.argmax(1), learned.labels)
    assert learned.probs[1, 1] > 0.999


def test_what_has_the_fewest_groups_left_is_placed_first():
    """Of three groups one way alone keeps all pairs; to place the surest image first would end without a group."""
    fixed = np.full(12, UNRELIABLE)
    fixed[[0, 5]] = 2, 1
    same, different = np.array([[0, 1], [2, 3]]), np.array([[1, 2], [3, 4], [2, 5], [6, 7]])
    labels = resolved(np.random.default_rng(0).dirichlet(np.ones(3), 12), fixed, same, different)
    assert (labels[same[:, 0]] == labels[same[:, 1]]).all()
    assert (labels[different[:, 0]] != labels[different[:, 1]]).all()


def test_all_corrections_together_keep_what_is_fixed_and_number_groups_without_holes():
    features, of_image, neighbors = clumps([20, 20, 20, 20, 20])
    probs = posterior(np.array([0, 0, 1, 2, 3])[of_image], 4)
    given = no_corrections(100, 4) | {"roots": np.array([0, 1, 1, 3]), "parts": {0: 2}}
    given["fixed"][[0, 1, 2, 3]] = 3, 0, 0, 0  # three images like the first are confirmed
    given["outside"][[5, 45]] = True
    learned = learn(features, probs, probs.argmax(1), neighbors, Corrections(**given), seed=0)
    part = learned.labels[1]
    assert learned.groups == [[0, 1], [2], [2], [3]]
    assert set(learned.labels) == {0, 1, 2, 3, 4}
    expected = np.array([part, 1 - part, 2, 2, 3])[of_image]
    expected[[0, 5, 45]] = 3, 4, 4
    np.testing.assert_array_equal(learned.labels, expected)
    assert learned.fixed[[0, 1, 2, 3, 5, 45]].tolist() == [3, part, part, part, 4, 4]
    assert (learned.fixed != UNRELIABLE).sum() == 6
    np.testing.assert_allclose(learned.probs.sum(1), 1)
    np.testing.assert_array_equal(learned.probs.argmax(1), learned.labels)
    assert (learned.probs[~given["outside"], -1] == 0).all()


def test_a_group_that_loses_its_last_image_is_left_out():
    features, of_image, neighbors = clumps([20, 20, 1])
    given = no_corrections(41, 3)
    given["fixed"][40] = 0
    learned = learn(features, posterior(of_image, 3), of_image, neighbors, Corrections(**given), seed=0)
    assert learned.groups == [[0], [1], []]
    assert learned.probs.shape == (41, 2)


def test_too_few_images_to_divide_are_refused():
    features, of_image, neighbors = clumps([20, 20, 4])
    given = no_corrections(44, 3)
    given["parts"] = {2: 2}
    given["fixed"][41] = 0
    with pytest.raises(ValueError, match="group 2 has 3 images left, too few for 2 groups of two or more"):
        learn(features, posterior(of_image, 3), of_image, neighbors, Corrections(**given), seed=0)
