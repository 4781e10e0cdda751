"""The losses of the papers, and measures of features that need no labels: tensors in, a scalar out.

They know no configuration and no process group.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def info_nce(
    query: Float[Tensor, "B D"], key: Float[Tensor, "B D"], queue: Float[Tensor, "Q D"], temperature: float
) -> Float[Tensor, ""]:
    """MoCo's contrastive loss, SPICE eq. (1), all rows of unit norm.

    For each b: -log softmax([query[b].key[b], query[b].queue[0], ..., query[b].queue[Q-1]] / temperature)[0].
    At chance it is ln(1 + Q).
    """
    positive = (query * key).sum(1, keepdim=True)
    logits = torch.cat([positive, query @ queue.T], dim=1).float() / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def byol(prediction: Float[Tensor, "B D"], target: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """Grill et al. 2020, eq. (2), all rows of unit norm: the mean of |prediction - target|^2 = 2 - 2 cos, in [0, 4]."""
    return 2 - 2 * (prediction * target).sum(1).float().mean()


def alignment(one: Float[Tensor, "B D"], other: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """Wang and Isola 2020: mean squared distance of two views' unit vectors, in [0, 4]; 0: views make no difference."""
    return (one - other).float().square().sum(1).mean()


def uniformity(x: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """Wang and Isola 2020: ln of the mean over pairs of exp(-2 |a - b|^2) of unit vectors, in [-8, 0].

    About -4 where they are spread over a sphere of many dimensions, 0 where they are all the same: collapse.
    """
    squared = (2 - 2 * x.float() @ x.float().T).clamp(min=0)
    pairs = len(x) * (len(x) - 1)
    return ((torch.exp(-2 * squared).sum() - torch.exp(-2 * squared.diagonal()).sum()) / pairs).log()


def effective_rank(x: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """RankMe (Garrido et al. 2023): exp of the entropy of the normalised singular values, in [1, min(B, D)]."""
    share = torch.linalg.svdvals(x.float().nan_to_num())  # it raises at what is not finite
    share = share / share.sum() + 1e-7
    return (-(share * share.log()).sum()).exp()


def double_softmax_cross_entropy(
    logits: Float[Tensor, "*batch B K"], labels: Int[Tensor, "*batch B"]
) -> Float[Tensor, "*batch"]:
    """SPICE eq. (5): -log softmax(softmax(logits))[label], the mean over B, one value per leading index (head).

    The second softmax bounds the loss to [ln(e + K - 1) - 1, ln(e + K - 1)], so that a confidently wrong pseudo-label
    hardly pulls: it is robust to label noise. Compute it in float32; at K clusters its gradient starts K times smaller.
    """
    return cross_entropy(F.softmax(logits.float(), dim=-1), labels)


def cross_entropy(
    logits: Float[Tensor, "*batch B K"], labels: Int[Tensor, "*batch B"], temperature: float = 1.0
) -> Float[Tensor, "*batch"]:
    """-log softmax(logits / temperature)[label], the mean over B, one value per leading index (head).

    SPICE's ablation has it as CE, and with a temperature below 1, which sharpens predictions, as TCE.
    """
    log_probs = F.log_softmax(logits.float() / temperature, dim=-1)
    return -log_probs.gather(-1, labels[..., None])[..., 0].mean(-1)


def entropy_of_mean(logits: Float[Tensor, "*batch B K"]) -> Float[Tensor, "*batch"]:
    """H(mean over B of softmax(logits)), in [0, ln K]: high when the batch is spread over all clusters.

    Probabilities are clamped at 1e-5, so that an empty cluster's gradient stays finite.
    """
    mean = F.softmax(logits.float(), dim=-1).mean(-2).clamp(min=1e-5)
    return -(mean * mean.log()).sum(-1)


def neighbor_consistency(
    anchor_logits: Float[Tensor, "*heads B K"], neighbor_logits: Float[Tensor, "*heads B K"]
) -> Float[Tensor, "*heads"]:
    """SCAN eq. (2), first term: -log <softmax(anchor), softmax(neighbor)>, the mean over B, one value per head.

    The product of two distributions is 1 only where both give everything to the same cluster; at chance this is ln K.
    """
    log_products = F.log_softmax(_precise(anchor_logits), -1) + F.log_softmax(_precise(neighbor_logits), -1)
    return -log_products.logsumexp(-1).mean(-1)


def entropy(share: Float[Tensor, "*heads K"]) -> Float[Tensor, "*heads"]:
    """-sum_k share_k ln share_k of distributions, in [0, ln K]: SCAN eq. (2), second term, of the mean prediction."""
    return _entropy(share, 1)


def class_balanced_cross_entropy(
    logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"], counts: Int[Tensor, " K"]
) -> Float[Tensor, ""]:
    """SCAN's self-labelling: cross-entropy, each image weighted by 1 / frequency of its label; label -100: left out.

    Of a whole batch it is the mean, over the labels that occur, of their images' mean cross-entropy. `counts` are the
    images of every label in the whole batch, of which these rows may be a part: the losses of parts add up.
    """
    weight = 1 / (counts.clamp(min=1) * (counts > 0).sum().clamp(min=1))
    precise = _precise(logits)
    return F.cross_entropy(precise, labels, weight.to(precise.dtype), reduction="sum")


def consistency(
    weak_logits: Float[Tensor, "U K"], strong_logits: Float[Tensor, "U K"], threshold: float | Float[Tensor, " K"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """FixMatch's unlabelled term, SPICE eqs. (8) and (9): (loss, share of images above the threshold).

    An image whose weak view is predicted with probability >= threshold, which may be one for each class, passes that
    class on to its strong view; the sum of the cross-entropies is divided by U, not by the number that passed. Of no
    images at all both are 0.
    """
    images = max(1, len(weak_logits))
    confidence, target = F.softmax(weak_logits.detach().float(), dim=1).max(1)
    passed = (confidence >= (threshold[target] if isinstance(threshold, Tensor) else threshold)).float()
    loss = (F.cross_entropy(strong_logits.float(), target, reduction="none") * passed).sum() / images
    return loss, passed.sum() / images


@torch.no_grad()
def sinkhorn(
    scores: Float[Tensor, "*parts B J"],
    epsilon: float,
    iterations: int,
    gather: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Float[Tensor, "*parts B J"]:
    """SwAV's soft assignment of every row to J prototypes that all get the same share; IMC-SwAV eqs. (3) and (4).

    Alternately scales the columns of exp(scores / epsilon) to equal sums over all rows, and the rows to equal sums, in
    the log domain: finite at any epsilon. Every row of the result sums to one; no gradient. At least float32.

    Args:
        scores: in [-1, 1]; leading axes are parts of one batch, whose sums are added up in their order.
        gather: where workers hold a part each, concatenates their column sums (parts, J) along the first axis.
    """
    log_kernel = _precise(scores) / epsilon
    pairs = log_kernel.flatten(0, -3) if log_kernel.ndim > 2 else log_kernel[None]
    row = pairs.new_zeros(pairs.shape[:2])  # log of each row's factor; those of the columns follow from it
    column = pairs.new_zeros(pairs.shape[2])
    for _ in range(iterations):
        sums = torch.stack([(part + factor[:, None]).logsumexp(0) for part, factor in zip(pairs, row, strict=True)])
        column = -gather(sums).logsumexp(0)
        row = -(pairs + column).logsumexp(2)
    return (log_kernel + column).softmax(-1)


def swapped_prediction(
    targets: Float[Tensor, "T B J"], scores: Float[Tensor, "V B J"], temperature: float
) -> Float[Tensor, ""]:
    """SwAV's loss, IMC-SwAV eq. (1): each view predicts the assignments of the others.

    The mean over t < T, over the views s other than t and over B of
    -sum_j targets[t, b, j] log softmax(scores[s, b] / temperature)[j]. The first T views are those of the targets; at
    chance it is ln J. At least float32, also under autocast.
    """
    log_probs = F.log_softmax(_precise(scores) / temperature, dim=-1)
    every = (targets.sum(0) * log_probs.sum(0)).sum()
    itself = (targets * log_probs[: len(targets)]).sum()
    return (itself - every) / (len(targets) * (len(scores) - 1) * scores.shape[1])


def joint_counts(
    clusters: Float[Tensor, "*heads V B K"], prototypes: Float[Tensor, "W B J"]
) -> Float[Tensor, "*heads V W K J"]:
    """sum over b of clusters[v, b, k] prototypes[w, b, j], for every pair of views: divided by B it is their joint.

    Counts of parts of a batch add up, so workers sum theirs. At least float32, also under autocast.
    """
    with torch.autocast(clusters.device.type, enabled=False):
        left = _precise(clusters).transpose(-1, -2)  # *heads V K B
        right = _precise(prototypes).transpose(0, 1).flatten(1)  # B (W J)
        counts = (left.flatten(0, -2) @ right).unflatten(1, (len(prototypes), -1))
        return counts.unflatten(0, left.shape[:-1]).transpose(-3, -2)


def entropies(joint: Float[Tensor, "*pairs K J"]) -> tuple[Float[Tensor, "*pairs"], Float[Tensor, "*pairs"]]:
    """(H(Y), H(Y|U)) in nats of each joint distribution of clusters Y and prototypes U, which sums to one.

    H(Y|U) = H(Y,U) - H(U). H(Y) is ln K where all clusters are used alike, H(Y|U) is 0 where the prototype tells the
    cluster. IMC-SwAV's eq. (6) is H(Y|U) - b H(Y), which for b = 1 is minus the mutual information.
    """
    of_cluster = _entropy(joint.sum(-1), 1)
    return of_cluster, _entropy(joint, 2) - _entropy(joint.sum(-2), 1)


def logit_hinge(logits: Float[Tensor, "*batch B K"], bound: float) -> Float[Tensor, "*batch"]:
    """IMC-SwAV's regulariser: the mean over B of sum_k max(|logits[b, k]| - bound, 0)."""
    return (logits.abs() - bound).clamp(min=0).sum(-1).mean(-1)


def perplexity(share: Float[Tensor, " J"]) -> Float[Tensor, ""]:
    """exp of the entropy of a distribution, in [1, J]: how many of J prototypes are in use."""
    return _entropy(share, 1).exp()


def _entropy(p: Tensor, axes: int) -> Tensor:
    """-sum p ln p over the last axes; entries too small for their logarithm count as the smallest."""
    log = p.clamp(min=torch.finfo(p.dtype).tiny).log()
    return -(p * log).flatten(-axes).sum(-1)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
