"""Learn from corrections of a clustering: groups merged and divided, images fixed, pairs of one or of two groups.

Arrays in, arrays out. M = images, K = groups, S = neighbours known of each. The clustering is a posterior (M, K).

Merging adds columns up. Dividing clusters the neighbour graph of a group's images. What is known of single images are
values of the posterior at some nodes of the graph of nearest neighbours. Only the differences to the posterior before
spread to other nodes (residuals, as in Correct and Smooth, Huang et al. 2021): far from all corrections nothing
changes. They spread as the mean of a Gaussian process on the graph, given its values at the corrected nodes. Its
precision is (L + GROUNDING)^SMOOTHNESS with the normalised Laplacian L, a Matern process (Borovitskiy et al. 2021).
Label propagation with clamped labels (Zhu and Ghahramani 2002) is the case of smoothness 1 without grounding; with it
ten images of thousands change their nearest neighbours alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from scipy.sparse import csgraph, linalg

from spice_dist import graph
from spice_dist.neighbors import nearest, without_itself
from spice_dist.pseudo_labels import UNRELIABLE

NEIGHBORS = 15  # of the graph over which corrections spread
GROUNDING, SMOOTHNESS = 0.1, 2  # chosen over four data sets together, see bench_corrections
STEPS = 8  # of the random walk by which a group is divided
KEPT = 0.5  # share of a group's images that stay in it, but for those that are corrected
FEW = 20  # images of a group up to which it is divided by k-means of the features
FLOOR = 1e-6  # of a probability, so that no evidence is final

Pairs = Int[np.ndarray, "_ 2"]


@dataclass(frozen=True)
class Corrections:
    """What is known beside the posterior; groups are numbered as in it."""

    roots: Int[np.ndarray, " K"]  # of each group the one that it becomes one with, itself if it stays
    parts: Mapping[int, int]  # root -> number of groups that it is divided into
    fixed: Int[np.ndarray, " M"]  # the group of an image, UNRELIABLE where it is not fixed
    outside: Bool[np.ndarray, " M"]  # images of no group
    same: Pairs
    different: Pairs
    learned_same: Pairs  # of earlier corrections: they hold, and the posterior has learned them
    learned_different: Pairs

    @property
    def all_same(self) -> Pairs:
        return np.concatenate([self.learned_same, self.same])

    @property
    def all_different(self) -> Pairs:
        return np.concatenate([self.learned_different, self.different])


@dataclass(frozen=True)
class Learned:
    """Groups after corrections, numbered anew without empty ones; images outside are the last one."""

    probs: Float[np.ndarray, "M G"]
    labels: Int[np.ndarray, " M"]
    fixed: Int[np.ndarray, " M"]
    groups: list[list[int]]  # of each group before those that its images are in by merging and dividing


def learn(
    features: Float[np.ndarray, "M D"], probs: Float[np.ndarray, "M K"], labels: Int[np.ndarray, " M"],
    neighbors: Int[np.ndarray, "M S"], corrections: Corrections, seed: int,
) -> Learned:  # fmt: skip
    """Apply the corrections to a clustering and its posterior, and spread them to similar images.

    Raises:
        ValueError: more images are kept apart than there are groups, or a group has too few to be divided.
    """
    fixed, roots = corrections.fixed, corrections.roots
    # more neighbours of few images would reach into other groups
    neighbors = neighbors[:, : min(NEIGHBORS, max(2, len(labels) // (2 * probs.shape[1])))]
    before = roots[np.where(fixed != UNRELIABLE, fixed, labels)]
    parts = {root: np.full(len(labels), UNRELIABLE) for root in corrections.parts}
    for root, of_images in parts.items():
        members = (before == root) & ~corrections.outside
        if members.sum() < 2 * corrections.parts[root]:
            raise ValueError(
                f"group {root} has {members.sum()} images left, too few for {corrections.parts[root]} groups of two or "
                "more; give fewer parts"
            )
        of_images[members] = divided(features[members], corrections.parts[root], seed)
    probs, groups = regrouped(probs, roots, parts, neighbors)

    def renumbered(of_images: Int[np.ndarray, " M"]) -> Int[np.ndarray, " M"]:
        part = sum((np.where(roots[of_images] == root, np.maximum(part, 0), 0) for root, part in parts.items()), 0)
        return np.array([new[0] for new in groups])[of_images] + part

    is_fixed = (fixed != UNRELIABLE) & ~corrections.outside
    fixed = np.where(is_fixed, renumbered(np.where(is_fixed, fixed, 0)), UNRELIABLE)
    one_hot = np.eye(probs.shape[1])
    known = probs.copy()
    known[is_fixed] = one_hot[fixed[is_fixed]]
    inside = partial(_inside, outside=corrections.outside)
    same, different = inside(corrections.same), inside(corrections.different)
    learned_same, learned_different = inside(corrections.learned_same), inside(corrections.learned_different)
    known, told = conditioned(known, is_fixed, same, different, learned_same, learned_different)
    spread = spread_corrections(probs, known, told, neighbors)
    found = resolved(spread, fixed, inside(corrections.all_same), inside(corrections.all_different))
    certain = is_fixed | (found != spread.argmax(1))
    spread[certain] = one_hot[found[certain]]
    return _without_empty(spread, found, fixed, groups, corrections.outside)


def _inside(pairs: Pairs, outside: Bool[np.ndarray, " M"]) -> Pairs:
    return pairs[~outside[pairs].any(1)]


def _without_empty(
    probs: Float[np.ndarray, "M G"], labels: Int[np.ndarray, " M"], fixed: Int[np.ndarray, " M"],
    groups: list[list[int]], outside: Bool[np.ndarray, " M"],
) -> Learned:  # fmt: skip
    """Leave empty groups out and add the group of images outside, if there are any, as the last one."""
    stay = np.unique(labels[~outside])
    number = {group: place for place, group in enumerate(stay.tolist())}
    lookup = np.full(probs.shape[1], UNRELIABLE)
    lookup[stay] = np.arange(len(stay))
    probs = probs[:, stay] + FLOOR
    probs /= probs.sum(1, keepdims=True)
    labels, is_fixed = np.where(outside, len(stay), lookup[labels]), fixed != UNRELIABLE
    fixed = np.where(outside, len(stay), np.where(is_fixed, lookup[np.where(is_fixed, fixed, 0)], UNRELIABLE))
    if outside.any():
        probs = np.column_stack([probs * ~outside[:, None], outside])
    groups = [[number[group] for group in new if group in number] for new in groups]
    return Learned(probs, labels, fixed, groups)


def divided(features: Float[np.ndarray, "M D"], parts: int, seed: int) -> Int[np.ndarray, " M"]:
    """Divide images by a clustering of their own neighbour graph; fewer parts where fewer images differ.

    Of more than `graph.landmarks(parts)` images a sample is clustered, and the others take its nearest center.
    """
    chosen = np.sort(np.random.default_rng(seed).permutation(len(features))[: graph.landmarks(parts)])
    sample = torch.from_numpy(features[chosen])
    if len(sample) <= FEW:
        labels = graph.kmeans(features[chosen], parts, seed)
    else:
        count = min(NEIGHBORS, max(2, len(sample) // (2 * parts)))
        near = without_itself(nearest(sample, count + 1).numpy().astype(np.int32))
        labels = graph.graph_clusterings(near, parts, (count,), (STEPS,), seed)[0]
    if len(chosen) == len(features):
        return labels
    centers = np.stack([features[chosen[labels == part]].mean(0) for part in np.unique(labels)])
    return (features @ centers.T).argmax(1)


def regrouped(
    probs: Float[np.ndarray, "M K"], roots: Int[np.ndarray, " K"], parts: Mapping[int, Int[np.ndarray, " M"]],
    neighbors: Int[np.ndarray, "M S"],
) -> tuple[Float[np.ndarray, "M G"], list[list[int]]]:  # fmt: skip
    """Return the posterior of merged and divided groups, and the new groups of each old one.

    Args:
        roots: of each old group the old group that it becomes one with, itself if it stays.
        parts: of each group that is divided the part of every image, UNRELIABLE for images of other groups.
    """
    columns, new = [], {}
    for root in np.unique(roots).tolist():
        column = probs[:, roots == root].sum(1, keepdims=True)
        shares = _shares(parts[root], neighbors) if root in parts else np.ones((1, 1))
        new[root] = list(range(len(columns), len(columns) + shares.shape[1]))
        columns += list((column * shares).T)
    return np.stack(columns, 1), [new[root] for root in roots.tolist()]


def _shares(parts: Int[np.ndarray, " M"], neighbors: Int[np.ndarray, "M S"]) -> Float[np.ndarray, "M P"]:
    """Return which share of a divided group's probability each part gets: all for its images, else as of neighbours."""
    members = parts != UNRELIABLE
    one_hot = np.eye(int(parts.max()) + 1)
    shares = np.zeros((len(parts), len(one_hot)))
    shares[members] = one_hot[parts[members]]
    shares = graph.spread(shares, neighbors[:, :NEIGHBORS]) + FLOOR
    shares[members] = one_hot[parts[members]]
    return shares / shares.sum(1, keepdims=True)


