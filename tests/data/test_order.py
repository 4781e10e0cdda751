import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spice_dist.data.order import check_order, epoch_order, global_batches


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
