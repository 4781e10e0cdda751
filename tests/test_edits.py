"""edits.json: every mistake is one line that names the place; what is right becomes numbers of groups and images."""

import json
from pathlib import Path

import numpy as np
import pytest

from spice_dist.edits import Known, contradiction, fingerprint, read_edits
from spice_dist.errors import UserError

PATHS = ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/\x1b[2J.jpg", "twice.jpg", "twice.jpg", "c/7.jpg", "c/8.jpg", "held.jpg"]
KNOWN = Known({1: "dresses", 2: "hats"}, [1, 4, 2, 1], PATHS, "0123456789abcdef", clustered=8)


def read(tmp_path: Path, content: object, known: Known = KNOWN, force: bool = False):
    file = tmp_path / "edits.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_edits(file, known, force)


@pytest.mark.parametrize(
    "edits",
    [{"merge": [[0, 3]]}, {"split": {"1": 2}}, {"move": [[0, 1]]}, {"outside": [0]}, {"same": [[0, 1]]}],
    ids=str,
)
def test_more_than_names_regroups(tmp_path, edits):
    assert not read(tmp_path, {"version": 1, "names": {"0": "shoes"}}).regroup
    assert read(tmp_path, {"version": 1, **edits}).regroup


def test_groups_and_images_are_given_by_name_or_number(tmp_path):
    edits = read(
        tmp_path,
        {
            "version": 1,
            "run": "0123456789abcdef",
            "names": {"3": " Schuhe und Stiefel ", "dresses": "gowns"},
            "merge": [[0, "hats"]],
            "split": {"gowns": 2},
            "move": [["a/1.jpg", "gowns"], [6, 3], ["b/\\x1b[2J.jpg", "dresses"]],
            "outside": [7],
            "same": [["a/1.jpg", "a/2.jpg"]],
            "different": [["c/7.jpg", 0]],
        },
    )
    assert edits.names == {3: "Schuhe und Stiefel", 1: "gowns"}
    assert edits.roots == [0, 1, 0, 3]
    assert edits.split == {1: 2}
    assert edits.move == {0: 1, 6: 3, 3: 1}
    assert (edits.outside, edits.same, edits.different) == ([7], [(0, 1)], [(6, 0)])


def test_an_empty_file_of_corrections_changes_nothing(tmp_path):
    edits = read(tmp_path, {"version": 1})
    assert (edits.roots, edits.names, edits.split, edits.move) == ([0, 1, 2, 3], {}, {}, {})


def test_merges_that_share_a_group_are_one_merge(tmp_path):
    assert read(tmp_path, {"version": 1, "merge": [[3, 2], [2, 1]]}).roots == [0, 1, 1, 1]


def test_an_image_moved_to_the_group_outside_is_outside(tmp_path):
    known = Known({3: "outside"}, [1, 4, 2, 1], PATHS, "0" * 16, clustered=8, outside=3)
    edits = read(tmp_path, {"version": 1, "move": [[0, "outside"], [7, 1]]}, known)
    assert (edits.outside, edits.move) == ([0], {7: 1})


LONG = "x" * 10_000
MISTAKES = [
    (b"not JSON", "is not JSON"),
    (b"\xff\xfe\x00", "is not JSON"),
    (b'{"version": 1,\n "merge": [[0, 1]\n "move": []}', "is not JSON: Expecting ',' delimiter: line 3 column 2"),
    (b"[" * 100_000, "is not JSON"),
    (b'{"version": 1, "merge": [' + b"[" * 900 + b"]" * 900 + b"]}", "merge[0]: it is"),
    (b'{"version": 1, "names": {}, "names": {}}', 'the key "names" stands twice'),
    (b"[1]", "must hold an object"),
    ({}, "version: it is null; this program reads version 1"),
    ({"version": 2}, "version: it is 2"),
    ({"version": True}, "version: it is true"),
    ({"version": 1, "merges": []}, '"merges": there is no such key; write merge'),
    ({"version": 1, LONG: []}, "there is no such key"),
    ({"version": 1, "\x1b[31m": []}, '"\\u001b[31m": there is no such key'),
    ({"version": 1, "run": 3}, "run: it is 3"),
    ({"version": 1, "run": "fedcba9876543210"}, "run: these corrections are for another assignments.csv"),
    ({"version": 1, "names": ["x"]}, 'names: it is ["x"]; it must be an object'),
    ({"version": 1, "names": {"4": "x"}}, 'names["4"]: there is no group 4; there are the numbers 0 to 3'),
    ({"version": 1, "names": {"-1": "x"}}, 'names["-1"]: no group has the name "-1"'),
    ({"version": 1, "names": {"dreses": "x"}}, 'no group has the name "dreses"; did you mean "dresses"?'),
    ({"version": 1, "names": {"0": 5}}, 'names["0"]: 5 is no name'),
    ({"version": 1, "names": {"0": "  "}}, "is no name"),
    ({"version": 1, "names": {"0": LONG}}, "the name has 10,000 characters"),
    ({"version": 1, "names": {"0": "a\nb"}}, 'the name "a\\nb" has control characters'),
    ({"version": 1, "names": {"0": "\u202egpj.exe"}}, "has control characters"),
    ({"version": 1, "names": {"0": "42"}}, "would be taken for a number"),
    ({"version": 1, "names": {"0": "hats"}}, '"hats" is also the name of group 2'),
    ({"version": 1, "names": {"0": "x", "3": "x"}}, '"x" is also the name of group 0'),
    ({"version": 1, "names": {"1": "x", "dresses": "y"}}, "group 1 has two names"),
    ({"version": 1, "names": {"0": "x", "3": "y"}, "merge": [[0, 3]]}, 'it is merged with a group of the name "y"'),
    ({"version": 1, "merge": {"1": 4}}, 'merge: it is {"1": 4}; it must be a list'),
    ({"version": 1, "merge": [[1]]}, "merge[0]: it is [1]; give two groups or more"),
    ({"version": 1, "merge": [[0, 1], [2, 2]]}, "merge[1]: it names group 2 alone"),
    ({"version": 1, "merge": [[0, 9]]}, "merge[0][1]: there is no group 9"),
    ({"version": 1, "merge": [[0, True]]}, "merge[0][1]: true is no group"),
    ({"version": 1, "merge": [[0, 1.0]]}, "merge[0][1]: 1.0 is no group"),
    ({"version": 1, "merge": [[0, 1, 2, 3]]}, "merge: one group would be left"),
    ({"version": 1, "split": {"0": 1}}, 'split["0"]: it is 1; give a number of groups from 2 to 100'),
    ({"version": 1, "split": {"0": 10**9}}, "give a number of groups from 2 to 100"),
    ({"version": 1, "split": {"1": 3}}, "group 1 has 4 images, too few for 3 groups of two or more"),
    ({"version": 1, "names": {"0": "Outside"}}, '"Outside" is the name of images that belong to no group'),
    ({"version": 1, "split": {"1": 2}, "merge": [[0, 1]]}, "group 1 is also merged"),
    ({"version": 1, "move": [["a/1.jpg"]]}, "move[0]: it is"),
    ({"version": 1, "move": [["d/1.jpg", 0]]}, 'move[0][0]: there is no image "d/1.jpg"'),
    ({"version": 1, "move": [["7.jpg", 0]]}, 'did you mean "c/7.jpg"?'),
    ({"version": 1, "move": [["../../etc/passwd", 0]]}, 'there is no image "../../etc/passwd"'),
    ({"version": 1, "move": [["held.jpg", 0]]}, 'there is no image "held.jpg" among those that are grouped'),
    ({"version": 1, "move": [[8, 0]]}, "move[0][0]: there is no image 8; there are 0 to 7"),
    ({"version": 1, "move": [["twice.jpg", 0]]}, '"twice.jpg" names several images; give one of the numbers 4 and 5'),
    ({"version": 1, "move": [[0, 1], ["a/1.jpg", 2]]}, "move[1]: image 0 is moved to group 1 too"),
    ({"version": 1, "move": [[0, 1]], "outside": [0]}, "outside: image 0 is also moved to group 1"),
    ({"version": 1, "outside": 3}, "outside: it is 3; it must be a list"),
    ({"version": 1, "same": [[0, 0]]}, "same[0]: it names image 0 twice"),
    ({"version": 1, "same": [[0, 1, 2]]}, "same[0]: it is [0, 1, 2]; give two images"),
    ({"version": 1, "same": [[0, 1], [1, 2]], "different": [[2, 0]]}, "different[0]: images 2 and 0 belong together"),
    ({"version": 1, "same": [[0, 1], [1, 2]], "move": [[0, 1], [2, 3]]}, "are in group 1 and group 3"),
    ({"version": 1, "same": [[0, 1]], "move": [[0, 1]], "outside": [1]}, "are in group 1 and outside"),
    ({"version": 1, "different": [[0, 1]], "move": [[0, 1], [1, 2]], "merge": [[1, 2]]}, "both fixed in group 1"),
]


@pytest.mark.parametrize(("content", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_every_mistake_is_one_line_that_names_the_place(tmp_path, content, message):
    with pytest.raises(UserError) as caught:
        read(tmp_path, content)
    text = str(caught.value)
    assert message in text
    assert "edits.json" in text
    assert text.isprintable()
    assert len(text.replace(str(tmp_path), "")) < 300


def test_another_assignments_file_is_gone_on_with_only_by_force(tmp_path):
    assert read(tmp_path, {"version": 1, "run": "f" * 16, "merge": [[0, 1]]}, force=True).roots == [0, 0, 2, 3]


def test_a_file_that_is_missing_or_huge_is_refused_before_it_is_read(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_edits(tmp_path / "none.json", KNOWN)
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(UserError, match="more than 100 MB"):
        read_edits(tmp_path / "huge.json", KNOWN)


def test_the_fingerprint_is_the_start_of_the_sha256(tmp_path):
    (tmp_path / "assignments.csv").write_bytes(b"abc")
    assert fingerprint(tmp_path / "assignments.csv") == "ba7816bf8f01cfea"  # of FIPS 180-2's example


def test_pairs_contradict_each_other_exactly_where_a_chain_joins_a_kept_apart_pair():
    """Oracle: images that a chain of `same` joins, by powers of the matrix of pairs."""
    rng = np.random.default_rng(0)
    outcomes = []
    for _ in range(200):
        pairs = [(int(a), int(b)) for a, b in rng.integers(7, size=(rng.integers(2, 8), 2)) if a != b]
        same, different = pairs[: len(pairs) // 2 + 1], pairs[len(pairs) // 2 + 1 :]
        joined = np.eye(7, dtype=int)
        for one, other in same:
            joined[one, other] = joined[other, one] = 1
        joined = np.linalg.matrix_power(joined, 7) > 0
        expected = any(joined[pair] for pair in different)
        assert (contradiction(list(range(7)), {}, [], same, different) is not None) == expected
        outcomes.append(expected)
    assert 20 < sum(outcomes) < 180
