"""The losses against float64 loops and the closed forms of the papers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spice_dist import losses

E = math.e


def random_unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_info_nce_is_the_loop_of_its_docstring():
    query, key, queue = random_unit(5, 8), random_unit(5, 8, seed=1), random_unit(12, 8, seed=2)
    total = 0.0
    for b in range(5):
        logits = [float(query[b].double() @ other.double()) / 0.2 for other in [key[b], *queue]]
        total += math.log(sum(math.exp(z) for z in logits)) - logits[0]
    assert losses.info_nce(query, key, queue, 0.2).item() == pytest.approx(total / 5, rel=1e-5)


def test_info_nce_at_chance_is_the_log_of_the_number_of_keys():
    same = random_unit(1, 8).expand(4, 8)
    assert losses.info_nce(same, same, same[:1].expand(63, 8), 0.2).item() == pytest.approx(math.log(64), rel=1e-6)


def test_byol_is_the_squared_distance_of_unit_vectors():
    one, other = random_unit(6, 8), random_unit(6, 8, seed=1)
    expected = (one.double() - other.double()).square().sum(1).mean().item()
    assert losses.byol(one, other).item() == pytest.approx(expected, rel=1e-5)
    assert losses.byol(one, one).item() == pytest.approx(0, abs=1e-6)
    assert losses.byol(one, -one).item() == pytest.approx(4, rel=1e-6)
    assert losses.alignment(one, other).item() == pytest.approx(expected, rel=1e-5)


def test_uniformity_is_the_loop_over_pairs_and_knows_its_ends():
    x = random_unit(7, 5)
    pairs = [
        math.exp(-2 * float((x[a].double() - x[b].double()).square().sum()))
        for a in range(7)
        for b in range(7)
        if a != b
    ]
    assert losses.uniformity(x).item() == pytest.approx(math.log(sum(pairs) / 42), rel=1e-5)
    assert losses.uniformity(x[:1].expand(7, 5)).item() == pytest.approx(0, abs=1e-5)  # collapsed
    assert losses.uniformity(torch.eye(64)).item() == pytest.approx(-4, rel=1e-5)  # all at right angles
    assert losses.uniformity(torch.tensor([[1.0, 0], [-1, 0]])).item() == pytest.approx(-8, rel=1e-5)


def test_the_effective_rank_is_that_of_equal_singular_values_and_counts_no_others():
    basis = torch.linalg.qr(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)))[0]
    assert losses.effective_rank(basis).item() == pytest.approx(6, rel=1e-4)
    assert losses.effective_rank(basis[:, :1].expand(40, 6)).item() == pytest.approx(1, rel=1e-3)
    x = random_unit(30, 4)
    p = np.linalg.svd(x.double().numpy(), compute_uv=False)
    p = p / p.sum()
    assert losses.effective_rank(x).item() == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-4)


@pytest.mark.parametrize("clusters", [2, 10, 200])
def test_double_softmax_lies_in_its_band_and_reaches_both_ends(clusters):
    low, high = math.log(E + clusters - 1) - 1, math.log(E + clusters - 1)
    certain = torch.full((1, 2, clusters), -100.0)
    certain[0, :, 0] = 100.0
    right = losses.double_softmax_cross_entropy(certain, torch.tensor([[0, 0]]))
    wrong = losses.double_softmax_cross_entropy(certain, torch.tensor([[1, 1]]))
    assert right.item() == pytest.approx(low, rel=1e-5)
    assert wrong.item() == pytest.approx(high, rel=1e-5)
    uniform = losses.double_softmax_cross_entropy(torch.zeros(1, 2, clusters), torch.tensor([[0, 1]]))
    assert uniform.item() == pytest.approx(math.log(clusters), rel=1e-5)


def test_double_softmax_gradient_is_the_papers_equation_a5():
    logits = torch.randn(1, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).float()
    logits.requires_grad_()
    losses.double_softmax_cross_entropy(logits, torch.tensor([[2]])).sum().backward()
    p = logits.detach().double()[0, 0].softmax(0)
    q = p.softmax(0)
    error = q - F.one_hot(torch.tensor(2), 6)
    expected = p * (error - (error * p).sum())
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0, 0].double(), expected, atol=1e-7, rtol=1e-4)


def test_double_softmax_starts_with_a_gradient_k_times_smaller_than_one_softmax():
    clusters = 10
    twice = torch.zeros(1, 1, clusters, requires_grad=True)
    once = torch.zeros(1, clusters, requires_grad=True)
    losses.double_softmax_cross_entropy(twice, torch.tensor([[4]])).sum().backward()
    F.cross_entropy(once, torch.tensor([4])).backward()
    assert twice.grad is not None
    assert once.grad is not None
    torch.testing.assert_close(twice.grad[0] * clusters, once.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("clusters", [2, 10, 1000])
def test_double_softmax_takes_the_papers_share_of_one_softmax_gradient(clusters):
    """Equation (A-11): r_i = (dL2/dz_i) / (dL1/dz_i); r_c in (0, 1), r_i <= 1, 1/K at the uniform prediction."""
    z = torch.randn(1, 1, clusters, dtype=torch.float64, generator=torch.Generator().manual_seed(clusters)).float()
    p = z.double()[0, 0].softmax(0)
    q, c = p.softmax(0), 1
    expected = q + p[c] - (p * q).sum()
    expected[c] = p[c] * (1 - q[c] - p[c] + (p * q).sum()) / (1 - p[c])
    grads = []
    for loss in (losses.double_softmax_cross_entropy, losses.cross_entropy):
        logits = z.clone().requires_grad_()
        loss(logits, torch.tensor([[c]])).sum().backward()
        assert logits.grad is not None
        grads.append(logits.grad[0, 0].double())
    ratio = grads[0] / grads[1]
    torch.testing.assert_close(ratio, expected, rtol=2e-2 if clusters == 1000 else 1e-3, atol=1e-5)
    assert 0 < ratio[c] < 1
    assert (ratio <= 1).all()


def test_double_softmax_lifts_what_is_nearly_impossible():
    """K = 10, a wrong class at .98: the gradient of a third class changes its sign, r = -0.14."""
    p = torch.full((10,), 0.02 / 9)
    p[3] = 0.98
    q = p.double().softmax(0)
    ratio = q[5] + p[0].double() - (p * q).sum()
    assert ratio.item() == pytest.approx(-0.14, abs=0.01)
    logits = p.log()[None, None].requires_grad_()
    losses.double_softmax_cross_entropy(logits, torch.tensor([[0]])).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0, 5] < 0
    assert logits.grad[0, 0, 0].item() == pytest.approx(-0.0025, abs=2e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.2, 5.0])
def test_cross_entropy_is_torchs_of_every_head(temperature):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 7, 4, generator=generator), torch.randint(0, 4, (3, 7), generator=generator)
    expected = torch.stack([F.cross_entropy(logits[h].double() / temperature, labels[h]) for h in range(3)])
    found = losses.cross_entropy(logits, labels, temperature).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # float32 against float64


def test_entropy_of_the_mean_is_highest_for_even_batches_and_finite_for_empty_clusters():
    even = 100 * torch.eye(4)[None]
    assert losses.entropy_of_mean(even).item() == pytest.approx(math.log(4), rel=1e-5)
    one = (100 * torch.eye(4))[:1].repeat(2, 5, 1).requires_grad_()
    found = losses.entropy_of_mean(one)
    assert found.shape == (2,)
    assert found[0].item() == pytest.approx(-3e-5 * math.log(1e-5), rel=1e-3)
    found.sum().backward()
    assert one.grad is not None
    assert one.grad.isfinite().all()
    logits = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(0))
    mean = logits.double().softmax(2).mean(1)[0]
    assert losses.entropy_of_mean(logits).item() == pytest.approx(-float((mean * mean.log()).sum()), rel=1e-5)


def test_double_softmax_keeps_heads_apart():
    logits, labels = torch.randn(3, 7, 4), torch.randint(0, 4, (3, 7))
    together = losses.double_softmax_cross_entropy(logits, labels)
    alone = torch.cat([losses.double_softmax_cross_entropy(logits[h : h + 1], labels[h : h + 1]) for h in range(3)])
    torch.testing.assert_close(together, alone)


def test_consistency_counts_confident_images_and_divides_by_all():
    weak = torch.tensor([[9.0, 0.0], [0.2, 0.0], [0.0, 9.0], [0.0, 0.1]])
    strong = torch.tensor([[0.3, -0.2], [5.0, -5.0], [1.0, 2.0], [0.0, 0.0]])
    expected = sum(-math.log(float(strong[i].double().softmax(0)[y])) for i, y in [(0, 0), (2, 1)]) / 4
    loss, passed = losses.consistency(weak, strong, 0.95)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert passed.item() == 0.5


def test_consistency_teaches_the_strong_view_only():
    weak, strong = torch.tensor([[9.0, 0.0]], requires_grad=True), torch.zeros(1, 2, requires_grad=True)
    losses.consistency(weak, strong, 0.5)[0].backward()
    assert weak.grad is None
    assert strong.grad is not None
    assert strong.grad.abs().sum() > 0


# ---------------------------------------------------------------- IMC-SwAV


def test_sinkhorn_is_the_loop_over_rows_and_columns():
    scores = random_unit(12, 4) @ random_unit(5, 4, seed=1).T
    q = torch.exp(scores.double() / 0.05)
    q /= q.sum()
    for _ in range(3):
        for j in range(5):
            q[:, j] *= (1 / 5) / q[:, j].sum()
        for i in range(12):
            q[i] *= (1 / 12) / q[i].sum()
    torch.testing.assert_close(losses.sinkhorn(scores.double(), 0.05, 3), q * 12)
    torch.testing.assert_close(losses.sinkhorn(scores, 0.05, 3).double(), q * 12, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("epsilon", [0.01, 0.05, 1.0])
def test_sinkhorn_gives_every_row_one_and_every_prototype_its_share(epsilon, kind):
    scores = (random_unit(64, 8) @ random_unit(16, 8, seed=1).T).to(kind)
    with torch.autocast("cpu", torch.bfloat16):
        q = losses.sinkhorn(scores, epsilon, 1000)
    assert q.dtype == torch.float32
    torch.testing.assert_close(q.sum(1), torch.ones(64))
    torch.testing.assert_close(q.sum(0), torch.full((16,), 4.0), atol=0.05, rtol=0)


def test_sinkhorn_stays_finite_where_exponentials_would_not():
    scores = torch.tensor([[1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
    q = losses.sinkhorn(scores, 1e-3, 3)
    assert q.isfinite().all()
    torch.testing.assert_close(q.sum(1), torch.ones(3))


def test_sinkhorn_is_that_of_a_transport_solver():
    """Run to its end, with the marginals 1/J for prototypes and 1/B for rows, it is entropic optimal transport."""
    ot = pytest.importorskip("ot")
    scores = (random_unit(40, 8) @ random_unit(12, 8, seed=1).T).double()
    plan = ot.sinkhorn(
        np.full(40, 1 / 40), np.full(12, 1 / 12), -scores.numpy(), 0.05, method="sinkhorn_log", stopThr=1e-14
    )
    np.testing.assert_allclose(losses.sinkhorn(scores, 0.05, 2000).numpy() / 40, plan, atol=1e-6, rtol=0)


def test_sinkhorn_of_parts_is_that_of_the_whole_and_workers_need_only_each_others_sums():
    scores = random_unit(24, 4) @ random_unit(6, 4, seed=1).T
    whole = losses.sinkhorn(scores, 0.05, 3)
    parts = scores.unflatten(0, (4, 6))
    torch.testing.assert_close(losses.sinkhorn(parts, 0.05, 3).flatten(0, 1), whole)
    asked: list[torch.Tensor] = []

    def among_workers(sums: torch.Tensor) -> torch.Tensor:
        asked.append(sums)
        return torch.cat([sums, sums])

    torch.testing.assert_close(losses.sinkhorn(scores[:12], 0.05, 3, among_workers), twice(scores[:12]))
    assert [tuple(sums.shape) for sums in asked] == [(1, 6)] * 3


def twice(scores: torch.Tensor) -> torch.Tensor:
    """Sinkhorn of these rows where another worker has the same."""
    return losses.sinkhorn(torch.cat([scores, scores]), 0.05, 3)[: len(scores)]


def test_swapped_prediction_is_the_loop_of_equation_1():
    targets = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).softmax(2)
    scores = random_unit(6, 5, 7, seed=1)
    total = 0.0
    for t in range(2):
        for s in range(6):
            if s != t:
                u = (scores[s].double() / 0.1).softmax(1)
                total += -float((targets[t].double() * u.log()).sum(1).mean()) / 10
    assert losses.swapped_prediction(targets, scores, 0.1).item() == pytest.approx(total, rel=1e-5)
    even = torch.zeros(6, 5, 7)
    assert losses.swapped_prediction(targets, even, 0.1).item() == pytest.approx(math.log(7), rel=1e-5)


def probs(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_the_joint_of_every_pair_of_views_is_the_loop_over_images():
    y, u = probs(3, 2, 9, 4), probs(5, 9, 6, seed=1)
    counts = losses.joint_counts(y, u)
    assert counts.shape == (3, 2, 5, 4, 6)
    for h, v, w in ((0, 0, 0), (2, 1, 4), (1, 0, 3)):
        expected = sum(torch.outer(y[h, v, b], u[w, b]) for b in range(9))
        torch.testing.assert_close(counts[h, v, w], expected)
    torch.testing.assert_close(counts.sum((-1, -2)), torch.full((3, 2, 5), 9.0, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(losses.joint_counts(y.bfloat16(), u.bfloat16()).double(), counts, atol=0.05, rtol=0)


def test_entropies_are_those_of_the_definitions_and_know_their_ends():
    p = probs(3, 20).unflatten(1, (4, 5))
    of_cluster, conditional = losses.entropies(p)
    for one, h, c in zip(p.numpy(), of_cluster, conditional, strict=True):
        y, u = one.sum(1), one.sum(0)
        assert h.item() == pytest.approx(-(y * np.log(y)).sum())
        given = [-(one[:, j] * np.log(one[:, j] / u[j])).sum() for j in range(5)]  # H(Y|U) itself
        assert c.item() == pytest.approx(sum(given))
    told = torch.eye(4)[None] / 4  # the prototype tells the cluster
    assert losses.entropies(told)[0].item() == pytest.approx(math.log(4), rel=1e-5)
    assert losses.entropies(told)[1].item() == pytest.approx(0, abs=1e-6)
    unrelated = torch.full((1, 4, 5), 1 / 20)
    assert losses.entropies(unrelated)[1].item() == pytest.approx(math.log(4), rel=1e-5)


def test_gradients_of_equation_6_are_finite_differences_and_finite_for_empty_clusters():
    u = probs(2, 7, 5, seed=1)

    def equation_6(logits: torch.Tensor) -> torch.Tensor:
        of_cluster, conditional = losses.entropies(losses.joint_counts(logits.softmax(-1), u) / 7)
        return (conditional - 4 * of_cluster).mean((-1, -2))

    logits = torch.randn(1, 2, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(equation_6, logits.requires_grad_())
    certain = torch.tensor([200.0, 0, 0]).expand(1, 2, 7, 3).clone().requires_grad_()
    of_cluster, conditional = losses.entropies(losses.joint_counts(certain.softmax(-1), u.float()) / 7)
    (conditional - 4 * of_cluster).sum().backward()
    assert certain.grad is not None
    assert certain.grad.isfinite().all()


def test_the_hinge_costs_what_logits_exceed_their_bound_by():
    logits = torch.tensor([[[6.0, -7.0, 5.0], [0.0, 1.0, -4.9]]])
    assert losses.logit_hinge(logits, 5.0).tolist() == [1.5]


def test_perplexity_counts_the_prototypes_in_use():
    assert losses.perplexity(torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0])).item() == pytest.approx(4, rel=1e-5)


# ---------------------------------------------------------------- SCAN


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_neighbor_consistency_is_the_loop_over_pairs_and_knows_its_ends():
    anchor, neighbor = normal(3, 6, 4, seed=0), normal(3, 6, 4, seed=1)
    found = losses.neighbor_consistency(anchor, neighbor)
    for head in range(3):
        p, q = anchor[head].softmax(1).numpy(), neighbor[head].softmax(1).numpy()
        expected = -np.mean([math.log(sum(p[b, k] * q[b, k] for k in range(4))) for b in range(6)])
        assert found[head].item() == pytest.approx(expected)
    single = losses.neighbor_consistency(anchor.float(), neighbor.float())
    torch.testing.assert_close(single.double(), found, atol=1e-6, rtol=1e-6)
    assert losses.neighbor_consistency(torch.zeros(5, 4), torch.zeros(5, 4)).item() == pytest.approx(math.log(4))
    certain = 50 * F.one_hot(torch.tensor([0, 1, 2]), 4).float()
    assert losses.neighbor_consistency(certain, certain).item() == pytest.approx(0, abs=1e-6)
    apart = losses.neighbor_consistency(certain, certain.roll(1, 0)).item()
    assert apart == pytest.approx(50 - math.log(2), rel=1e-6), "two products of e^-50, which no clamp hides"


def test_the_entropy_of_a_distribution_has_its_closed_forms():
    assert losses.entropy(torch.full((2, 8), 1 / 8)).tolist() == pytest.approx([math.log(8)] * 2)
    assert losses.entropy(torch.tensor([1.0, 0, 0])).item() == pytest.approx(0, abs=1e-6)
    assert losses.entropy(torch.tensor([0.5, 0, 0.5, 0])).item() == pytest.approx(math.log(2))
    share = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64, requires_grad=True)
    losses.entropy(share).backward()
    torch.testing.assert_close(share.grad, -share.detach().log() - 1)


def test_the_gradient_of_scans_loss_is_the_finite_difference_and_finite_for_certain_predictions():
    def loss(anchor: torch.Tensor, neighbor: torch.Tensor) -> torch.Tensor:
        entropy = losses.entropy(anchor.softmax(-1).mean(1))
        return (losses.neighbor_consistency(anchor, neighbor) - 5 * entropy).sum()

    pair = normal(2, 5, 3, seed=0).requires_grad_(), normal(2, 5, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(loss, pair)
    certain = (200 * F.one_hot(torch.zeros(1, 5, dtype=torch.long), 3).float()).requires_grad_()
    loss(certain, certain.detach().roll(1, 2)).backward()
    assert certain.grad is not None
    assert certain.grad.isfinite().all()


def test_self_labelling_is_the_mean_over_classes_of_each_ones_mean():
    logits, labels = normal(9, 4, seed=2), torch.tensor([0, 0, 0, 0, 2, 2, 3, -100, -100])
    counts = torch.tensor([4, 0, 2, 1])
    nll = -logits.log_softmax(1).numpy()
    expected = np.mean([np.mean([nll[b, k] for b in range(9) if labels[b] == k]) for k in (0, 2, 3)])
    assert losses.class_balanced_cross_entropy(logits, labels, counts).item() == pytest.approx(expected)
    weight = (1 / counts.clamp(min=1)).double()  # torch's weighted mean divides by the weights
    assert F.cross_entropy(logits, labels, weight).item() == pytest.approx(expected)
    parts = [slice(0, 5), slice(5, 8), slice(8, 9)]  # the last one has nothing to learn
    sums = [losses.class_balanced_cross_entropy(logits[part], labels[part], counts) for part in parts]
    assert sum(part.item() for part in sums) == pytest.approx(expected)
    assert sums[2].item() == 0

    def loss(x: torch.Tensor) -> torch.Tensor:
        return losses.class_balanced_cross_entropy(x, labels, counts)

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


def test_nothing_to_label_costs_nothing_and_moves_nothing():
    logits = torch.randn(3, 4, requires_grad=True)
    loss = losses.class_balanced_cross_entropy(logits, torch.full((3,), -100), torch.zeros(4, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()
