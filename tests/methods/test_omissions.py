"""No part of a checkpoint can be forgotten unnoticed: see chaos/omissions.py."""

from pathlib import Path

import pytest

from spice_dist.distributed.worker import LocalWorker
from spice_dist.methods import spice_graph
from tests.chaos.omissions import CONSTANT, LOOPS, NOTICED, UNNOTICED, Omissions
from tests.methods.conftest import CPU, SMALL


@pytest.fixture(scope="module")
def prepared(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with all that the loops read."""
    run = tmp_path_factory.mktemp("prepared")
    for part in small_run.iterdir():
        (run / part.name).symlink_to(part)
    spice_graph.find_neighbors(SMALL, SMALL.graph, LocalWorker(run, "graph", CPU))
    return run


@pytest.mark.parametrize("loop", LOOPS)
def test_a_resume_that_forgets_a_file_of_its_checkpoint_is_refused_or_ends_otherwise(prepared, tmp_path, loop):
    omissions = Omissions(LOOPS[loop], prepared, tmp_path)
    assert omissions.freeze() == CONSTANT, "nothing is changed"
    frozen = []
    for file, tensors in omissions.at_cut.items():
        keys = [(file, key) for key in tensors]
        assert omissions.lose(*keys) == NOTICED, file
        frozen.append(omissions.freeze(*keys))
    assert {NOTICED} <= {*frozen} <= {NOTICED, CONSTANT}, "a head that learns in the last step alone is constant before"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_resume_that_forgets_a_tensor_is_refused_or_ends_otherwise(prepared, tmp_path, loop):
    omissions = Omissions(LOOPS[loop], prepared, tmp_path)
    tried = [(key, omissions.lose(key), omissions.freeze(key)) for key in omissions.tensors()]
    assert [each for each in tried if UNNOTICED in each] == []
