"""The words for how far a grouping can be trusted."""

from dataclasses import replace

import pytest

from spice_dist.verdict import Evidence, judge

GOOD = Evidence(clusters=10, nonempty=10, largest=0.15, agreement=0.9, confidence=0.9, groups_found=True)


def test_clear_groups_are_strong():
    assert judge(GOOD).level == "strong"
    assert judge(replace(GOOD, suggested=(8, 12))).level == "strong"


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({"nonempty": 1, "largest": 1.0}, "failed", "one group"),
        ({"nonempty": 4}, "failed", "6 of 10 clusters are empty"),
        ({"nonempty": 9}, "weak", "1 of 10 clusters are empty; ask for 9"),
        ({"groups_found": False}, "failed", "no groups found"),
        ({"too_few": True, "groups_found": False}, "weak", "add images"),
        ({"largest": 0.95}, "weak", "one cluster holds 95%"),
        ({"below": "k-means"}, "weak", "k-means scores better"),
        ({"agreement": 0.3}, "weak", "0.30"),
        ({"agreement": 0.6}, "fair", "0.60"),
        ({"suggested": (2, 5)}, "fair", "suggest 2 to 5"),
        ({"agreement": None, "confidence": 0.4}, "weak", "one head"),
        (
            {"agreement": None, "corrected": True, "confidence": 0.74},
            "fair",
            "corrected by hand, with a mean confidence",
        ),
        ({"agreement": None, "corrected": True, "confidence": 0.4}, "weak", "0.40 of 1; look at the images"),
    ],
)
def test_what_lowers_trust_is_said(change, level, words):
    found = judge(replace(GOOD, **change))
    assert found.level == level
    assert words in str(found)


def test_the_worst_is_said_first():
    assert "one group" in str(judge(replace(GOOD, nonempty=1, groups_found=False, agreement=0.1)))


def test_features_that_are_all_alike_fail_before_anything_else():
    assert "nearly all alike (mean cosine 0.9995)" in str(judge(replace(GOOD, alike=0.9995, nonempty=1)))
    assert judge(replace(GOOD, alike=0.9)) == judge(GOOD)
