"""Compute the losses of the papers, and measures of features that need no labels: tensors in, a scalar out.

No function here reads a configuration or uses a process group.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def info_nce(
    query: Float[Tensor, "B D"], key: Float[Tensor, "B D"], queue: Float[Tensor, "Q D"], temperature: float
) -> Float[Tensor, ""]:
    """Compute MoCo's contrastive loss, SPICE eq. (1), of rows of unit norm.

    For each b: -log softmax([query[b].key[b], query[b].queue[0], ..., query[b].queue[Q-1]] / temperature)[0].
    At chance it is ln(1 + Q).
    """
    positive = (query * key).sum(1, keepdim=True)
    logits = torch.cat([positive, query @ queue.T], dim=1).float() / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def byol(prediction: Float[Tensor, "B D"], target: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """Average |prediction - target|^2 = 2 - 2 cos of unit rows, in [0, 4]: Grill et al. 2020, eq. (2)."""
    return 2 - 2 * (prediction * target).sum(1).float().mean()


def alignment(one: Float[Tensor, "B D"], other: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """Average the squared distance of two views' unit vectors, in [0, 4] (Wang and Isola 2020); 0: views are equal."""
    return (one - other).float().square().sum(1).mean()


def uniformity(x: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """Compute ln of the mean over pairs of exp(-2 |a - b|^2) of unit vectors, in [-8, 0] (Wang and Isola 2020).

    It is about -4 for vectors spread over a sphere of many dimensions, and 0 for equal vectors: collapse.
    """
    squared = (2 - 2 * x.float() @ x.float().T).clamp(min=0)
    pairs = len(x) * (len(x) - 1)
    return ((torch.exp(-2 * squared).sum() - torch.exp(-2 * squared.diagonal()).sum()) / pairs).log()


def effective_rank(x: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """Compute RankMe (Garrido et al. 2023): exp of the normalised singular values' entropy, in [1, min(B, D)]."""
    share = torch.linalg.svdvals(x.float().nan_to_num())  # svdvals raises on values that are not finite
    share = share / share.sum() + 1e-7
    return (-(share * share.log()).sum()).exp()


def double_softmax_cross_entropy(
    logits: Float[Tensor, "*batch B K"], labels: Int[Tensor, "*batch B"]
) -> Float[Tensor, "*batch"]:
    """Average SPICE's eq. (5), -log softmax(softmax(logits))[label], over B: one value per leading index (head).

    The second softmax bounds the loss to [ln(e + K - 1) - 1, ln(e + K - 1)], so a confident prediction of another
    label has a small gradient: the loss is robust to label noise. It is computed in float32. At K clusters its
    gradient starts K times smaller than cross-entropy's.
    """
    return cross_entropy(F.softmax(logits.float(), dim=-1), labels)


def cross_entropy(
    logits: Float[Tensor, "*batch B K"], labels: Int[Tensor, "*batch B"], temperature: float = 1.0
) -> Float[Tensor, "*batch"]:
    """Average -log softmax(logits / temperature)[label] over B: one value per leading index (head).

    SPICE's ablation calls it CE, or TCE with a temperature below 1, which sharpens predictions.
    """
    log_probs = F.log_softmax(logits.float() / temperature, dim=-1)
    return -log_probs.gather(-1, labels[..., None])[..., 0].mean(-1)


def entropy_of_mean(logits: Float[Tensor, "*batch B K"]) -> Float[Tensor, "*batch"]:
    """Compute H(mean over B of softmax(logits)), in [0, ln K]: high when the batch is spread over all clusters.

    Probabilities are clamped at 1e-5, so that an empty cluster's gradient stays finite.
    """
    mean = F.softmax(logits.float(), dim=-1).mean(-2).clamp(min=1e-5)
    return -(mean * mean.log()).sum(-1)


def neighbor_consistency(
    anchor_logits: Float[Tensor, "*heads B K"], neighbor_logits: Float[Tensor, "*heads B K"]
) -> Float[Tensor, "*heads"]:
    """Average -log <softmax(anchor), softmax(neighbor)> over B, one value per head: SCAN eq. (2), first term.

    The product is 1 only where both distributions are one-hot on the same cluster. At chance the loss is ln K.
    """
    log_products = F.log_softmax(_precise(anchor_logits), -1) + F.log_softmax(_precise(neighbor_logits), -1)
    return -log_products.logsumexp(-1).mean(-1)


def entropy(share: Float[Tensor, "*heads K"]) -> Float[Tensor, "*heads"]:
    """Compute -sum_k share_k ln share_k, in [0, ln K]; of the mean prediction it is the second term of SCAN eq. (2)."""
    return _entropy(share, 1)


def class_balanced_cross_entropy(
    logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"], counts: Int[Tensor, " K"]
) -> Float[Tensor, ""]:
    """Compute SCAN's self-labelling loss: cross-entropy weighted by 1 / frequency of the label, without label -100.

    For a whole batch it is the mean, over the labels that occur, of their images' mean cross-entropy. `counts` holds
    the images of every label in the whole batch. The rows may be a part of it: the losses of the parts add up.
    """
    weight = 1 / (counts.clamp(min=1) * (counts > 0).sum().clamp(min=1))
    precise = _precise(logits)
    return F.cross_entropy(precise, labels, weight.to(precise.dtype), reduction="sum")


def consistency(
    weak_logits: Float[Tensor, "U K"], strong_logits: Float[Tensor, "U K"], threshold: float | Float[Tensor, " K"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Compute FixMatch's unlabelled term, SPICE eqs. (8) and (9): (loss, share of images above the threshold).

    The class of a weak view is the target of the strong view if its probability is >= threshold. There may be one
    threshold for each class. The sum of the cross-entropies is divided by U, not by the number of targets. Both
    results are 0 if U is 0.
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
    """Assign rows softly to J prototypes of equal total share, as SwAV does: IMC-SwAV eqs. (3) and (4).

    The columns of exp(scores / epsilon) are scaled to equal sums over all rows, then the rows to equal sums, in turn.
    The log domain keeps this finite at any epsilon. Every row of the result sums to one and has no gradient. The
    precision is at least float32.

    Args:
        scores: in [-1, 1]; leading axes are parts of one batch, whose sums are added up in their order.
        gather: concatenates the column sums (parts, J) of all workers along the first axis, if each holds a part.
    """
    log_kernel = _precise(scores) / epsilon
    pairs = log_kernel.flatten(0, -3) if log_kernel.ndim > 2 else log_kernel[None]
    row = pairs.new_zeros(pairs.shape[:2])  # log of each row's factor; the columns' factors follow from it
    column = pairs.new_zeros(pairs.shape[2])
    for _ in range(iterations):
        sums = torch.stack([(scaled + factor[:, None]).logsumexp(0) for scaled, factor in zip(pairs, row, strict=True)])
        column = -gather(sums).logsumexp(0)
        row = -(pairs + column).logsumexp(2)
    return (log_kernel + column).softmax(-1)


def swapped_prediction(
    targets: Float[Tensor, "T B J"], scores: Float[Tensor, "V B J"], temperature: float
) -> Float[Tensor, ""]:
    """Compute SwAV's loss, IMC-SwAV eq. (1): each view predicts the assignments of the others.

    It is the mean over t < T, over the views s other than t and over B of
    -sum_j targets[t, b, j] log softmax(scores[s, b] / temperature)[j]. The targets belong to the first T views. At
    chance it is ln J. The precision is at least float32, also under autocast.
    """
    log_probs = F.log_softmax(_precise(scores) / temperature, dim=-1)
    every = (targets.sum(0) * log_probs.sum(0)).sum()
    itself = (targets * log_probs[: len(targets)]).sum()
    return (itself - every) / (len(targets) * (len(scores) - 1) * scores.shape[1])


def joint_counts(
    clusters: Float[Tensor, "*heads V B K"], prototypes: Float[Tensor, "W B J"]
) -> Float[Tensor, "*heads V W K J"]:
    """Sum clusters[v, b, k] prototypes[w, b, j] over b for every pair of views; over B it is their joint distribution.

    Counts of parts of a batch add up, so workers sum theirs. The precision is at least float32, also under autocast.
    """
    with torch.autocast(clusters.device.type, enabled=False):
        left = _precise(clusters).transpose(-1, -2)  # *heads V K B
        right = _precise(prototypes).transpose(0, 1).flatten(1)  # B (W J)
        counts = (left.flatten(0, -2) @ right).unflatten(1, (len(prototypes), -1))
        return counts.unflatten(0, left.shape[:-1]).transpose(-3, -2)


def entropies(joint: Float[Tensor, "*pairs K J"]) -> tuple[Float[Tensor, "*pairs"], Float[Tensor, "*pairs"]]:
    """Compute (H(Y), H(Y|U)) in nats of joint distributions of clusters Y and prototypes U, each of sum one.

    H(Y|U) = H(Y,U) - H(U). H(Y) is ln K if all clusters are equally frequent, H(Y|U) is 0 if the prototype determines
    the cluster. IMC-SwAV's eq. (6) is H(Y|U) - b H(Y); for b = 1 it is minus the mutual information.
    """
    of_cluster = _entropy(joint.sum(-1), 1)
    return of_cluster, _entropy(joint, 2) - _entropy(joint.sum(-2), 1)


def logit_hinge(logits: Float[Tensor, "*batch B K"], bound: float) -> Float[Tensor, "*batch"]:
    """Average sum_k max(|logits[b, k]| - bound, 0) over B: IMC-SwAV's regulariser."""
    return (logits.abs() - bound).clamp(min=0).sum(-1).mean(-1)


def perplexity(share: Float[Tensor, " J"]) -> Float[Tensor, ""]:
    """Compute exp of the entropy of a distribution, in [1, J]: how many of J prototypes are in use."""
    return _entropy(share, 1).exp()


def _entropy(p: Tensor, axes: int) -> Tensor:
    """Compute -sum p ln p over the last axes; p is clamped at the smallest normal number."""
    log = p.clamp(min=torch.finfo(p.dtype).tiny).log()
    return -(p * log).flatten(-axes).sum(-1)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
