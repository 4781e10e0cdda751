"""From what a user names (data, recipe, networks, single settings) to one configuration, for command and estimator.

A folder without a recipe takes `photos` with the best trained network that can be had. A run that goes on takes the
network that its config.json names: a hub that answers today and not tomorrow must not change it.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spice_dist.config import Config, override, read_config
from spice_dist.data.files import Progress
from spice_dist.data.sources import Source
from spice_dist.errors import UserError
from spice_dist.recipes import RECIPES, recipe, trained
from spice_dist.task import AUTO

AUTOMATIC, SCRATCH = "auto", "scratch"
SAMPLED = 16  # images whose size is looked at


@dataclass(frozen=True)
class Wish:
    """What was asked for; None where nothing was."""

    recipe: str | None = None
    method: str = "spice"
    backbones: tuple[str, ...] = ()  # timm names, NAME=WEIGHTS, "auto" or "scratch"
    weights: str | None = None
    changes: Mapping[str, Any] | None = None  # settings by dotted name, put on top
    config: Path | None = None  # a file with a whole configuration, in place of a recipe


@dataclass(frozen=True)
class Resolved:
    config: Config
    network: str  # the network in one line, where it was chosen automatically; else ""


def resolve(
    source: Source, wish: Wish, run: Path | None = None, progress: Progress = lambda done, total: None
) -> Resolved:
    """The configuration of a run on these images.

    Args:
        run: the folder it will be in, which may hold an earlier call's choice of network.
        progress: gets (bytes, all bytes) while weights are downloaded.

    Raises:
        UserError: a recipe, network or setting does not exist, or they do not go together.
    """
    changes = dict(wish.changes or {})
    _check_published(source, wish)
    if wish.config is not None:
        return Resolved(_from_file(wish.config, wish, changes), "")
    name = wish.recipe or ("digits" if source.name == "digits" else "photos")
    config = recipe(name, len(source.paths), wish.method)
    backbones = wish.backbones or _default_backbones(name, wish, changes)
    chosen = ""
    if backbones == (AUTOMATIC,):
        network, chosen = _automatic(len(source.paths), run, progress)
    else:
        network = named_networks(backbones, wish.weights)
    if wish.method == "imc_swav":
        network.pop("pretext", None)  # it goes on from trained weights by itself
    config = override(config, network)
    if name == "photos" and wish.method == "spice":
        if network.get("backbone.weights"):
            config = trained(config, len(source.paths), shorter_side(source))
        config = _photos(config, changes, run)
    elif name == "photos" and "clusters" not in changes:
        raise UserError(
            f"the number of clusters is missing; give --clusters, a whole number from 2 up, with --method {wish.method}"
        )
    return Resolved(override(config, changes), chosen)


def _check_published(source: Source, wish: Wish) -> None:
    """UserError for a published data set without a recipe or a number of clusters."""
    name, colon, _ = source.name.partition(":")
    published = name.replace("-", "_")
    if colon and published in RECIPES and not (wish.recipe or wish.config or "clusters" in (wish.changes or {})):
        raise UserError(
            f"{name} has published settings: give --recipe {published}, or --recipe photos for a trained network"
        )


def _from_file(path: Path, wish: Wish, changes: Mapping[str, Any]) -> Config:
    if wish.recipe or wish.method != "spice":
        raise UserError("--config is a whole configuration: leave --recipe and --method out")
    return override(read_config(path), {**named_networks(wish.backbones, wish.weights), **changes})


def _photos(config: Config, changes: dict[str, Any], run: Path | None) -> Config:
    """The recipe `photos` with the stages that suit the changes; `changes` gets AUTO clusters where it has none."""
    if changes.get("pretext", "none") != "none":  # its features are not known before it has learnt them
        config = override(config, {"backbone.intermediate": False})
    # the neighbours of what stage 1 learns say how many groups there are; with another number the run goes on so
    graph = changes.setdefault("clusters", AUTO) == AUTO or _began_on_graph(run)
    if graph and config.stage2 != "spice_graph":
        config = replace(config, stage2="spice_graph", stage3="none")
    return config


def shorter_side(source: Source) -> int | None:
    """Median of the shorter sides of up to SAMPLED images, in pixels; None where none can be read."""
    import numpy as np

    step = max(1, len(source.paths) // SAMPLED)
    sides = [side for index in range(0, len(source.paths), step)[:SAMPLED] if (side := _side(source, index))]
    return int(np.median(sides)) if sides else None


def _side(source: Source, index: int) -> int | None:
    """From the header alone; whatever is wrong with an image is the ingest's to say."""
    from PIL import Image

    try:
        if source.file is not None:
            with Image.open(source.file(index)) as image:
                return min(image.size)
        content = source.read(index)
        if isinstance(content, bytes):
            with Image.open(io.BytesIO(content)) as image:
                return min(image.size)
        return min(content.shape[:2])
    except Exception:
        return None


def _default_backbones(name: str, wish: Wish, changes: Mapping[str, Any]) -> tuple[str, ...]:
    """The networks of a recipe where none is named: photos take trained ones unless something says otherwise."""
    if chosen := changes.get("backbone.name"):
        return (str(chosen),)
    named = any(setting.startswith(("backbone.", "moco.", "byol.")) for setting in changes) or "pretext" in changes
    return (AUTOMATIC,) if name == "photos" and wish.method == "spice" and not wish.weights and not named else ()


def named_networks(names: Sequence[str], weights: str | None) -> dict[str, Any]:
    """The settings that these networks ask for; with weights their image size and normalisation, and no stage 1.

    Raises:
        UserError: there is no such network, or weights without a network.
    """
    from spice_dist.models.presets import for_pretrained, for_several, for_untrained

    special = [name for name in names if name in (AUTOMATIC, SCRATCH)]
    if special and (len(names) > 1 or weights):
        raise UserError(f"--backbone {special[0]} stands alone: leave other --backbone and --weights out")
    if special:
        return {}
    if not names and weights is None:
        return {}
    if not names:
        raise UserError("--weights needs the network that they belong to: give --backbone NAME, a timm model")
    if len(names) > 1 or "=" in names[0]:
        return for_several(list(names), weights)
    return for_untrained(names[0]) if weights is None else for_pretrained(names[0], weights)


def _automatic(num_images: int, run: Path | None, progress: Progress) -> tuple[dict[str, Any], str]:
    """Settings and one line about the network, chosen now or by the call that began this run."""
    if run is not None and (earlier := _chosen_before(run)):
        return earlier
    import torch

    from spice_dist.models.auto_backbone import choose

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choice = choose(device, num_images, progress)
    return dict(choice.settings), choice.line


def _began_on_graph(run: Path | None) -> bool:
    try:
        return run is not None and json.loads((run / "config.json").read_text())["config"]["stage2"] == "spice_graph"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _chosen_before(run: Path) -> tuple[dict[str, Any], str] | None:
    try:
        about = json.loads((run / "config.json").read_text())
        line, config = about["network"], about["config"]
        names = [f"backbone.{name}" for name in config["backbone"]]
        if not line:
            return None
        settings = {name: config["backbone"][name.removeprefix("backbone.")] for name in names}
        size, pretext = config["data"]["size"], config["pretext"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not settings.get("backbone.weights"):
        return {}, line
    return {**settings, "data.size": size, "pretext": pretext}, line
