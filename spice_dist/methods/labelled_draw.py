"""Which images a step of stage 3 has: labelled ones, alike from every cluster, and any others."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from spice_dist.data.images import Images
from spice_dist.distributed.worker import Worker
from spice_dist.pseudo_labels import UNRELIABLE

DRAW = 20  # stream of random numbers


def groups_of_teachers(labels: np.ndarray, balanced: bool) -> list[np.ndarray]:
    """The images with a reliable label, by label or all in one: every group is drawn from as often.

    A labelled image of a cluster of n_c among N then counts as if its loss had the weight N / (K n_c), of mean 1 over
    these images, but no single step sees such a weight: a cluster of one image in 5,000, K = 10, would have 500.
    """
    clusters = np.unique(labels[labels != UNRELIABLE])
    if not balanced and len(clusters):
        return [np.flatnonzero(labels != UNRELIABLE)]
    return [np.flatnonzero(labels == cluster) for cluster in clusters]


def images_of_steps(
    images: Images,
    teachers: list[np.ndarray],
    num_images: int,
    labelled: int,
    others: int,
    seed: int,
    steps: range,
    worker: Worker,
    span: int = 256,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This worker's images of each of `steps`: labelled ones first, then the others, with replacement.

    All workers together have `labelled` and `others` images in a step. A labelled one comes from any group of
    `teachers` with the same probability, then from any image of it alike. All draws are functions of (seed, step); the
    loader is asked for `span` steps at a time.
    """
    reliable = np.concatenate(teachers)
    sizes = np.array([len(group) for group in teachers])
    starts = sizes.cumsum() - sizes
    for first in range(steps.start, steps.stop, span):
        order = []
        for step in range(first, min(first + span, steps.stop)):
            generator = np.random.default_rng([seed, step, DRAW])
            group = generator.integers(len(sizes), size=labelled)
            of_group = reliable[starts[group] + generator.integers(sizes[group])]
            unlabelled = generator.integers(num_images, size=others)
            order += [part.reshape(worker.world, -1)[worker.rank] for part in (of_group, unlabelled)]
        yield from images.batches(np.concatenate(order), (labelled + others) // worker.world)
