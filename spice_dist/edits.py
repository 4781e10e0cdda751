"""edits.json: corrections of a run's groups, as the page of the run or a person wrote them, checked.

The file is not trusted. Every mistake in it is a UserError of one line that names the place in the file.
"""

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unicodedata import category

from spice_dist.data.files import path_cell, printable
from spice_dist.errors import UserError

VERSION = 1
KEYS = ("version", "run", "names", "merge", "split", "move", "outside", "same", "different")
LARGEST = 100_000_000  # bytes of the file
LONGEST = 200  # characters of a name
OUTSIDE = "outside"  # name of the group of images that belong to none
JOINER = "\u200d"  # of emoji
MOST_PARTS = 100  # that a group is divided into
SHOWN = 60  # characters of a value in a message

Pair = tuple[int, int]


@dataclass(frozen=True)
class Known:
    """What edits can refer to: the groups and images of a run."""

    names: Mapping[int, str]  # of groups, where they have one
    sizes: Sequence[int]  # grouped images of each group
    paths: Sequence[str]
    fingerprint: str
    clustered: int  # images that are grouped; the others, which only train or are held out, come after
    outside: int | None = None  # the group of images that belong to none


@dataclass(frozen=True)
class Edits:
    """Corrections by numbers of groups and images, each group as in the run that they are for."""

    names: dict[int, str]
    roots: list[int]  # of each group the smallest that it becomes one with, itself if it stays
    split: dict[int, int]  # root -> number of parts
    move: dict[int, int]  # image -> group
    outside: list[int]
    same: list[Pair]
    different: list[Pair]

    @property
    def regroup(self) -> bool:
        """Whether more than names is corrected."""
        merged = self.roots != list(range(len(self.roots)))
        return merged or any((self.split, self.move, self.outside, self.same, self.different))


def fingerprint(assignments: Path) -> str:
    """Return the first 16 hex digits of the SHA-256 of an assignments.csv, by which edits name their run."""
    return hashlib.sha256(assignments.read_bytes()).hexdigest()[:16]


def read_edits(path: Path, known: Known, force: bool = False) -> Edits:
    """Read and check a file of corrections.

    Args:
        force: also if they were made on another assignments.csv.

    Raises:
        UserError: it cannot be read, or a correction is impossible or contradicts another.
    """
    return _Reader(path.name, known).edits(_content(path), force)


