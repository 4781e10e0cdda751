"""Tensors of all workers at once, on three real processes over gloo, against the same thing on one array."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

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
    found = {name: collectives.exchange(own, order).numpy() for name, order in ORDERS.items()}
    np.savez(Path(folder, f"{rank}.npz"), **found)
    dist.barrier()
    os._exit(0)  # not through the teardown of gloo's threads, which now and then aborts an idle process


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory) -> list[dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("exchange")
    spawn(exchange_on_a_worker, (str(folder),), nprocs=WORKERS)
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(WORKERS)]


@pytest.mark.parametrize("name", ORDERS)
def test_exchanged_rows_are_those_of_the_gathered_array_in_that_order(exchanged, name):
    found = np.concatenate([of_worker[name] for of_worker in exchanged])
    np.testing.assert_array_equal(found, EVERYONE.numpy()[ORDERS[name]])
    np.testing.assert_array_equal(found, collectives.exchange(EVERYONE, ORDERS[name]))  # alone
