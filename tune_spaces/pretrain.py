"""Stage 1, MoCo. A trial trains the network, so give it few epochs: --set moco.epochs=50 --scheduler asha.

`spice-dist tune DATA --space pretrain --out SWEEP`. Published: the value of SPICE's paper, or of its code. All trials
are judged in the feature space of the base run, which is trained first with the settings as they are.
"""

from ray import tune

SPACE = {
    # published 0.2; lower ones look at near images only, which pay where classes are fine
    "moco.temperature": tune.loguniform(0.05, 0.5),
    # published 0.999, for 12,800 keys and a thousand epochs; a short run cannot wait for so slow a network
    "moco.momentum": tune.choice([0.9, 0.97, 0.99, 0.996, 0.999]),
    # published 12,800; from a batch to the number of images: a trial outside fails at once, and is a row
    "moco.queue": tune.choice([512, 1024, 1536, 4096, 12800]),
    # published 0.015 for batches of 128
    "moco.lr": tune.loguniform(0.005, 0.3),
}
METRIC = "combined"
