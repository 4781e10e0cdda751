"""The table of stages: which a method takes, what their records hold, and that names and rows agree."""

import itertools

import numpy as np
import pytest

from spice_dist import catalog, stages
from spice_dist.config import Config, flatten, override
from spice_dist.data.sources import from_array

SOURCE = from_array(np.zeros((20, 8, 8), np.uint8))
PUBLISHED = {
    "spice": "data moco features spice_self reliable spice_semi",
    "imc_swav": "data imc_swav features",
    "scan": "data moco features scan self_label",
    "fixmatch": "data given_labels spice_semi",
    "supervised": "data given_labels spice_semi",
}


@pytest.mark.parametrize("method", catalog.METHODS)
def test_every_method_has_its_stages_and_one_of_them_says_its_result(method):
    pretext = {"imc_swav": "imc_swav", "fixmatch": "none", "supervised": "none"}.get(method, "moco")
    config = override(Config(), {"method": method, "pretext": pretext})
    assert " ".join(stages.stage_settings(config, SOURCE)) == PUBLISHED[method]
    assert callable(stages.result_of(config))


def test_every_name_of_a_stage_in_the_catalog_has_a_row():
    rows = [stage.name for stage in stages.TABLE]
    assert len(rows) == len(set(rows))
    chosen = {*catalog.PRETEXTS, *catalog.STAGES2, *catalog.STAGES3, *catalog.TITLES} - {"none"}
    assert chosen <= set(rows)
    for pretext, stage2, stage3 in itertools.product(catalog.PRETEXTS, catalog.STAGES2, catalog.STAGES3):
        config = override(Config(), {"pretext": pretext, "stage2": stage2, "stage3": stage3})
        names = [stage.name for stage in stages.stages_of(config)]
        assert names[-1] == ("reliable" if stage3 == "none" else stage3)
        assert (pretext in names, stage2 in names) == (pretext != "none", True)


def test_rows_name_settings_that_exist():
    leaves = flatten(Config())
    fields = {name.split(".")[0] for name in leaves}
    for stage in stages.TABLE:
        assert {*stage.depends, stage.settings} - {""} <= fields
        assert set(stage.evaluation) <= set(leaves)


def test_a_record_holds_the_settings_of_the_stages_before_and_no_others():
    settings = stages.stage_settings(Config(), SOURCE)
    assert "moco.lr" in settings["features"]
    assert "spice_self.lr" not in settings["features"]
    assert list(settings["spice_semi"])[: len(settings["data"])] == list(settings["data"])
    assert "weights" in settings["moco"]
    assert "weights" not in settings["data"]
    of_imc_swav = stages.stage_settings(override(Config(), {"method": "imc_swav", "pretext": "imc_swav"}), SOURCE)
    assert "imc_swav.lr" in of_imc_swav["imc_swav"]
    everywhere = {name for record in (*settings.values(), *of_imc_swav.values()) for name in record}
    assert everywhere & {"data.loader", "data.max_bad", "backbone.weights", "imc_swav.eval_bn", "method"} == set()
    changed = stages.stage_settings(override(Config(), {"spice_semi.lr": 0.5}), SOURCE)
    assert [name for name in settings if settings[name] != changed[name]] == ["spice_semi"]
