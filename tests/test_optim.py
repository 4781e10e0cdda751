"""Schedules at the points whose value is known; optimizer state through named tensors."""

import math

import pytest
import torch
from torch import nn

from spice_dist import optim
from spice_dist.models.heads import ClusterHeads


def test_cosine_falls_from_one_through_a_half_to_zero():
    assert [optim.cosine(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])


def test_fixmatch_cosine_ends_at_seven_sixteenths_of_pi():
    assert optim.fixmatch_cosine(0.0) == 1.0
    assert optim.fixmatch_cosine(1.0) == pytest.approx(math.sin(math.pi / 16))


def test_only_kernels_decay():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), ClusterHeads(1, 2, 2))
    decayed, rest = optim.decay_kernels_only(net, 0.1)
    assert [p.shape for p in decayed["params"]] == [(2, 1, 3, 3), (1, 2, 2), (1, 2, 2)]
    assert decayed["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(rest["params"]) == len(list(net.parameters()))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_restored_optimizer_goes_on_bit_for_bit(kind):
    def build() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
        if kind == "adam":
            return net, torch.optim.Adam(net.parameters(), lr=0.1)
        return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    def step(net: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        net(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()

    straight, straight_optimizer = build()
    for _ in range(3):
        step(straight, straight_optimizer)
    first, first_optimizer = build()
    for _ in range(2):
        step(first, first_optimizer)
    second, second_optimizer = build()
    second.load_state_dict(first.state_dict())
    optim.load_optimizer_tensors(second_optimizer, optim.optimizer_tensors(first_optimizer))
    step(second, second_optimizer)
    assert torch.equal(second.weight, straight.weight)
