"""Cluster images without labels: SPICE on Ray Train, FFCV and timm. Names are imported when they are first used."""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spice_dist.config import Config, override
    from spice_dist.errors import Interrupted, UserError
    from spice_dist.estimator import SpiceClusterer
    from spice_dist.launching import Launch
    from spice_dist.pipeline import fit
    from spice_dist.recipes import recipe

    __version__: str

# How often an idle thread of torch's CPU kernels looks for work before it sleeps, read when torch is first imported.
# With libgomp's default a second busy program was seen to make a training step 20 times as long; with so few turns it
# is two to three times, about its share of the cores, and no slower when the cores are free (tests/bench).
if "OMP_WAIT_POLICY" not in os.environ:  # the standard's way to say the same; libgomp would prefer ours
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

__all__ = ["Config", "Interrupted", "Launch", "SpiceClusterer", "UserError", "fit", "override", "recipe"]

_HOME = {
    "Config": "config",
    "Interrupted": "errors",
    "Launch": "launching",
    "SpiceClusterer": "estimator",
    "UserError": "errors",
    "fit": "pipeline",
    "override": "config",
    "recipe": "recipes",
}


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("spice_dist")
    if name not in _HOME:
        raise AttributeError(f"module 'spice_dist' has no attribute {name!r}")
    return getattr(importlib.import_module(f"spice_dist.{_HOME[name]}"), name)
