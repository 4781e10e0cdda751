"""The evaluation of every kind of result on several workers: the bytes of one."""

import shutil
from pathlib import Path

import pytest

from spice_dist.config import override
from spice_dist.distributed.worker import LocalWorker
from spice_dist.methods import given_labels
from tests.methods.conftest import CPU, SMALL
from tests.methods.workers import on_workers

CHANGES = {
    "spice": {},
    "pretext": {"pretext": "imc_swav"},
    "imc_swav": {"method": "imc_swav", "pretext": "imc_swav"},
    "scan": {"method": "scan"},
    "fixmatch": {"method": "fixmatch", "pretext": "none", "spice_semi.init": "scratch"},
}


def evaluated(run: Path, out: Path, changes: dict[str, object], world: int) -> dict[str, bytes]:
    """The files of the results, without the packed images and the stages."""
    shutil.copytree(run, out)
    config = override(SMALL, changes)
    if config.method == "fixmatch":
        given_labels.give(config, config.given_labels, LocalWorker(out, "given_labels", CPU))
        shutil.rmtree(out / "features")
    on_workers(world, config, out, "evaluate")
    results = [*out.glob("*.*"), *out.glob("model/*"), *out.glob("features/*.npy"), *out.glob("*/eval.json")]
    return {str(path.relative_to(out)): path.read_bytes() for path in results}


@pytest.mark.parametrize("method", CHANGES)
def test_any_number_of_workers_leaves_the_bytes_of_one(small_run, tmp_path, method):
    one = evaluated(small_run, tmp_path / "one", CHANGES[method], 1)
    assert {"metrics.json", "assignments.csv", "model/model.safetensors", "duplicates.csv"} <= one.keys()
    assert evaluated(small_run, tmp_path / "two", CHANGES[method], 2) == one
    if method == "spice":
        assert evaluated(small_run, tmp_path / "four", {}, 4) == one, "with more workers than parts"