def joined(same: Pairs, count: int) -> Int[np.ndarray, " M"]:
    """Return the number of each image's set of images that belong together by the pairs."""
    pairs = sparse.coo_array((np.ones(len(same)), (same[:, 0], same[:, 1])), shape=(count, count))
    return csgraph.connected_components(pairs, directed=False)[1]


def conditioned(
    probs: Float[np.ndarray, "M K"], fixed: Bool[np.ndarray, " M"], same: Pairs, different: Pairs,
    learned_same: Pairs, learned_different: Pairs,
) -> tuple[Float[np.ndarray, "M K"], Bool[np.ndarray, " M"]]:  # fmt: skip
    """Condition independent posteriors on the pairs; return them and which images have evidence: fixed or in a pair.

    Images of one group have the product of their posteriors, p(c) ~ prod p_i(c). Of two images of two groups each has
    p_1(c) ~ p_1(c) (1 - p_2(c)). This is exact for a single pair of each image.

    Args:
        same, different: pairs that the posteriors have not learned.
        learned_same: pairs that they have: such images count as one, whose posterior is the geometric mean of theirs.
        learned_different: pairs that they have: of two such sets of images another one is no evidence.
    """
    count = len(probs)
    units, sets = joined(learned_same, count), joined(np.concatenate([learned_same, same]), count)
    different = _not_among(sets[different], sets[learned_different])
    of_units = np.unique(np.column_stack([sets, units]), axis=0)[:, 0]  # the set of each unit
    grown = np.bincount(of_units, minlength=count) > 1
    told = np.isin(sets, different) | np.isin(sets, sets[fixed]) | grown[sets]
    index, of_set = np.unique(sets[told], return_inverse=True)
    shares = 1 / np.bincount(units, minlength=count)[units[told], None]
    logs = np.zeros((len(index), probs.shape[1]))
    np.add.at(logs, of_set, shares * np.log(np.maximum(probs[told], FLOOR**2)))
    product = _normalised(logs)
    if len(different):
        one, other = np.searchsorted(index, different).T
        apart = np.log(np.maximum(1 - product, FLOOR))
        logs = np.log(np.maximum(product, FLOOR**2))
        np.add.at(logs, one, apart[other])
        np.add.at(logs, other, apart[one])
    result = probs.copy()
    result[told] = _normalised(logs)[of_set]
    return result, told


