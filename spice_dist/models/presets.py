"""Settings that replace a recipe's network by another."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spice_dist.data.views import Statistics
from spice_dist.errors import UserError
from spice_dist.models.backbone import BackboneConfig, is_resnet
from spice_dist.models.pretrained import (
    PACKAGE,
    TIMM,
    check_name,
    find_packaged,
    packaged_file,
    published_data_config,
)


def for_untrained(name: str) -> dict[str, Any]:
    """Return the settings, by dotted names, that replace a recipe's network by another of random weights."""
    check_name(name)
    settings: dict[str, Any] = {"backbone.name": name, "backbone.widths": (), "backbone.depths": ()}
    settings |= {"backbone.others": (), "backbone.other_weights": ()}
    return settings if is_resnet(name) else {**settings, "backbone.stem": "native"}


def for_small_images(name: str, statistics: Statistics) -> BackboneConfig:
    """Configure a network of random weights: a ResNet of timm with the small stem, others with their own stem.

    Raises:
        UserError: there is no such network; the message offers near names.
    """
    check_name(name)
    mean, std = statistics
    return BackboneConfig(name, "small" if is_resnet(name) else "native", mean=mean, std=std)


def for_pretrained(name: str, weights: str) -> dict[str, Any]:
    """Return the settings, by dotted names, with which a timm model is used as it was trained, without a stage 1.

    The user's settings go on top. Another data.size is possible: position embeddings are interpolated to it.

    Raises:
        UserError: there is no such network, or weights are "package" and no installed package ships them.
    """
    size, mean, std = published_data_config(name)
    return {
        "pretext": "none",
        "backbone.name": name,
        "backbone.weights": _checked(name, weights),
        "backbone.stem": "native",
        "backbone.widths": (),
        "backbone.depths": (),
        "backbone.mean": mean,
        "backbone.std": std,
        "backbone.others": (),
        "backbone.other_weights": (),
        "data.size": size,
    }


def for_several(names: Sequence[str], weights: str | None = None) -> dict[str, Any]:
    """Do as `for_pretrained` for several networks, whose unit features are concatenated; data.size is the first's.

    Args:
        names: timm models, each with or without weights: "NAME" or "NAME=WEIGHTS".
        weights: of models named without: "timm", "package" or, for a single one, a file. None: those of an installed
            package, or else timm's.

    Raises:
        UserError: as `for_pretrained`, or a network is named twice, or one file is given for several networks.
    """
    networks = [(name, source or weights or "") for name, _, source in (text.partition("=") for text in names)]
    of_file = [name for name, source in networks if source == weights and weights not in (TIMM, PACKAGE)]
    if len(of_file) > 1:
        raise UserError(f"--weights {weights} cannot fit {' and '.join(of_file)}; give --backbone NAME=FILE for each")
    if twice := [name for name in dict(networks) if [one for one, _ in networks].count(name) > 1]:
        raise UserError(f"--backbone {twice[0]} is given twice; give different networks")
    first, *others = [(name, source or (PACKAGE if find_packaged(name) else TIMM)) for name, source in networks]
    settings = for_pretrained(*first)
    for name, _ in others:
        published_data_config(name)  # raises a UserError if there is no such network
    settings["backbone.others"] = tuple(name for name, _ in others)
    settings["backbone.other_weights"] = tuple(_checked(*other) for other in others)
    return settings


def _checked(name: str, weights: str) -> str:
    """Return the weights as the configuration holds them: a file by its full path, since workers use other folders."""
    if weights == PACKAGE:
        packaged_file(name)
    return weights if weights in (TIMM, PACKAGE) else str(Path(weights).resolve())
