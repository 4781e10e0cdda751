"""The strong views that the heads of stage 2 learn from. A trial encodes its views anew, and nothing else.

`spice-dist tune DATA --space augmentations --out SWEEP`. Published: SPICE's strong view, which is SCAN's.
"""

from ray import tune

SPACE = {
    # published (1.0, 1.0), no crop; MoCo learns from 0.2 on, where an object may be left out
    "spice_self.strong.crop_scale": tune.choice(["(1.0, 1.0)", "(0.8, 1.0)", "(0.6, 1.0)", "(0.4, 1.0)", "(0.2, 1.0)"]),
    # published 4 of SCAN's 14 operations; each can turn a picture into another class's
    "spice_self.strong.operations": tune.randint(0, 6),
    # published 0.1, tangent of a shear and share of a translation; FixMatch takes 0.3
    "spice_self.strong.reach": tune.uniform(0.05, 0.4),
    # published 0.5 at 32 pixels, 0.33 at 96, 0.14 at 224
    "spice_self.strong.cutout": tune.uniform(0.0, 0.6),
    # published 0; probability of the changes of brightness and contrast below
    "spice_self.strong.jitter": tune.choice([0.0, 0.5, 0.8]),
    "spice_self.strong.brightness": tune.uniform(0.1, 0.6),
    "spice_self.strong.contrast": tune.uniform(0.1, 0.6),
    # published 0; MoCo blurs every second image
    "spice_self.strong.blur": tune.choice([0.0, 0.25, 0.5]),
}
METRIC = "combined"
