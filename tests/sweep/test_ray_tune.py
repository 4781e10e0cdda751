"""How much of a cluster a sweep takes, and spaces that cannot be used; sweeps themselves are in test_tune.py."""

import re
from pathlib import Path

import pytest
import torch

from spice_dist.config import Config
from spice_dist.distributed import ray_train
from spice_dist.errors import UserError
from spice_dist.sweep.ray_tune import Search, require_room, trials_at_once
from spice_dist.sweep.records import Plan
from spice_dist.sweep.spaces import Start, read_space, sample


def plan_of(threads: int, workers: int) -> Plan:
    return Plan(Path(), Config(), Start.PRETRAIN, False, threads, workers)


@pytest.mark.timeout(180)
@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the seats of a machine without GPUs")
def test_trials_and_all_their_workers_have_room_at_once():
    eight, five = Search(8), Search(8, max_concurrent=5)
    with ray_train.session(None, num_cpus=7):
        assert trials_at_once(plan_of(1, 0), eight) is None
        assert trials_at_once(plan_of(1, 0), five) == 5
        for threads, workers, most in ((1, 1, 3), (1, 2, 2), (2, 2, 1), (1, 6, 1)):
            plan = plan_of(threads, workers)
            require_room(plan, eight)
            assert trials_at_once(plan, eight) == trials_at_once(plan, five) == most
        assert trials_at_once(plan_of(1, 1), Search(8, max_concurrent=2)) == 2
        with pytest.raises(UserError, match="a trial takes 8 CPUs, and the largest node of Ray has 7 CPUs"):
            require_room(plan_of(8, 0), eight)
        with pytest.raises(UserError, match="of its 6 workers, but Ray has 7 CPUs"):
            require_room(plan_of(2, 6), eight)


@pytest.mark.parametrize(
    ("value", "shown"), [("0.004", "0.004"), ("[1, 2]", "[1, 2]"), ("tune.grid_search([1])", "{'grid_search': [1]}")]
)
def test_a_value_that_is_no_domain_is_named_by_its_value(tmp_path, value, shown):
    path = tmp_path / "own.py"
    path.write_text(f"from ray import tune\nSPACE = {{'moco.lr': tune.uniform(1, 2), 'spice_self.lr': {value}}}\n")
    with pytest.raises(UserError, match=re.escape(f"{path}: spice_self.lr is {shown}, which is no domain")):
        read_space(path)
    path.write_text("from ray import tune\nSPACE = {'moco.lr': tune.uniform(1, 2)}\n")
    assert 1 <= sample(read_space(path).ranges, seed=0)["moco.lr"] <= 2
