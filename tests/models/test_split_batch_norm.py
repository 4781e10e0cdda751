"""Split BatchNorm against torch's own, group by group."""

import pytest
import torch
from torch import nn

from spice_dist.models.split_batch_norm import SplitBatchNorm2d, set_groups, split_batch_norm, update_statistics


def pair(channels: int = 3) -> tuple[SplitBatchNorm2d, nn.BatchNorm2d]:
    torch.manual_seed(0)
    ours, torchs = SplitBatchNorm2d(channels), nn.BatchNorm2d(channels)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    torchs.load_state_dict(ours.state_dict())
    return ours, torchs


def images(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, 4, 5, generator=torch.Generator().manual_seed(1)) * 2 + 1


def test_one_group_is_torchs_batch_norm_in_training_and_after():
    ours, torchs = pair()
    for _ in range(3):
        torch.testing.assert_close(ours(images()), torchs(images()))
        update_statistics(ours)
    torch.testing.assert_close(ours.eval()(images()), torchs.eval()(images()))


def test_each_group_is_normalised_by_itself():
    ours, torchs = pair()
    ours.groups = 4
    expected = torch.cat([torchs(part) for part in images().chunk(4)])
    torch.testing.assert_close(ours(images()), expected)
    whole = nn.BatchNorm2d(3)
    whole.load_state_dict(ours.state_dict())
    assert not torch.allclose(ours(images()), whole(images()))


def test_groups_in_one_pass_or_one_pass_per_group_agree_bit_for_bit():
    together, apart = pair()[0], pair()[0]
    together.groups = 4
    out = together(images())
    parts = [apart(part) for part in images().chunk(4)]
    update_statistics(together)
    update_statistics(apart)
    assert torch.equal(out, torch.cat(parts))
    assert together.running_var is not None
    assert apart.running_var is not None
    assert torch.equal(together.running_var, apart.running_var)


def test_running_statistics_follow_the_mean_over_groups():
    ours, _ = pair()
    ours.groups = 2
    ours(images())
    assert ours.running_mean is not None
    assert torch.equal(ours.running_mean, torch.zeros(3)), "they must not move before the update"
    update_statistics(ours)
    means = torch.stack([part.mean((0, 2, 3)) for part in images().chunk(2)])
    variances = torch.stack([part.var((0, 2, 3)) for part in images().chunk(2)])
    torch.testing.assert_close(ours.running_mean, 0.1 * means.mean(0))
    assert ours.running_var is not None
    torch.testing.assert_close(ours.running_var, 0.9 + 0.1 * variances.mean(0))


def test_several_updates_at_once_are_torchs_one_after_another():
    ours, torchs = pair()
    ours(images())
    update_statistics(ours, times=3)
    for _ in range(3):
        torchs(images())
    torch.testing.assert_close(ours.running_mean, torchs.running_mean)
    torch.testing.assert_close(ours.running_var, torchs.running_var)


def test_a_batch_that_does_not_divide_is_refused():
    ours, _ = pair()
    ours.groups = 3
    with pytest.raises(ValueError, match="8 images cannot be split into 3"):
        ours(images())


@pytest.mark.parametrize("name", ["resnet10t", "efficientnet_lite0"])
def test_conversion_changes_no_output_of_a_timm_model(name):
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    x = torch.randn(2, 3, 64, 64)
    before = model(x)
    split_batch_norm(model)
    assert not [m for m in model.modules() if type(m) is nn.BatchNorm2d]
    torch.testing.assert_close(model(x), before)
    set_groups(model, 2)
    assert {m.groups for m in model.modules() if isinstance(m, SplitBatchNorm2d)} == {2}
