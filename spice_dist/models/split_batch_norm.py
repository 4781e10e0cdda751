"""BatchNorm over fixed groups of the global batch, whatever the number of workers.

MoCo normalises in several groups, so that batch statistics do not link a query to its key ("shuffle-BN" across GPUs,
"split-BN" inside one). Here the number of groups of the global batch is a setting: a worker with several groups
normalises each by itself, and the running statistics follow the mean over all groups of all workers. One worker with
four groups computes what four workers with one group each compute.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spice_dist.distributed import collectives


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Normalises each of `groups` equal consecutive parts of a training batch by itself; else nn.BatchNorm2d.

    In training, only `update_statistics` moves the running statistics. Call it once per optimizer step.
    """

    groups = 1

    def __init__(self, num_features: int, **kwargs):
        super().__init__(num_features, **kwargs)
        self.pending: list[Tensor] = []  # (2, C): mean and variance of every group since the last update

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        if len(input) % self.groups:
            raise ValueError(f"a batch of {len(input)} images cannot be split into {self.groups} BatchNorm groups")
        if self.groups == 1:
            return self._normalize(input, self.weight, self.bias)
        # views of weight and bias: their gradients are summed over a pass's groups before they reach the parameters,
        # so that passes add up in the same order with any number of workers
        weight, bias = (value if value is None else value.view_as(value) for value in (self.weight, self.bias))
        return torch.cat([self._normalize(group, weight, bias) for group in input.chunk(self.groups)])

    def _normalize(self, part: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        kind = torch.promote_types(part.dtype, torch.float32)
        statistics = part.new_zeros(2, self.num_features, dtype=kind)
        self.pending.append(statistics)
        # with momentum 1 the native kernel writes this batch's statistics into the two vectors
        return F.batch_norm(part, statistics[0], statistics[1], weight, bias, True, 1.0, self.eps)


def split_batch_norm(module: nn.Module) -> None:
    """Replace every 2-D BatchNorm inside `module`, keeping weights, statistics and timm's fused activation."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and not isinstance(child, SplitBatchNorm2d):
            norm = SplitBatchNorm2d(
                child.num_features,
                eps=child.eps,
                momentum=child.momentum,
                affine=child.affine,
                track_running_stats=child.track_running_stats,
            )
            norm.load_state_dict(child.state_dict())
            norm.train(child.training)
            activation = [getattr(child, layer) for layer in ("drop", "act") if hasattr(child, layer)]
            setattr(module, name, nn.Sequential(norm, *activation) if activation else norm)
        else:
            split_batch_norm(child)


def set_groups(module: nn.Module, groups: int) -> None:
    """Set how many groups the next training batches have on this worker."""
    for norm in _norms(module):
        norm.groups = groups


def set_momentum(module: nn.Module, momentum: float) -> None:
    """Set the share of the new statistics in each update of the running ones."""
    for norm in _norms(module):
        norm.momentum = momentum


def forget_statistics(module: nn.Module) -> None:
    """Drop the statistics of all forward passes since the last update."""
    for norm in _norms(module):
        norm.pending.clear()


@torch.no_grad()
def update_statistics(module: nn.Module, times: int = 1) -> None:
    """Move the running statistics towards the mean over the groups of all workers since the last update.

    Args:
        times: as many equal updates at once; momentum m then counts as 1 - (1 - m)^times.
    """
    norms = [norm for norm in _norms(module) if norm.pending]
    if not norms:
        return
    # gathered, not reduced: the mean adds the groups up in the same order with any number of workers
    here = torch.stack([torch.cat(of_group, 1) for of_group in zip(*(norm.pending for norm in norms), strict=True)])
    everywhere = collectives.all_gather(here).mean(0).split([norm.num_features for norm in norms], dim=1)
    for momentum in {norm.momentum for norm in norms}:
        of_momentum = [(norm, new) for norm, new in zip(norms, everywhere, strict=True) if norm.momentum == momentum]
        known = 0.1 if momentum is None else momentum
        share = known if times == 1 else 1 - (1 - known) ** times
        running: Any = [tensor for norm, _ in of_momentum for tensor in (norm.running_mean, norm.running_var)]
        new = [tensor for _, mean_and_var in of_momentum for tensor in mean_and_var]
        torch._foreach_lerp_(running, new, share)  # pyright: ignore[reportPrivateImportUsage]
    for norm in norms:
        norm.pending.clear()


def _norms(module: nn.Module) -> list[SplitBatchNorm2d]:
    return [child for child in module.modules() if isinstance(child, SplitBatchNorm2d)]
