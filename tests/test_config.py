"""A setting is named by dots, read as its field's type from text or JSON, and never silently something else."""

import contextlib
import dataclasses
import json
import re
import typing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spice_dist.config import Config, flatten, override
from spice_dist.errors import UserError
from spice_dist.recipes import RECIPES, recipe


@dataclass(frozen=True)
class WithSwitch(Config):
    """A configuration with a field of the type that no setting has yet."""

    switch: bool = False


def get(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def refusal(name: str, value: object) -> str:
    with pytest.raises(UserError) as refused:
        override(WithSwitch(), {name: value})
    assert "\n" not in str(refused.value)
    return str(refused.value)


TEXTS = [
    *(("moco.epochs", "50", 50), ("moco.epochs", " 50", 50), ("seed", "-3", -3), ("spice_semi.steps", "1_000", 1000)),
    *(("moco.lr", "0.06", 0.06), ("moco.lr", "6e-2", 0.06), ("moco.lr", "1", 1.0), ("moco.lr", ".5", 0.5)),
    *(("switch", "True", True), ("switch", "false", False), ("switch", "true", True)),
    *(("backbone.name", "resnet50", "resnet50"), ("backbone.name", "7", "7"), ("spice_semi.init", "(a", "(a")),
    ("moco.view.crop_scale", "(0.2,1)", (0.2, 1.0)),
    ("moco.view.crop_scale", "[0.2, 1]", (0.2, 1.0)),
    ("moco.view.crop_scale", "0.2,1", (0.2, 1.0)),
    ("backbone.widths", "(32,64)", (32, 64)),
    ("backbone.widths", "(32,)", (32,)),
    ("backbone.widths", "()", ()),
]


@pytest.mark.parametrize(("name", "text", "value"), TEXTS)
def test_text_is_read_as_the_fields_type(name, text, value):
    found = get(override(WithSwitch(), {name: text}), name)
    assert found == value
    assert type(found) is type(value)
    if isinstance(value, tuple):
        assert [type(item) for item in found] == [type(item) for item in value]


@pytest.mark.parametrize(("name", "value"), [("moco.lr", 1), ("moco.lr", np.float32(1)), ("moco.epochs", np.int64(1))])
def test_whole_and_numpy_numbers_become_plain_ones_of_the_fields_type(name, value):
    found = get(override(Config(), {name: value}), name)
    assert found == 1
    assert type(found) is type(get(Config(), name))


REFUSED = [
    *(("moco.epochs", "many"), ("moco.epochs", "1.5"), ("moco.epochs", 1.0), ("moco.epochs", True)),
    *(("moco.epochs", "True"), ("moco.epochs", None), ("moco.epochs", ""), ("moco.epochs", "2**3")),
    *(("moco.lr", "fast"), ("moco.lr", False), ("moco.lr", "(1,)"), ("moco.lr", "1" + "0" * 400)),
    *(("moco.lr", "{[]: 1}"), ("moco.lr", "(" * 500), ("moco.lr", "\0"), ("moco.lr", "__import__('os')")),
    *(("switch", "1"), ("switch", 1), ("switch", "yes")),
    *(("backbone.name", 5), ("backbone.name", None)),
    *(("moco.view.crop_scale", "(0.2,)"), ("moco.view.crop_scale", "(0.2,'x')"), ("moco.view.crop_scale", 0.2)),
    *(("backbone.widths", "32"), ("backbone.widths", "(32, 6.5)"), ("backbone.widths", "{32}")),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_value_of_another_type_is_refused_by_name_with_what_it_should_be(name, value):
    message = refusal(name, value)
    assert message.startswith(f'"{name}" is ')
    kinds = ("a whole number", "a number", "True or False", "text", r"a list such as \((32, 32|0.5, 0.5)\)")
    assert re.search(f" is ({'|'.join(kinds)}), not ", message)


def test_the_example_of_a_list_is_itself_accepted():
    for name in ("backbone.widths", "moco.view.crop_scale"):
        example = refusal(name, "x").split("such as ")[1].split(", not")[0]
        override(Config(), {name: example})


NEAR = [
    ("moco.temprature", '"moco.temperature"'),
    ("mocco.lr", '"moco.lr"'),
    ("moco.view.crop_scal", '"moco.view.crop_scale"'),
    ("backbone.width", '"backbone.widths"'),
    ("cluster", '"clusters"'),
    ("moco-lr", '"moco.lr"'),
    ("moco.lr.x", '"moco.lr"'),
    (
        "lr",
        '"moco.lr" or "byol.lr" or "spice_self.lr" or "spice_graph.lr" or "spice_semi.lr" or "spice_tune.lr" or '
        '"imc_swav.lr" or "scan.lr" or "self_label.lr"',
    ),
]


@pytest.mark.parametrize(("name", "offer"), NEAR)
def test_a_near_miss_is_answered_with_the_full_dotted_name(name, offer):
    assert refusal(name, 1) == f'there is no setting "{name}"; did you mean {offer}?'


def test_a_far_miss_is_answered_with_what_there_is():
    assert "there are moco.epochs, moco.batch" in refusal("moco.xyzzy", 1)
    assert "there are clusters, seed" in refusal("xyzzy", 1)
    for name in ("", ".", "moco.", ".lr", "__class__", "moco.__init__", "moco..lr"):
        assert "there is no setting" in refusal(name, 1)


@pytest.mark.parametrize("name", ["moco", "moco.view", "data"])
def test_a_group_is_refused_and_its_settings_are_named(name):
    message = refusal(name, "x")
    assert message.startswith(f'"{name}" is a group of settings; name one of {name}.')
    for leaf in flatten(get(Config(), name), f"{name}."):
        assert leaf in message


def test_the_original_and_all_other_settings_are_unchanged():
    config = recipe("digits", 500)
    before = flatten(config)
    changed = override(config, {"moco.lr": 0.5, "moco.view.crop_scale": "(0.5, 1)", "seed": 7})
    assert flatten(config) == before
    assert flatten(changed) == before | {"moco.lr": 0.5, "moco.view.crop_scale": (0.5, 1.0), "seed": 7}
    assert override(config, {}) == config


def leaf_types(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf by the declared types alone."""
    found = {}
    for name, wanted in typing.get_type_hints(kind).items():
        group = dataclasses.is_dataclass(wanted)
        found |= leaf_types(wanted, f"{prefix}{name}.") if group else {prefix + name: wanted}
    return found


def test_flatten_names_every_leaf_once_and_override_reaches_each():
    flat = flatten(Config())
    assert flat.keys() == leaf_types(Config).keys()
    for name, value in flat.items():
        assert get(Config(), name) == value
        assert override(Config(), {name: value}) == Config()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name):
    config = RECIPES[name](500)
    assert override(Config(), json.loads(json.dumps(flatten(config)))) == config


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_being_typed_on_the_command_line(name):
    config = RECIPES[name](500)
    assert override(Config(), {leaf: str(value) for leaf, value in flatten(config).items()}) == config


STRATEGIES = {
    int: st.integers(),
    bool: st.booleans(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(),
    tuple[str, ...]: st.lists(st.text()).map(tuple),
    tuple[int, ...]: st.lists(st.integers()).map(tuple),
    tuple[float, ...]: st.lists(st.floats(allow_nan=False, allow_infinity=False)).map(tuple),
    tuple[float, float]: st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 2),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_value_of_a_fields_type_survives_text_and_json(data):
    name, kind = data.draw(st.sampled_from(sorted(leaf_types(Config).items(), key=lambda leaf: leaf[0])))
    value = data.draw(STRATEGIES[kind])
    for form in (value, str(value), json.loads(json.dumps(value))):
        assert get(override(Config(), {name: form}), name) == value


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=20))
def test_any_text_is_either_a_value_of_the_type_or_one_clear_refusal(text):
    for name, kind in (("moco.epochs", int), ("moco.lr", float), ("backbone.widths", tuple)):
        with contextlib.suppress(UserError):  # any other error fails
            assert isinstance(get(override(Config(), {name: text}), name), kind)
