"""Stage 2 on stored features: what the clustering heads are, and how they learn. Seconds a trial.

`spice-dist tune DATA --space heads --out SWEEP`. Published: the value of SPICE's paper, or of its code.
"""

from ray import tune

SPACE = {
    # published 0.005; Adam's steps do not shrink, so ten times more no longer settles and ten times less is not done
    "spice_self.lr": tune.loguniform(5e-4, 2e-2),
    # published 0.5; a center of few images is of pure ones, and moves with every E-step
    "spice_self.center_fraction": tune.uniform(0.1, 0.9),
    # published 500; more than N / K of them is the same as N / K
    "spice_self.samples_per_cluster": tune.lograndint(50, 1001),
    # published 8; more repeats learn the labels of an E-step by heart
    "spice_self.repeats": tune.randint(1, 13),
    # published 2; one layer is a linear map, which the paper's ablation did not try
    "spice_self.layers": tune.randint(1, 4),
    # published 10; the best of more heads has a lower loss, at the same cost for each
    "spice_self.heads": tune.choice([5, 10, 20]),
    # published 0 up to 15 clusters, about 1 / K for 200; it spreads images over clusters that are of unlike sizes too
    "spice_self.entropy_weight": tune.choice([0.0, 0.03, 0.1, 0.3]),
    # published double_softmax; the other two are those of the paper's ablation
    "spice_self.loss": tune.choice(["double_softmax", "cross_entropy", "tempered"]),
}
METRIC = "combined"
