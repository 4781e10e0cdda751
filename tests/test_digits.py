"""The main job in full, as the README shows it: minutes, so only on request (-m slow)."""

import json

import pytest

from spice_dist import cli

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_the_main_job_reaches_its_scores_within_its_time(tmp_path):
    assert cli.main(["fit", "digits", "--out", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    spice_self = json.loads((tmp_path / "run/spice_self/eval.json").read_text())
    assert metrics["eval"]["acc"] >= 0.96
    assert metrics["eval"]["acc"] > metrics["baselines"]["kmeans_features"]["acc"]
    assert metrics["eval"]["acc"] >= spice_self["acc"]
    assert sum(metrics["seconds"].values()) < 360
