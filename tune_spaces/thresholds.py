"""Which labels of stage 2 may teach stage 3. A trial starts from stored heads: it selects, and students learn.

`spice-dist tune DATA --space thresholds --out SWEEP`. Published: the value of SPICE's paper, or of its code. Settings
of the rule that a trial did not draw have no effect on it.
"""

from ray import tune

SPACE = {
    # published: official, which leaves nothing if one cluster has nothing
    "reliable.rule": tune.choice(["adaptive", "official"]),
    # adaptive rule, DCBoost searches up to 50 in steps; the largest k that is tried
    "reliable.max_neighbors": tune.lograndint(5, 101),
    # adaptive rule: share of a cluster that it keeps whatever its neighbours say; 0 is one image
    "reliable.floor_fraction": tune.uniform(0.0, 0.3),
    # official rule, published 100; N / K at most
    "reliable.neighbors": tune.lograndint(10, 201),
    # official rule, published 0.95 in the code and 0.99 for CIFAR-10
    "reliable.ratio": tune.uniform(0.5, 1.0),
    # official rule, published 0.99 in the code, 0 in the paper
    "reliable.min_confidence": tune.choice([0.0, 0.5, 0.9, 0.99]),
    # official rule, published True in the code, False in the paper
    "reliable.balance": tune.choice([True, False]),
}
METRIC = "agreement"
