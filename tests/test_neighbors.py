"""Nearest neighbours against the whole similarity matrix in float64."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spice_dist import neighbors
from spice_dist.errors import UserError
from spice_dist.neighbors import label_agreement, nearest, nearest_by_index, search


def in_strips(monkeypatch, rows: int, others: int) -> None:
    """Let the search take so many rows at a time."""
    monkeypatch.setattr(neighbors, "STRIP", rows * others)


def unit_rows(n: int, dim: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def clustered_rows(n: int, dim: int, clusters: int = 10, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(clusters, dim, generator=generator)
    own = torch.randint(clusters, (n,), generator=generator)
    return F.normalize(centers[own] + spread * torch.randn(n, dim, generator=generator), dim=1)


def assert_nearest(features: Tensor, found: Tensor, count: int, rows: range | None = None) -> None:
    """The scores of `found` are the best ones, in order, and none is found twice; ties may come in any order."""
    whole = features.double() @ features.double().T
    whole = whole if rows is None else whole[rows.start : rows.stop]
    assert found.shape == (len(whole), count)
    torch.testing.assert_close(whole.gather(1, found.long()), whole.topk(count, dim=1).values, rtol=1e-6, atol=1e-6)
    assert (found.sort(dim=1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize("block", [1, 7, 16, 50, 64, 1000])
def test_any_size_of_strips_finds_what_the_whole_matrix_shows(block, monkeypatch):
    features = unit_rows(50, 6)
    in_strips(monkeypatch, block, 50)
    found = nearest(features, 9)
    assert torch.equal(found.long(), (features @ features.T).topk(9, dim=1).indices)


@pytest.mark.parametrize("order", ["shuffled", "by cluster", "from far to near"])
def test_any_order_of_the_rows_and_many_strips(order, monkeypatch):
    features = clustered_rows(3001, 32)
    if order != "shuffled":
        key = features @ features[0] if order == "from far to near" else (features @ features[:10].T).argmax(1)
        features = features[key.argsort()]
    in_strips(monkeypatch, 250, 3001)
    assert_nearest(features, nearest(features, 20), 20)


@pytest.mark.parametrize("block", [8, 11, 64])
def test_every_row_can_be_asked_for(block, monkeypatch):
    features = unit_rows(40, 5)
    in_strips(monkeypatch, block, 40)
    assert_nearest(features, nearest(features, 40), 40)


@pytest.mark.parametrize("distinct", [1, 3, 20])
def test_rows_that_are_equal_fill_their_places_in_any_order(distinct, monkeypatch):
    features = unit_rows(distinct, 8).repeat(400 // distinct, 1)
    in_strips(monkeypatch, 32, len(features))
    assert_nearest(features, nearest(features, 10), 10)


def test_features_as_they_lie_on_disk_and_in_views(monkeypatch):
    features = unit_rows(128, 24).half()
    in_strips(monkeypatch, 32, 128)
    assert_nearest(features, nearest(features, 6), 6)
    strided = unit_rows(200, 48)[::2, 1::2]
    assert_nearest(strided, nearest(strided, 6), 6)


def test_one_column_and_negative_scores(monkeypatch):
    features = torch.linspace(-1, 1, 31)[:, None]
    in_strips(monkeypatch, 8, 31)
    assert_nearest(features, nearest(features, 31), 31)
    assert_nearest(features, nearest(features, 4), 4)


def test_an_image_is_its_own_first_neighbour():
    assert torch.equal(nearest(unit_rows(20, 16), 3)[:, 0].long(), torch.arange(20))


@pytest.mark.parametrize("cut", [0, 1, 90, 200, 201])
def test_two_shares_of_the_rows_make_the_whole(cut, monkeypatch):
    features = clustered_rows(201, 16)
    shares = [range(cut), range(cut, 201)]
    in_strips(monkeypatch, 32, 201)
    found = torch.cat([nearest(features, 12, rows) for rows in shares])
    assert_nearest(features, found, 12)


@pytest.mark.parametrize("rows", [range(100), range(30, 71), range(0)])
def test_progress_rises_and_reaches_all_rows_once(rows, monkeypatch):
    calls = []
    in_strips(monkeypatch, 9, 100)
    nearest(unit_rows(100, 4), 3, rows, progress=lambda *call: calls.append(call))
    assert calls == sorted(calls)
    assert {total for _, total in calls} == {len(rows)}
    assert [done for done, _ in calls].count(len(rows)) == 1


def test_wrong_arguments_are_refused():
    features = torch.eye(4)
    for count in (0, 5):
        with pytest.raises(ValueError, match="between 1 and the 4 rows"):
            nearest(features, count)
    for rows in (range(0, 5), range(-1, 2), range(0, 4, 2)):
        with pytest.raises(ValueError, match="consecutive part of the 4 rows"):
            nearest(features, 2, rows)
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ValueError, match="finite"):
            nearest(features.index_fill(1, torch.tensor([2]), bad), 2)


@pytest.mark.parametrize("block", [4, 9, 100])
def test_search_finds_the_best_rows_of_another_set_and_leaves_out_one_of_each(block, monkeypatch):
    in_strips(monkeypatch, block, 60)
    features, queries = unit_rows(60, 7), unit_rows(25, 7, seed=1)
    whole = queries @ features.T
    scores, found = search(features, queries, 8)
    assert torch.equal(found.long(), whole.topk(8, dim=1).indices)
    torch.testing.assert_close(scores, whole.topk(8, dim=1).values)

    skip = whole.argmax(1)
    scores, found = search(features, queries, 59, skip)
    assert not (found == skip[:, None]).any()
    torch.testing.assert_close(scores, whole.topk(60, dim=1).values[:, 1:])
    with pytest.raises(ValueError, match="between 1 and the 59 rows"):
        search(features, queries, 60, skip)


def test_an_index_finds_nearly_all_of_the_true_neighbours():
    pytest.importorskip("faiss")
    features, calls = clustered_rows(8000, 32, clusters=40, spread=0.5).half(), []
    found = nearest_by_index(features, 50, progress=lambda *call: calls.append(call))
    exact = nearest(features, 50)
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]
    assert sum(hits) / exact.numel() >= 0.95
    assert calls == [(4096, 8000), (8000, 8000)]
    assert torch.equal(nearest_by_index(features, 50, range(100, 200)), found[100:200])


def test_an_index_that_visits_every_list_is_exact_and_one_that_visits_few_still_fills_every_place(monkeypatch):
    pytest.importorskip("faiss")
    features = clustered_rows(400, 8)
    monkeypatch.setattr(neighbors, "PROBES", 400)
    assert_nearest(features, nearest_by_index(features, 30), 30)
    monkeypatch.setattr(neighbors, "PROBES", 1)
    found = nearest_by_index(features, 399)
    assert found.min() >= 0
    assert found.max() < 400


def test_without_faiss_the_index_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        nearest_by_index(torch.eye(4), 2)


def test_agreement_is_the_share_of_neighbours_with_the_same_label():
    labels = torch.tensor([0, 0, 1, 1])
    found = torch.tensor([[0, 1, 2, 3], [1, 0, 0, 1], [2, 0, 1, 0], [3, 2, 2, 0]])
    assert label_agreement(labels, found).tolist() == [0.5, 1.0, 0.25, 0.75]
    assert label_agreement(labels, found[1:3].int(), range(1, 3)).tolist() == [1.0, 0.25]
