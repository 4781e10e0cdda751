"""State in words how far to trust a grouping, from numbers that need no labels."""

from dataclasses import dataclass

ALIKE = 0.999  # mean cosine above which features hold no groups
STRONG, FAIR, WEAK, FAILED = "strong", "fair", "weak", "failed"


@dataclass(frozen=True)
class Evidence:
    """The label-free numbers of a run; None where a number is missing."""

    clusters: int  # K, asked for or suggested
    nonempty: int  # of them in use
    largest: float  # share of the images in the largest cluster, 0 to 1
    agreement: float | None = None  # mean ARI between heads of different starts; 1 where all find the same groups
    confidence: float | None = None  # mean, 0 to 1, calibrated
    groups_found: bool | None = None  # False: structureless data would score as well
    suggested: tuple[int, int] | None = None  # range of plausible K
    corrected: bool = False  # by hand, which no start of a head would find again
    too_few: bool = False  # whether there are too few images to test for groups
    alike: float = 0.0  # mean cosine of the features of all pairs of images
    below: str = ""  # the baseline that is better by label-free scores; "" if none is


@dataclass(frozen=True)
class Verdict:
    level: str  # "strong", "fair", "weak" or "failed"
    why: str  # one or two clauses
    remedy: str = ""  # what to try, an imperative; "" if all is well

    def __str__(self) -> str:
        return f"{self.level}: {self.why}" + f"; {self.remedy}" * bool(self.remedy)


def judge(evidence: Evidence) -> Verdict:
    """Return the first verdict that holds, worst first.

    Heads on one neighbour graph agree easily: on the clothing photos by .77 to .81 in mean ARI, where two thirds of
    the images are in the group of their class. Below .4 the groups depend on the start and on chance.
    """
    empty = evidence.clusters - evidence.nonempty
    if evidence.alike > ALIKE:
        why = f"the features of the images are nearly all alike (mean cosine {evidence.alike:.4f})"
        return Verdict(FAILED, why, "look whether the images are constant, or take another --backbone")
    if evidence.nonempty < 2:
        return Verdict(FAILED, "all images are in one group", "ask for fewer clusters, or take another backbone")
    if evidence.too_few:
        return Verdict(WEAK, "too few different images to test whether there are groups", "add images, 20 at least")
    if evidence.groups_found is False:
        return Verdict(
            FAILED, "no groups found: images without any structure would score as well", "take another backbone"
        )
    if empty:
        share = f"{empty} of {evidence.clusters} clusters are empty"
        level = FAILED if 2 * empty >= evidence.clusters else WEAK
        return Verdict(level, share, f"ask for {evidence.nonempty} clusters")
    if evidence.largest > 0.9:
        share = f"one cluster holds {evidence.largest:.0%} of the images"
        return Verdict(WEAK, share, "ask for more clusters, or look whether the rest are outliers")
    if evidence.below:
        return Verdict(WEAK, f"{evidence.below} scores better without labels", "take another backbone")
    agreement = evidence.agreement
    asked = _asked(evidence)
    if agreement is None:
        confidence = evidence.confidence or 0
        level, remedy = (FAIR, "") if confidence >= 0.7 else (WEAK, "train longer")
        if not evidence.corrected:
            return Verdict(level, "one head alone, whose stability is unknown", remedy)
        why = f"corrected by hand, with a mean confidence of {confidence:.2f} of 1"
        return Verdict(level, why, remedy and "look at the images of low confidence")
    why = f"heads of different starts agree by {agreement:.2f} of 1"
    if agreement < 0.4:
        return Verdict(WEAK, why, asked or "take another backbone")
    if agreement < 0.85 or asked:
        return Verdict(FAIR, why, asked)
    return Verdict(STRONG, why)


def _asked(evidence: Evidence) -> str:
    """Return a hint if the number of clusters is outside of the suggested range."""
    if evidence.suggested is None or evidence.suggested[0] <= evidence.clusters <= evidence.suggested[1]:
        return ""
    low, high = evidence.suggested
    return f"the features suggest {low} to {high} clusters" if low < high else f"the features suggest {low} clusters"
