import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spice_dist.data.order import check_order, epoch_order, global_batches, worker_batches


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 99), st.integers(0, 99))
def test_an_epoch_holds_every_image_exactly_once(n: int, batch_size: int, seed: int, epoch: int):
    order = epoch_order(seed, epoch, n)
    assert np.array_equal(np.concatenate(global_batches(order, batch_size, drop_last=False)), order)
    assert sorted(order) == list(range(n))


@given(st.integers(1, 300), st.integers(1, 64))
def test_drop_last_leaves_out_only_the_partial_batch(n: int, batch_size: int):
    batches = global_batches(np.arange(n), batch_size, drop_last=True)
    assert [len(b) for b in batches] == [batch_size] * (n // batch_size)


def test_orders_are_functions_of_seed_and_epoch_and_do_not_repeat_across_seeds():
    orders = {(s, e): tuple(epoch_order(s, e, 50)) for s in range(5) for e in range(5)}
    assert orders[1, 2] == tuple(epoch_order(1, 2, 50))
    assert len(set(orders.values())) == 25  # in FFCV (0, 1) equals (1, 0)
    assert epoch_order(0, 0, 3).dtype == np.int64


@pytest.mark.parametrize(
    ("order", "batch_size", "error"),
    [
        ([], 4, ValueError),
        ([[0, 1]], 4, ValueError),
        ([0.0, 1.0], 4, ValueError),
        ([True, False], 4, ValueError),
        ([0, 1], 0, ValueError),
        ([0, 10], 4, IndexError),
        ([-1, 0], 4, IndexError),
        (np.array([2**63], np.uint64), 4, IndexError),
    ],
)
def test_a_wrong_order_is_refused_before_anything_is_read(order: list[int], batch_size: int, error: type[Exception]):
    with pytest.raises(error):
        check_order(np.asarray(order), batch_size, 10)


SIZES = st.integers(1, 200)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(n=SIZES, batch=st.integers(1, 64), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_every_image_is_in_exactly_one_batch_of_an_epoch_and_a_resumed_epoch_is_its_rest(n, batch, seed, epoch):
    batches = global_batches(epoch_order(seed, epoch, n), batch, drop_last=False)
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))
    for done in range(len(batches)):
        rest = np.concatenate(batches[done:])
        again = global_batches(epoch_order(seed, epoch, n)[done * batch :], batch, drop_last=False)
        assert np.array_equal(np.concatenate(again), rest)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(n=SIZES, own=st.integers(1, 16), world=st.integers(1, 8), seed=st.integers(0, 9))
def test_the_workers_share_every_global_batch_whatever_their_number(n, own, world, seed):
    order, batch = epoch_order(seed, 0, n), own * world
    if batch > n:
        with pytest.raises(ValueError, match=f"{n} images do not fill a batch of {batch}"):
            worker_batches(order, batch, world, 0)
        return
    parts = [worker_batches(order, batch, world, rank) for rank in range(world)]
    joined = np.concatenate(parts, axis=1)
    assert np.array_equal(joined, worker_batches(order, batch, 1, 0))
    assert np.array_equal(joined.ravel(), order[: n - n % batch])


def test_a_batch_that_the_workers_cannot_share_is_refused():
    with pytest.raises(ValueError, match="shared by 3"):
        worker_batches(epoch_order(0, 0, 10), 4, 3, 0)
