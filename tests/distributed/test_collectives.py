"""Tensors of all workers at once, on three real processes over gloo, against the same thing on one array."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from spice_dist.distributed import collectives

WORKERS, ROWS = 3, 4
EVERYONE = torch.arange(WORKERS * ROWS * 2.0).reshape(-1, 2)
ORDERS = {
    "random": np.random.default_rng(0).permutation(WORKERS * ROWS),
    "nothing moves": np.arange(WORKERS * ROWS),
    "everything moves": np.roll(np.arange(WORKERS * ROWS), ROWS),
    "reversed": np.arange(WORKERS * ROWS)[::-1].copy(),
}


def exchange_on_a_worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=WORKERS)
    own = EVERYONE.chunk(WORKERS)[rank]
    np.save(Path(folder, f"{rank}.npy"), [collectives.exchange(own, order).numpy() for order in ORDERS.values()])
    dist.barrier()
    os._exit(0)  # not through the teardown of gloo's threads, which now and then aborts an idle process


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory) -> dict[str, np.ndarray]:
    """For each order, what the workers got, (W * B, 2) in rank order."""
    folder = tmp_path_factory.mktemp("exchange")
    start_processes(exchange_on_a_worker, (str(folder),), WORKERS, start_method="forkserver")
    of_workers = [np.load(folder / f"{rank}.npy") for rank in range(WORKERS)]
    return dict(zip(ORDERS, np.concatenate(of_workers, axis=1), strict=True))


@pytest.mark.parametrize("name", ORDERS)
def test_exchanged_rows_are_those_of_the_gathered_array_in_that_order(exchanged, name):
    np.testing.assert_array_equal(exchanged[name], EVERYONE.numpy()[ORDERS[name]])
    np.testing.assert_array_equal(exchanged[name], collectives.exchange(EVERYONE, ORDERS[name]))  # alone
