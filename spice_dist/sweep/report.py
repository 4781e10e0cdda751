"""The page about a sweep, and its table in the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from spice_dist import artifacts
from spice_dist.data.checksums import read_sealed
from spice_dist.data.files import publish
from spice_dist.objectives import COMBINED, OBJECTIVES, combined, importance, ranks, spearman
from spice_dist.report import charts
from spice_dist.report.page import template
from spice_dist.report.text import duration
from spice_dist.sweep.records import FAILED, FINISHED, RUNNING, STOPPED

Row = dict[str, Any]
"""A trial: its number, the name of its folder, the fields of its record, and its scores by their names."""
MEANINGS = {
    "generalization": "how well a linear classifier of the base run's features predicts the clusters of other images",
    "agreement": "mean agreement (ARI) between the heads, or the students, of a trial",
    "silhouette": "how much closer an image is to its own cluster than to the next, in the base run's features",
    "select_loss": "SPICE's loss of the chosen head, measured alike for all trials; lower is better",
    "consensus": "mean agreement (ARI) of a trial's clusters with those of all other trials",
    "combined": "the mean place by generalization and consensus",
}
TOP = 10  # trials in the tables


def write_sweep_report(folder: Path, trials: Sequence[Row], objective: str) -> Path:
    """Write SWEEP/report.html about these trials, which come the best first."""
    sweep = read_sealed(artifacts.sweep_file(folder))
    finished = with_objective(trials, objective)
    several = len(finished) > 1
    names = sorted(sweep["ranges"])
    shares = importances(finished, names, objective)
    names.sort(key=lambda name: -shares[name])
    page = template("sweep.html", Path(__file__).parent).render(
        title=f"{sweep['space']} on {sweep['images'].split(',')[0]}",
        objective=objective,
        meanings=MEANINGS,
        facts=facts(trials, finished),
        best=best_settings(finished, names, sweep["config"]),
        correlations=correlations(finished),
        parallel=parallel_coordinates(finished, names, objective) if several else None,
        effects=[(name, shares[name], effect(finished, name, objective)) for name in names if several],
        columns=[*names, *scores_of(finished)],
        top=finished[:TOP],
        failed=[row for row in trials if row["state"] not in (FINISHED, RUNNING)],
        command=" ".join(sweep["command"] or []),
        short=short,
    )
    path = artifacts.report_file(folder)
    with publish(path) as file:
        file.write(page.encode())
    return path


def format_sweep(folder: Path, trials: Sequence[Row]) -> str:
    """Show the best trials, and what each objective would have chosen, in a terminal; the best trial comes first."""
    finished = [row for row in trials if row["state"] == FINISHED]
    if not finished:
        reasons = {row["reason"] for row in trials if row["reason"]}
        return f"no trial has finished{': ' * bool(reasons)}{'; '.join(sorted(reasons)[:3])}"
    scores = scores_of(finished)
    lines = [f"{'trial':>5} {'seconds':>8} " + " ".join(f"{name:>14}" for name in scores) + "  settings"]
    for row in finished[:TOP]:
        values = " ".join(f"{_plain(row.get(name)):>14}" for name in scores)
        lines.append(f"{row['number']:>5} {row['seconds']:8.1f} {values}  {settings_line(row['settings'])}")
    for name, rho, place in correlations(finished):
        shown = "undefined" if rho is None else f"{rho:+.2f}"
        lines.append(f"{name:<15} Spearman with ACC {shown}, its choice is number {place} of {len(finished)} by ACC")
    others = len(trials) - len(finished)
    lines += [f"{others} trials failed or were stopped: the reasons are in trials.csv"] * (others > 0)
    lines += ["", f"best         {folder / 'best.json'}   (spice-dist fit DATA --config ...)"]
    return "\n".join([*lines, f"all trials   {folder / 'trials.csv'}", f"report       {folder / 'report.html'}"])


def settings_line(settings: Mapping[str, Any]) -> str:
    """Show the settings in one line, by the last part of their names."""
    return " ".join(f"{name.rpartition('.')[2]}={_plain(value)}" for name, value in sorted(settings.items()))


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def with_objective(trials: Sequence[Row], objective: str) -> list[Row]:
    """Return the finished trials that have the score: a trial of one head has no agreement."""
    finished = [row for row in trials if row["state"] == FINISHED]
    return [row for row in finished if objective == COMBINED or objective in row]


def scores_of(finished: Sequence[Row]) -> list[str]:
    """Return the names of the scores that these trials have, the objectives first, ACC last."""
    order = [*OBJECTIVES, "reliable", "nonempty", "size_entropy", "acc"]
    return [name for name in order if any(name in row for row in finished)]


def goodness(finished: Sequence[Row], objective: str) -> list[float]:
    """Return the objective of every trial, higher is better."""
    if objective == COMBINED:
        return combined(finished).tolist()
    return [OBJECTIVES[objective] * row[objective] for row in finished]


def correlations(finished: Sequence[Row]) -> list[tuple[str, float | None, int]]:
    """Compare the objectives with ACC; empty without ACC.

    Returns:
        (objective, Spearman's correlation with ACC, place by ACC of the trial that it chooses)
    """
    if not finished or not all("acc" in row for row in finished):
        return []
    accuracy = [row["acc"] for row in finished]
    names = [name for name in OBJECTIVES if all(name in row for row in finished)]
    table = []
    for name in [*names, COMBINED]:
        values = goodness(finished, name)
        chosen = accuracy[int(np.argmax(values))]
        table.append((name, spearman(values, accuracy), 1 + sum(other > chosen for other in accuracy)))
    return table


def importances(finished: Sequence[Row], names: Sequence[str], objective: str) -> dict[str, float]:
    """Return the importance of each setting for the trials' places; one failure would dominate scores."""
    places = (-ranks(goodness(finished, objective), +1)).tolist()
    return {name: importance([row["settings"].get(name) for row in finished], places) for name in names}


def facts(trials: Sequence[Row], finished: Sequence[Row]) -> list[tuple[str, str]]:
    """Return (name, value) for the head of the page."""
    states = [row["state"] for row in trials]
    seconds = [row["seconds"] for row in finished]
    counts = [(state, states.count(state)) for state in (FINISHED, STOPPED, FAILED, RUNNING)]
    lines = [(f"Trials {state}", str(count)) for state, count in counts if count or state == FINISHED]
    return [*lines, ("Median trial", duration(float(np.median(seconds))))] if seconds else lines


def best_settings(finished: Sequence[Row], names: Sequence[str], config: dict) -> list[tuple[str, str, str]]:
    """Return (setting, the best trial's value, the value that the sweep started from)."""
    if not finished:
        return []
    before = {name: _looked_up(config, name) for name in names}
    return [(name, short(finished[0]["settings"].get(name)), short(before[name])) for name in names]


def _looked_up(config: Any, name: str) -> Any:
    for key in name.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def short(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return charts.short(value)
    return str(value)


class Axis:
    """Places the values of one setting or score in 0 .. 1: numbers by size, others in order of their names."""

    def __init__(self, name: str, values: Sequence[Any]):
        self.name = name
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        self.logarithmic = numbers and min(values) > 0 and max(values) > 20 * min(values)
        self.names = [] if numbers else sorted({str(value) for value in values})
        if numbers:
            scaled = [self._scaled(value) for value in values]
            self.low, self.high = min(scaled), max(scaled)
            self.ends = [(0.0, short(float(min(values)))), (1.0, short(float(max(values))))]
        else:
            self.ends = [(self.place(value), value) for value in self.names]

    def _scaled(self, value: float) -> float:
        return float(np.log(value)) if self.logarithmic else float(value)

    def place(self, value: Any) -> float:
        if self.names:
            return self.names.index(str(value)) / max(1, len(self.names) - 1)
        return (self._scaled(value) - self.low) / (self.high - self.low) if self.high > self.low else 0.5


def parallel_coordinates(finished: Sequence[Row], names: Sequence[str], objective: str) -> Markup:
    """Draw a line per trial through its settings to its score; better ones are darker, the best one is marked."""
    values = goodness(finished, objective)
    columns = [(name.partition(".")[2] or name, [row["settings"].get(name) for row in finished]) for name in names]
    columns.append((objective, values))
    if all("acc" in row for row in finished):
        columns.append(("ACC", [row["acc"] for row in finished]))
    width, height, left, right, top, bottom = 1040, 380, 40, 60, 46, 26
    axes = [Axis(name, column) for name, column in columns]
    xs = np.linspace(left, width - right, len(axes))

    def y(place: float) -> float:
        return top + (1 - place) * (height - top - bottom)

    parts = []
    worst_first = sorted(range(len(finished)), key=lambda trial: values[trial])
    for place, trial in enumerate(worst_first):
        places = [axis.place(column[trial]) for axis, (_, column) in zip(axes, columns, strict=True)]
        points = [f"{x:.1f} {y(value):.1f}" for x, value in zip(xs, places, strict=True)]
        share = (place + 1) / len(finished)
        look = "trial best" if place == len(finished) - 1 else "trial"
        title = f"Trial {finished[trial]['number']}: {objective} {short(values[trial])}"
        parts.append(
            Markup('<path class="{}" style="opacity:{:.2f}" d="M{}"><title>{}</title></path>').format(
                look, 0.08 + 0.55 * share**2 if look == "trial" else 1.0, "L".join(points), title
            )
        )
    for number, (x, axis) in enumerate(zip(xs, axes, strict=True)):
        parts.append(Markup('<path class="axis" d="M{:.1f} {:.1f}V{:.1f}"/>').format(x, y(1), y(0)))
        # two rows of names: they are long
        name_y = 14 if number % 2 else 30
        parts.append(Markup('<text class="count mid" x="{:.1f}" y="{}">{}</text>').format(x, name_y, axis.name))
        for place, text in axis.ends:
            parts.append(Markup('<text class="tick" x="{:.1f}" y="{:.1f}">{}</text>').format(x + 5, y(place) + 4, text))
    return charts.svg(f"Settings and score of {len(finished)} trials", width, height, parts)


def effect(finished: Sequence[Row], name: str, objective: str) -> Markup:
    """Draw the score of every trial over one setting."""
    values = goodness(finished, objective)
    settings = [row["settings"].get(name) for row in finished]
    across, up = Axis(name, settings), Axis(objective, values)
    width, height, left, right, top, bottom = 320, 190, 50, 16, 12, 30

    def x(place: float) -> float:
        return left + 14 + place * (width - left - right - 28)

    def y(place: float) -> float:
        return top + (1 - place) * (height - top - bottom)

    parts = [Markup('<path class="axis" d="M{} {}H{}"/>').format(left, height - bottom + 6, width - right)]
    for row, setting, value in zip(finished, settings, values, strict=True):
        parts.append(
            Markup(
                '<circle class="dot mark" cx="{:.1f}" cy="{:.1f}" r="3.4"><title>Trial {}: {}</title></circle>'
            ).format(x(across.place(setting)), y(up.place(value)), row["number"], short(value))
        )
    for place, text in across.ends:
        parts.append(Markup('<text class="tick mid" x="{:.1f}" y="{}">{}</text>').format(x(place), height - 6, text))
    for place, text in up.ends:
        parts.append(Markup('<text class="tick end" x="{}" y="{:.1f}">{}</text>').format(left, y(place) + 4, text))
    return charts.svg(f"{objective} over {name}", width, height, parts)
