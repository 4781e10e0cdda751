"""The losses of the papers: tensors in, a scalar out. They know no configuration and no process group."""

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


def double_softmax_cross_entropy(
    logits: Float[Tensor, "*batch B K"], labels: Int[Tensor, "*batch B"]
) -> Float[Tensor, "*batch"]:
    """SPICE eq. (5): -log softmax(softmax(logits))[label], the mean over B, one value per leading index (head).

    The second softmax bounds the loss to [ln(e + K - 1) - 1, ln(e + K - 1)], so that a confidently wrong pseudo-label
    hardly pulls: it is robust to label noise. Compute it in float32; at K clusters its gradient starts K times smaller.
    """
    log_probs = F.log_softmax(F.softmax(logits.float(), dim=-1), dim=-1)
    return -log_probs.gather(-1, labels[..., None])[..., 0].mean(-1)


def consistency(
    weak_logits: Float[Tensor, "U K"], strong_logits: Float[Tensor, "U K"], threshold: float
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """FixMatch's unlabelled term, SPICE eqs. (8) and (9): (loss, share of images above the threshold).

    An image whose weak view is predicted with probability >= threshold passes that class on to its strong view; the
    sum of the cross-entropies is divided by U, not by the number that passed.
    """
    confidence, target = F.softmax(weak_logits.detach().float(), dim=1).max(1)
    passed = (confidence >= threshold).float()
    loss = (F.cross_entropy(strong_logits.float(), target, reduction="none") * passed).mean()
    return loss, passed.mean()