def _content(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} has more than {LARGEST // 1_000_000} MB; that is no file of corrections")
        text = path.read_bytes().decode("utf-8-sig")
        content = json.loads(text, object_pairs_hook=_without_repeats)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except RecursionError:
        raise UserError(f"{path} is not JSON: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {printable(str(error))}") from None
    if not isinstance(content, dict):
        raise UserError(f'{path} must hold an object, such as {{"version": 1, "merge": [[1, 4]]}}')
    return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {_shown(twice)} stands twice")
    return content


def _shown(value: Any) -> str:
    """Return a value as ASCII JSON without control characters, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


class _Reader:
    """Reads one file; `_fail` raises a UserError that names the place."""

    def __init__(self, file: str, known: Known):
        self.file, self.known = printable(file), known
        self.new_names: dict[int, str] = {}
        self.images: dict[str, list[int]] = {}

    def _fail(self, place: str, why: str) -> NoReturn:
        raise UserError(f"{self.file}, {place}: {why}")

    def edits(self, content: dict[str, Any], force: bool) -> Edits:
        for key in content:
            if key not in KEYS:
                near = difflib.get_close_matches(key[:SHOWN], KEYS, 1) or [", ".join(KEYS)]
                self._fail(_shown(key), f"there is no such key; write {near[0]}")
        version = content.get("version")
        if version != VERSION or isinstance(version, bool):
            self._fail("version", f"it is {_shown(version)}; this program reads version {VERSION}")
        self._check_run(content.get("run"), force)
        self.new_names = self._read_names(content.get("names", {}))
        for index, path in enumerate(self.known.paths[: self.known.clustered]):
            for text in {path, path_cell(path), printable(path)}:  # as it is, as in a table, as on a page
                self.images.setdefault(text, []).append(index)
        roots = self._read_merge(content.get("merge", []))
        edits = Edits(
            names=self.new_names,
            roots=roots,
            split=self._read_split(content.get("split", {}), roots),
            move=self._read_move(content.get("move", [])),
            outside=[self._image(value, place) for place, value in self._items("outside", content.get("outside", []))],
            same=list(self._read_pairs("same", content.get("same", []))),
            different=list(self._read_pairs("different", content.get("different", []))),
        )
        return self._checked(edits)

    def _check_run(self, run: Any, force: bool) -> None:
        if run is None:
            return
        if not isinstance(run, str):
            self._fail("run", f"it is {_shown(run)}; it must be the first 16 digits of a SHA-256, or missing")
        if run != self.known.fingerprint and not force:
            self._fail(
                "run",
                f"these corrections are for another assignments.csv ({_shown(run)}, not "
                f'"{self.known.fingerprint}"), so its groups may have other numbers; --force applies them anyway',
            )

    def _items(self, key: str, value: Any) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, list):
            self._fail(key, f"it is {_shown(value)}; it must be a list")
        return ((f"{key}[{number}]", item) for number, item in enumerate(value))

    def _entries(self, key: str, value: Any) -> Iterator[tuple[str, int, Any]]:
        if not isinstance(value, dict):
            self._fail(key, f"it is {_shown(value)}; it must be an object, group -> value")
        for text, item in value.items():
            place = f"{key}[{_shown(text)}]"
            yield place, self._group(text, place), item

    def _group(self, value: Any, place: str) -> int:
        """Return the number of a group that is given by its number or name; new names come before those of the run."""
        count = len(self.known.sizes)
        if isinstance(value, str):
            for names in (self.new_names, self.known.names):
                if matching := [group for group, name in names.items() if name == value]:
                    return matching[0]
            if not (value.isascii() and value.isdecimal() and len(value) < 10):
                names = [*self.new_names.values(), *self.known.names.values()]
                near = difflib.get_close_matches(value[:LONGEST], names, 1)
                hint = f"did you mean {_shown(near[0])}?" if near else f"there are the numbers 0 to {count - 1}"
                self._fail(place, f"no group has the name {_shown(value)}; {hint}")
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            self._fail(place, f"{_shown(value)} is no group; give its number or its name")
        if not 0 <= value < count:
            self._fail(place, f"there is no group {_shown(value)}; there are the numbers 0 to {count - 1}")
        return value

    def _image(self, value: Any, place: str) -> int:
        if isinstance(value, str):
            indices = self.images.get(value, [])
            if len(indices) > 1:
                named = " and ".join(map(str, indices[:3])) + " and more" * (len(indices) > 3)
                self._fail(place, f"{_shown(value)} names several images; give one of the numbers {named}")
            if not indices:
                near = next((path for path in self.images if value and path.endswith(f"/{value}")), None)
                hint = f"did you mean {_shown(near)}?" if near else "give a path or an index of assignments.csv"
                self._fail(place, f"there is no image {_shown(value)} among those that are grouped; {hint}")
            return indices[0]
        if isinstance(value, bool) or not isinstance(value, int):
            self._fail(place, f"{_shown(value)} is no image; give its path or its index")
        if not 0 <= value < self.known.clustered:
            self._fail(place, f"there is no image {_shown(value)}; there are 0 to {self.known.clustered - 1}")
        return value

    def _read_names(self, value: Any) -> dict[int, str]:
        names: dict[int, str] = {}
        for place, group, name in self._entries("names", value):
            if not isinstance(name, str) or not name.strip():
                self._fail(place, f"{_shown(name)} is no name; give text")
            name = "".join(" " if category(c) == "Zs" else c for c in name).strip()
            if len(name) > LONGEST:
                self._fail(place, f"the name has {len(name):,} characters; give at most {LONGEST}")
            if not name.replace(JOINER, "").isprintable():
                self._fail(place, f"the name {_shown(name)} has control characters; leave them out")
            if name.isdecimal():
                self._fail(place, f"the name {_shown(name)} would be taken for a number; add a letter")
            if name.casefold() == OUTSIDE and group != self.known.outside:
                self._fail(place, f"{_shown(name)} is the name of images that belong to no group; give another")
            if names.get(group, name) != name:
                self._fail(place, f"group {group} has two names, {_shown(names[group])} too; give one")
            names[group] = name
        return names

    def _read_merge(self, value: Any) -> list[int]:
        roots = list(range(len(self.known.sizes)))
        for place, item in self._items("merge", value):
            if not isinstance(item, list) or len(item) < 2:
                self._fail(place, f"it is {_shown(item)}; give two groups or more, such as [1, 4]")
            groups = {self._group(group, f"{place}[{number}]") for number, group in enumerate(item)}
            if len(groups) < 2:
                self._fail(place, f"it names group {min(groups)} alone; give two groups or more")
            if self.known.outside in groups:
                self._fail(place, f"group {self.known.outside} is that of images outside of all; move them one by one")
            joined = {roots[group] for group in groups}
            roots = [min(joined) if root in joined else root for root in roots]
        if len({root for group, root in enumerate(roots) if group != self.known.outside}) < 2:
            self._fail("merge", "one group would be left; leave at least two")
        return roots

    def _read_split(self, value: Any, roots: list[int]) -> dict[int, int]:
        split: dict[int, int] = {}
        for place, group, parts in self._entries("split", value):
            if isinstance(parts, bool) or not isinstance(parts, int) or not 2 <= parts <= MOST_PARTS:
                self._fail(place, f"it is {_shown(parts)}; give a number of groups from 2 to {MOST_PARTS}")
            if roots.count(roots[group]) > 1:
                self._fail(place, f"group {group} is also merged; do one of the two, and then the other on the result")
            if group == self.known.outside:
                self._fail(place, f"group {group} is that of images outside of all; move them one by one")
            if 2 * parts > self.known.sizes[group]:
                size = self.known.sizes[group]
                self._fail(place, f"group {group} has {size} images, too few for {parts} groups of two or more")
            if split.get(group, parts) != parts:
                self._fail(place, f"group {group} is split into {split[group]} too; give one number")
            split[group] = parts
        return split

    def _read_move(self, value: Any) -> dict[int, int]:
        move: dict[int, int] = {}
        for place, item in self._items("move", value):
            if not isinstance(item, list) or len(item) != 2:
                self._fail(place, f'it is {_shown(item)}; give an image and a group, such as ["a/17.jpg", 3]')
            image, group = self._image(item[0], f"{place}[0]"), self._group(item[1], f"{place}[1]")
            if move.get(image, group) != group:
                self._fail(place, f"image {image} is moved to group {move[image]} too; give one group")
            move[image] = group
        return move

    def _read_pairs(self, key: str, value: Any) -> Iterator[Pair]:
        for place, item in self._items(key, value):
            if not isinstance(item, list) or len(item) != 2:
                self._fail(place, f'it is {_shown(item)}; give two images, such as ["a/1.jpg", "a/2.jpg"]')
            pair = self._image(item[0], f"{place}[0]"), self._image(item[1], f"{place}[1]")
            if pair[0] == pair[1]:
                self._fail(place, f"it names image {pair[0]} twice; give two images")
            yield pair

    def _checked(self, edits: Edits) -> Edits:
        """Refuse what contradicts itself; images moved to the group outside are outside."""
        if both := sorted(edits.move.keys() & set(edits.outside)):
            self._fail("outside", f"image {both[0]} is also moved to group {edits.move[both[0]]}; do one of the two")
        self._check_names(edits)
        outside = [image for image, group in edits.move.items() if group == self.known.outside]
        move = {image: group for image, group in edits.move.items() if group != self.known.outside}
        edits = Edits(**{**vars(edits), "move": move, "outside": sorted({*edits.outside, *outside})})
        if why := contradiction(edits.roots, move, edits.outside, edits.same, edits.different):
            self._fail(*why)
        return edits

    def _check_names(self, edits: Edits) -> None:
        """Refuse two names of one group after merging, and one name of two."""
        roots, new = edits.roots, edits.names
        renamed = {roots[group]: name for group, name in new.items()}
        owners = {name: roots[group] for group, name in self.known.names.items() if roots[group] not in renamed}
        for group, name in new.items():
            place = f'names["{group}"]'
            if renamed[roots[group]] != name:
                self._fail(place, f"it is merged with a group of the name {_shown(renamed[roots[group]])}; give one")
            if owners.setdefault(name, roots[group]) != roots[group]:
                self._fail(place, f"{_shown(name)} is also the name of group {owners[name]}; merge them or rename one")


def contradiction(
    roots: Sequence[int], fixed: Mapping[int, int], outside: Sequence[int], same: Sequence[Pair],
    different: Sequence[Pair],
) -> tuple[str, str] | None:  # fmt: skip
    """Return where and why corrections contradict each other by way of `same`; None if they do not."""
    leader = _leaders(same)
    place_of = {image: roots[group] for image, group in fixed.items()} | dict.fromkeys(outside, -1)
    group_of: dict[int, tuple[int, int]] = {}  # of a set of images that belong together: (group, an image of it)
    for image, group in place_of.items():
        other, first = group_of.setdefault(leader.get(image, image), (group, image))
        if other != group:
            where = ["outside" if number < 0 else f"group {number}" for number in (other, group)]
            return "same", f"images {first} and {image} belong together, but are in {where[0]} and {where[1]}; fix one"
    for number, (one, other) in enumerate(different):
        sets = leader.get(one, one), leader.get(other, other)
        if sets[0] == sets[1]:
            return f"different[{number}]", f"images {one} and {other} belong together by same; leave one of them out"
        groups = [group_of[images][0] for images in sets if images in group_of]
        if len(groups) == 2 and groups[0] == groups[1] >= 0:
            return f"different[{number}]", f"images {one} and {other} are both fixed in group {groups[0]}; move one"
    return None


def _leaders(pairs: Sequence[Pair]) -> dict[int, int]:
    """Return for each image of the pairs one image of all those that are joined with it."""
    leader: dict[int, int] = {}

    def find(image: int) -> int:
        while leader.setdefault(image, image) != image:
            leader[image] = image = leader[leader[image]]
        return image

    for one, other in pairs:
        leader[find(one)] = find(other)
    return {image: find(image) for image in list(leader)}
