"""Search spaces that cannot be used are told in one line; sweeps themselves are in tests/test_tune.py."""

import re

import pytest

from spice_dist.distributed import ray_tune
from spice_dist.errors import UserError


@pytest.mark.parametrize(
    ("value", "told"), [("0.004", "0.004"), ("[1, 2]", "[1, 2]"), ("tune.grid_search([1])", "{'grid_search': [1]}")]
)
def test_a_value_that_is_no_domain_is_told_by_its_name(tmp_path, value, told):
    path = tmp_path / "own.py"
    path.write_text(f"from ray import tune\nSPACE = {{'moco.lr': tune.uniform(1, 2), 'spice_self.lr': {value}}}\n")
    with pytest.raises(UserError, match=re.escape(f"{path}: spice_self.lr is {told}, which is no domain")):
        ray_tune.read_space(path)
    path.write_text("from ray import tune\nSPACE = {'moco.lr': tune.uniform(1, 2)}\n")
    assert 1 <= ray_tune.values_of(ray_tune.read_space(path)[0], seed=0)["moco.lr"] <= 2
