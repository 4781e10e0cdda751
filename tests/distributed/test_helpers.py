"""What the first worker shares out, on three real processes over gloo."""

import json
import os
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from spice_dist.distributed import helpers
from spice_dist.errors import UserError
from tests.methods.conftest import CPU

WORKERS, PARTS = 3, 7


def squares(parts, device, progress, broken: int) -> tuple[np.ndarray, np.ndarray]:
    """Two rows of two numbers for each part; a part may be broken."""
    if broken in parts:
        raise UserError(f"part {broken} is broken")
    rows = np.repeat(np.array(parts), 2)
    return rows, rows**2


def lead_on_a_worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=WORKERS)

    def first() -> None:
        rows, squared = helpers.shared(squares, PARTS, CPU, lambda done, total: None, -1)
        errors = []
        for broken in (0, 6):  # in the share of the first worker, and of the last
            try:
                helpers.shared(squares, PARTS, CPU, lambda done, total: None, broken)
            except UserError as error:
                errors.append(str(error))
        few, _ = helpers.shared(squares, 1, CPU, lambda done, total: None, -1)  # goes on, and two have nothing to do
        Path(folder, "seen").write_text(json.dumps([rows.tolist(), squared.tolist(), errors, few.tolist()]))

    helpers.lead(first, CPU)
    dist.barrier()
    os._exit(0)  # not through the teardown of gloo's threads, which now and then aborts an idle process


def test_shares_come_back_in_order_and_an_error_of_any_worker_is_the_first_ones(tmp_path):
    start_processes(lead_on_a_worker, (str(tmp_path),), WORKERS, start_method="forkserver")
    rows, squared, errors, few = json.loads((tmp_path / "seen").read_text())
    assert rows == np.repeat(range(PARTS), 2).tolist()
    assert squared == np.square(rows).tolist()
    assert errors == ["part 0 is broken", "part 6 is broken"]
    assert few == [0, 0]