def _not_among(pairs: Pairs, others: Pairs) -> Pairs:
    """Return each of the pairs that is none of the others once, the smaller number first."""
    known = {tuple(pair) for pair in np.sort(others, 1).tolist()}
    new = sorted({tuple(pair) for pair in np.sort(pairs, 1).tolist()} - known)
    return np.array(new, np.int64).reshape(-1, 2)


def _normalised(logs: Float[np.ndarray, "M K"]) -> Float[np.ndarray, "M K"]:
    values = np.exp(logs - logs.max(1, keepdims=True, initial=-np.inf)) if len(logs) else logs
    return values / values.sum(1, keepdims=True)


def spread_corrections(
    probs: Float[np.ndarray, "M K"], corrected: Float[np.ndarray, "M K"], known: Bool[np.ndarray, " M"],
    neighbors: Int[np.ndarray, "M S"],
) -> Float[np.ndarray, "M K"]:  # fmt: skip
    """Return the posterior that is `corrected` where `known`, and changes with it at similar images.

    A sparse symmetric system is solved by conjugate gradients for each group whose probability was corrected: memory in
    bytes 24 M NEIGHBORS, and 8 M K for the result.
    """
    result = probs.copy()
    result[known] = corrected[known]
    residuals = np.where(known[:, None], corrected - probs, 0)
    if known.any() and not known.all():
        changes = conditional_mean(residuals, known, neighbors)[~known]
        # residuals of rows sum to zero and remain so: only clipping changes sums
        result[~known] = np.clip(probs[~known] + _moderate(probs[~known], changes), 0, None)
    return result / result.sum(1, keepdims=True)


