"""The whole configuration of a run, which is changed by dotted names."""

import ast
import dataclasses
import difflib
import json
import numbers
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spice_dist.data.checksums import read_sealed, require_whole
from spice_dist.errors import UserError
from spice_dist.methods.byol import BYOLConfig
from spice_dist.methods.given_labels import GivenLabelsConfig
from spice_dist.methods.imc_swav import ImcSwavConfig
from spice_dist.methods.moco import MoCoConfig
from spice_dist.methods.reliable import ReliableConfig
from spice_dist.methods.scan import ScanConfig, SelfLabelConfig
from spice_dist.methods.spice_graph import GraphConfig, SpiceGraphConfig
from spice_dist.methods.spice_self import SpiceSelfConfig
from spice_dist.methods.spice_semi import SpiceSemiConfig
from spice_dist.methods.spice_tune import SpiceTuneConfig
from spice_dist.settings import setting
from spice_dist.task import Task

KINDS = {int: numbers.Integral, float: numbers.Real}


@dataclass(frozen=True)
class Config(Task):
    moco: MoCoConfig = setting(MoCoConfig(), "stage 1: MoCo-v2")
    byol: BYOLConfig = setting(BYOLConfig(), "another stage 1: BYOL")
    spice_self: SpiceSelfConfig = setting(SpiceSelfConfig(), "stage 2 of SPICE: cluster heads on a frozen backbone")
    graph: GraphConfig = setting(GraphConfig(), "the nearest neighbours among the features")
    spice_graph: SpiceGraphConfig = setting(SpiceGraphConfig(), "stage 2 on the neighbour graph")
    reliable: ReliableConfig = setting(ReliableConfig(), "the labels that stage 3 learns from")
    spice_semi: SpiceSemiConfig = setting(
        SpiceSemiConfig(), "stage 3 of SPICE: the whole network learns from reliable labels"
    )
    spice_tune: SpiceTuneConfig = setting(SpiceTuneConfig(), "stage 3 in minutes: the last blocks of a trained network")
    imc_swav: ImcSwavConfig = setting(ImcSwavConfig(), "IMC-SwAV: features and clusters in one stage")
    scan: ScanConfig = setting(ScanConfig(), "SCAN: clusters from nearest neighbours")
    self_label: SelfLabelConfig = setting(SelfLabelConfig(), "SCAN's self-labelling, after it")
    given_labels: GivenLabelsConfig = setting(GivenLabelsConfig(), "the baselines that learn from true labels")


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return a copy with fields replaced: override(config, {"moco.lr": 0.1}). Text is read as the field's type.

    Raises:
        UserError: there is no such field (the message offers the nearest name), or the value has another type.
    """
    for name, value in changes.items():
        if name not in (leaves := flatten(config)):
            raise UserError(_no_setting(name, list(leaves)))
        config = _replace(config, name.split("."), value, name)
    return config


def read_config(path: Path) -> Config:
    """Read the configuration in a JSON file with a "config": a run's config.json, or the best of a sweep.

    Raises:
        UserError: there is no such file, or it holds no configuration of this version.
    """
    try:
        content = read_sealed(require_whole(path))
        return override(Config(), dotted(content["config"]))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{path} is no configuration: it must be JSON with an object "config"') from error


def dotted(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested objects to dotted names, as `override` takes them."""
    leaves: dict[str, Any] = {}
    for name, value in content.items():
        leaves |= dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return every leaf by its dotted name."""
    leaves: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            leaves |= flatten(value, f"{prefix}{entry.name}.")
        else:
            leaves[prefix + entry.name] = value
    return leaves


def _replace(config: Any, path: list[str], value: Any, name: str) -> Any:
    first, *rest = path
    if rest:
        return dataclasses.replace(config, **{first: _replace(getattr(config, first), rest, value, name)})
    wanted = typing.get_type_hints(type(config))[first]
    try:
        return dataclasses.replace(config, **{first: _convert(value, wanted)})
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, OverflowError):  # from literal_eval
        raise UserError(f'"{name}" is {_name(wanted)}, not {_quoted(value)}') from None


def _no_setting(name: str, leaves: list[str]) -> str:
    group = [leaf for leaf in leaves if leaf.startswith(f"{name}.")]
    if group:
        return f'"{name}" is a group of settings; name one of {", ".join(group)}'
    near = [leaf for leaf in leaves if leaf.endswith(f".{name}")] or difflib.get_close_matches(name, leaves, n=1)
    if near:
        return f'there is no setting "{name}"; did you mean {" or ".join(map(_quoted, near))}?'
    parent = name.rpartition(".")[0]
    among = [leaf for leaf in leaves if leaf.startswith(f"{parent}.")] or leaves
    return f'there is no setting "{name}"; there are {", ".join(among)}'


def _convert(value: Any, wanted: Any) -> Any:
    """Convert the value to the wanted type; raise ValueError, or what `literal_eval` raises, if it has another."""
    if isinstance(value, str) and wanted is not str:
        value = {"true": True, "false": False}.get(value.lower()) if wanted is bool else ast.literal_eval(value)
    if typing.get_origin(wanted) is tuple:
        types = typing.get_args(wanted)
        if isinstance(value, list | tuple):
            types = types[:1] * len(value) if types[-1] is ... else types
            return tuple(_convert(item, kind) for item, kind in zip(value, types, strict=True))
    elif wanted in (int, float) and isinstance(value, KINDS[wanted]) and not isinstance(value, bool):
        return wanted(value)  # a NumPy number becomes a plain one, which JSON can hold
    elif wanted in (bool, str) and isinstance(value, wanted):
        return value
    raise ValueError(value)


def _name(wanted: Any) -> str:
    if typing.get_origin(wanted) is tuple:
        types = typing.get_args(wanted)
        return f"a list such as ({', '.join('32' if types[0] is int else '0.5' for _ in types)})"
    return {int: "a whole number", float: "a number", bool: "True or False", str: "text"}[wanted]


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
