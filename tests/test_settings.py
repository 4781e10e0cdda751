"""Every setting says what it means, is printed by `spice-dist settings`, and is refused out of its range."""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from spice_dist import cli
from spice_dist.config import Config, flatten, override
from spice_dist.data.manifest import Ingested
from spice_dist.errors import UserError
from spice_dist.recipes import RECIPES, recipe
from spice_dist.settings import Declaration, check_ranges, setting
from spice_dist.settings_table import WIDTH, settings_table
from spice_dist.stages import check_settings

IMAGES = Ingested(1, 1797, "raw", 8, "images", 0, 0, 0, 0, 0, 0, 0, "", "")
RUNS = [
    {},
    {"pretext": "byol"},
    {"method": "imc_swav", "pretext": "imc_swav"},
    {"method": "scan"},
    {"method": "fixmatch", "pretext": "none"},
    {"pretext": "none", "backbone.weights": "timm", "stage2": "spice_graph", "stage3": "spice_tune"},
]
# whose ranges are checked where they are used: by the ingest, the loader and the network
ELSEWHERE = {"data.size", "data.loader", "data.format", "data.quality", "backbone.stem"}


def declared(config: Any, prefix: str = "") -> Iterator[tuple[str, Declaration | None]]:
    for entry in dataclasses.fields(config):
        yield prefix + entry.name, entry.metadata.get("declaration")
        if dataclasses.is_dataclass(value := getattr(config, entry.name)):
            yield from declared(value, f"{prefix}{entry.name}.")


DECLARED = dict(declared(Config()))


def bad(declaration: Declaration, default: Any) -> list[Any]:
    """Values just outside of the range, of the type of the setting."""
    values: list[Any] = ["nonsense"] if declaration.choices else []
    whole = isinstance(default[0] if default else 0, int) if isinstance(default, tuple) else isinstance(default, int)
    for bound, towards in (
        (declaration.above, 0),
        (declaration.least, -1),
        (declaration.below, 0),
        (declaration.most, 1),
    ):
        if bound is not None and math.isfinite(bound):
            next_to_it = bound + towards if whole else math.nextafter(bound, towards * math.inf)
            values.append(next_to_it if towards else bound)
    if isinstance(default, tuple):
        return [(value,) * max(1, len(default)) for value in values]
    return [type(default)(value) for value in values]


def test_every_setting_says_what_it_means():
    assert [name for name, declaration in DECLARED.items() if not (declaration and declaration.meaning)] == []


@pytest.mark.parametrize("name", [n for n, d in DECLARED.items() if d and d.range and n not in ELSEWHERE])
def test_a_value_out_of_the_declared_range_is_refused_by_name(name):
    declaration, default = DECLARED[name], flatten(Config())[name]
    assert declaration is not None
    runs = [override(recipe("digits"), changes) for changes in RUNS]
    values = bad(declaration, default)
    assert values
    for value in values:
        said = [message for run in runs if (message := refusal(run, name, value))]
        assert said, f"{value} is nowhere refused"
        group, _, leaf = name.rpartition(".")
        assert all(group in message and re.search(rf"\b{leaf}\b", message) for message in said)


def refusal(config: Config, name: str, value: Any) -> str:
    try:
        check_settings(changed(config, name.split("."), value), IMAGES, "images")
    except UserError as error:
        return str(error)
    return ""


def changed(config: Any, path: list[str], value: Any) -> Any:
    first, *rest = path
    return dataclasses.replace(config, **{first: changed(getattr(config, first), rest, value) if rest else value})


def test_all_settings_are_printed_once_in_120_columns(capsys):
    assert cli.main(["settings"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH == 120
    printed = [line.split(" = ")[0] for line in lines if " = " in line and line[0] != " "]
    assert sorted(printed) == sorted(flatten(Config()))


def test_a_group_prints_its_settings_and_a_name_that_setting(capsys):
    assert cli.main(["settings", "moco"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("moco: stage 1")
    assert "moco.epochs = 1000" in text
    assert "moco.view.flip = 0.5" in text
    assert "byol" not in text
    assert cli.main(["settings", "moco.view.flip"]) == 0
    assert capsys.readouterr().out == "moco.view.flip = 0.5  probability of a horizontal flip\n"


def test_a_setting_declared_at_one_place_is_printed_and_checked():
    @dataclass(frozen=True)
    class Settings:
        speed: float = setting(1.5, "how fast it goes", above=0, most=9)
        colour: str = setting("red", "of its coat", choices=("red", "green"))

    assert settings_table(Settings()).splitlines()[1:] == [
        "speed = 1.5   above 0, at most 9  how fast it goes",
        "colour = red  red, green          of its coat",
    ]
    check_ranges("horse", Settings(), "speed", "colour")
    with pytest.raises(UserError, match=r"^horse.speed is 0; it must be above 0$"):
        check_ranges("horse", Settings(speed=0), "speed")
    with pytest.raises(UserError, match=r'^colour is "blue"; it can be red, green$'):
        check_ranges("", Settings(colour="blue"), "speed", "colour")


def test_a_recipes_values_take_the_place_of_the_defaults(capsys):
    assert cli.main(["settings", "spice_semi", "--recipe", "cifar10"]) == 0
    assert "spice_semi.network = wrn_28_2" in capsys.readouterr().out


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_printed(name):
    assert f"bn_groups = {recipe(name).bn_groups} " in settings_table(recipe(name))


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ("mocoo", "did you mean moco"),
        ("spice_self.epoch", "spice_self.epochs"),
        ("qqq", "there are data, backbone, moco"),
    ],
)
def test_an_unknown_group_is_one_line_with_near_names(capsys, group, words):
    assert cli.main(["settings", group]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_bound_is_told_from_its_neighbours():
    share = Declaration("a share", least=0, most=1)
    assert [share.allows(value) for value in (-0.1, 0, 1, 1.1, float("nan"), (0.5, 2.0), ())] == [
        False, True, True, False, False, False, True,
    ]  # fmt: skip