def _moderate(probs: Float[np.ndarray, "U K"], changes: Float[np.ndarray, "U K"]) -> Float[np.ndarray, "U K"]:
    """Halve the changes in a group until half of its images stay, so that one image does not draw a whole group."""
    labels = probs.argmax(1)
    sizes = np.bincount(labels, minlength=probs.shape[1])
    scale = np.ones(probs.shape[1])
    for factor in (0.5, 0.25, 0.125, 0.0):
        stays = (probs + scale[labels, None] * changes).argmax(1) == labels
        scale[np.bincount(labels[stays], minlength=len(sizes)) < KEPT * sizes] = factor
    return scale[labels, None] * changes


def conditional_mean(
    values: Float[np.ndarray, "M K"], known: Bool[np.ndarray, " M"], neighbors: Int[np.ndarray, "M S"]
) -> Float[np.ndarray, "M K"]:
    """Return the mean of the Gaussian process on the graph, given its values at the known nodes.

    With the precision A of z = D^1/2 values it is z_U = -A_UU^-1 A_UK z_K. D are degrees: constants are smoothest.
    """
    edges = graph.neighbor_graph(neighbors, NEIGHBORS)
    root = np.sqrt(np.maximum(np.asarray(edges.sum(1)).ravel(), 1e-12))
    scale = sparse.diags_array(1 / root)
    factor = sparse.csr_array(sparse.eye_array(len(root)) * (1 + GROUNDING) - scale @ edges @ scale)

    def precision(z: Float[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
        for _ in range(SMOOTHNESS):
            z = factor @ z
        return z

    def of_unknown(z: Float[np.ndarray, " U"]) -> Float[np.ndarray, " U"]:
        whole = np.zeros(len(root))
        whole[~known] = z.ravel()
        return precision(whole)[~known]

    count = int((~known).sum())
    operator = linalg.LinearOperator((count, count), matvec=of_unknown, dtype=np.float64)  # pyright: ignore
    result = values.copy()
    for column in np.flatnonzero(np.abs(values[known]).max(0) > FLOOR):
        given = np.where(known, root * values[:, column], 0)
        solved, _ = linalg.cg(operator, -precision(given)[~known], rtol=1e-5, maxiter=1000)
        result[~known, column] = solved / root[~known]
    return result


def resolved(
    probs: Float[np.ndarray, "M K"], fixed: Int[np.ndarray, " M"], same: Pairs, different: Pairs
) -> Int[np.ndarray, " M"]:
    """Return the group of each image: the most probable that keeps all corrections.

    Fixed images come first (UNRELIABLE: not fixed), then one set of images that belong together after the other.

    Raises:
        ValueError: no group is left for an image: more are kept apart than there are groups.
    """
    labels = probs.argmax(1)
    sets = joined(same, len(probs))
    members: dict[int, list[int]] = {}
    for image in np.unique(np.concatenate([same.ravel(), different.ravel()])).tolist():
        members.setdefault(int(sets[image]), []).append(image)
    apart: dict[int, set[int]] = {}
    for one, other in sets[different].tolist():
        apart.setdefault(one, set()).add(other)
        apart.setdefault(other, set()).add(one)
    group: dict[int, int] = {}
    blocked: dict[int, set[int]] = {number: set() for number in members}

    def put(number: int, chosen: int) -> None:
        group[number] = chosen
        for other in apart.get(number, ()):
            blocked[other].add(chosen)

    for image in np.flatnonzero(fixed != UNRELIABLE).tolist():
        put(int(sets[image]), int(fixed[image]))
    means = {number: probs[images].mean(0) for number, images in members.items() if number not in group}
    while means:  # first what has the fewest groups left (Brelaz 1979), then the surest
        number = max(means, key=lambda number: (len(blocked[number]), means[number].max()))
        scores = means.pop(number)
        scores[list(blocked[number])] = -1
        if scores.max() < 0:
            image = members[number][0]
            raise ValueError(f"more images are kept apart than there are groups: none is left for image {image}")
        put(number, int(scores.argmax()))
    for number, images in members.items():
        labels[images] = group[number]
    labels[fixed != UNRELIABLE] = fixed[fixed != UNRELIABLE]
    return labels
