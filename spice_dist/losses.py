"""The losses of the papers, and measures of features that need no labels: tensors in, a scalar out.

They know no configuration and no process group.
"""

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


def consistency(
    weak_logits: Float[Tensor, "U K"], strong_logits: Float[Tensor, "U K"], threshold: float | Float[Tensor, " K"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """FixMatch's unlabelled term, SPICE eqs. (8) and (9): (loss, share of images above the threshold).

    An image whose weak view is predicted with probability >= threshold, which may be one for each class, passes that
    class on to its strong view; the sum of the cross-entropies is divided by U, not by the number that passed.
    """
    confidence, target = F.softmax(weak_logits.detach().float(), dim=1).max(1)
    passed = (confidence >= (threshold[target] if isinstance(threshold, Tensor) else threshold)).float()
    loss = (F.cross_entropy(strong_logits.float(), target, reduction="none") * passed).mean()
    return loss, passed.mean()
