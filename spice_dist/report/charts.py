"""Draw charts as inline SVG without scripts; colours come from the page's style sheet and follow dark mode.

Every text goes through `Markup.format`, which escapes it.
"""

import math

import numpy as np
from markupsafe import Markup

from spice_dist.report.reading import Curve

NUM_COLOURS = 8  # .c0 .. .c7 in template.html, which colour-blind people can distinguish
SHAPES = ("circle", "square", "triangle", "diamond")  # clusters from 8 on take the next shapes
MAX_POINTS = 240  # per curve; longer ones are averaged, with the range shown behind


def ticks(low: float, high: float, count: int) -> np.ndarray:
    """Return about `count` round numbers (1, 2 or 5 times a power of ten) within low .. high, at least two."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if last - first < 1:
        return ticks(low, high, 2 * count + 1)
    return np.arange(first, last + 1) * step


def tick_texts(values: np.ndarray) -> list[str]:
    """Format all values with the same number of decimals; k and M are thousands and millions."""
    largest = float(np.abs(values).max(initial=0.0))
    step = float(values[1] - values[0]) if len(values) > 1 else (largest or 1.0)
    scale, unit = next(((s, u) for s, u in ((1e6, "M"), (1e4, "k")) if largest >= s), (1.0, ""))
    scale = 1e3 if unit == "k" else scale
    if largest >= 1e10 or 0 < largest < 1e-3:
        return [f"{v:.0e}" if v else "0" for v in values.tolist()]
    decimals = max(0, -math.floor(math.log10(step / scale) + 1e-9))
    return [f"{v / scale:.{decimals}f}{unit}".replace("-", "−") if v else "0" for v in values.tolist()]


def short(value: float) -> str:
    """Format a number with four significant digits."""
    if value and (abs(value) >= 1e7 or abs(value) < 1e-3):
        return f"{value:.2e}".replace("-", "−")
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def line_chart(curve: Curve, name: str, width: int, height: int, beside: Curve | None = None) -> Markup:
    """Draw a curve over steps, with gaps where the value is not finite; `beside` is dotted, for comparison."""
    known = np.isfinite(curve.values)
    if not known.any():
        return Markup('<p class="muted">{}: no finite values.</p>').format(name)
    curve = Curve(curve.steps.clip(-1e30, 1e30), np.where(known, curve.values.clip(-1e30, 1e30), np.nan))
    groups = np.array_split(np.arange(len(curve.steps)), min(len(curve.steps), MAX_POINTS))
    averaged = len(curve.steps) > MAX_POINTS
    points = [
        (curve.steps[g].mean(), curve.values[g].mean(), curve.values[g].min(), curve.values[g].max()) for g in groups
    ]
    x_low, x_high = _range(curve.steps[0], curve.steps[-1], 0.0)
    values = curve.values[known] if beside is None else np.concatenate([curve.values[known], beside.values])
    y_low, y_high = _range(np.nanmin(values), np.nanmax(values), 0.06)
    left, right, top, bottom = 50, 14, 10, 30

    def x(step: float) -> float:
        return left + (step - x_low) / (x_high - x_low) * (width - left - right)

    def y(value: float) -> float:
        return top + (y_high - value) / (y_high - y_low) * (height - top - bottom)

    parts = []
    y_ticks = ticks(y_low, y_high, max(2, height // 48))
    for value, text in zip(y_ticks.tolist(), tick_texts(y_ticks), strict=True):
        parts.append(
            Markup('<path class="grid" d="M{} {:.1f}H{}"/><text class="tick end" x="{}" y="{:.1f}">{}</text>').format(
                left, y(value), width - right, left - 8, y(value) + 4, text
            )
        )
    x_ticks = ticks(x_low, x_high, max(2, width // 110))
    for value, text in zip(x_ticks.tolist(), tick_texts(x_ticks), strict=True):
        parts.append(Markup('<text class="tick mid" x="{:.1f}" y="{}">{}</text>').format(x(value), height - 11, text))
    parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(left, height - bottom, width - right))
    if beside is not None:
        dots = [f"{x(s):.1f} {y(v):.1f}" for s, v in zip(beside.steps, beside.values, strict=True) if np.isfinite(v)]
        parts.append(Markup('<path class="reference" d="M{}"/>').format("L".join(dots)))
    for piece in _pieces(points):
        if averaged:
            over = [f"{x(s):.1f} {y(high):.1f}" for s, _, _, high in piece]
            under = [f"{x(s):.1f} {y(low):.1f}" for s, _, low, _ in reversed(piece)]
            parts.append(Markup('<path class="band" d="M{}Z"/>').format("L".join(over + under)))
        if len(piece) == 1:
            parts.append(
                Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(x(piece[0][0]), y(piece[0][1]))
            )
        else:
            line = "L".join(f"{x(s):.1f} {y(mean):.1f}" for s, mean, _, _ in piece)
            parts.append(Markup('<path class="line" d="M{}"/>').format(line))
    last = float(curve.values[known][-1])
    title = f"{name} over {len(curve.steps):,} records up to step {curve.steps[-1]:,.0f}; last value {short(last)}"
    return svg(title, width, height, parts)


def size_chart(sizes: np.ndarray, reliable: np.ndarray, order: np.ndarray) -> Markup:
    """Draw one bar per cluster in this order, its reliable part in the strong colour, with a link to its gallery."""
    width, height = 1040, 250
    left, right, top, bottom = 50, 10, 22, 34
    highest = max(1.0, float(sizes.max()) * 1.04)
    slot = (width - left - right) / len(order)
    bar = max(0.8, min(64.0, slot * (0.74 if slot > 6 else 0.9)))

    def y(value: int | float) -> float:
        return top + (highest - value) / highest * (height - top - bottom)

    parts = []
    y_ticks = ticks(0.0, highest, 4)
    y_ticks = y_ticks[y_ticks == np.round(y_ticks)]
    for value, text in zip(y_ticks.tolist(), tick_texts(y_ticks), strict=True):
        parts.append(
            Markup('<path class="grid" d="M{} {:.1f}H{}"/><text class="tick end" x="{}" y="{:.1f}">{}</text>').format(
                left, y(value), width - right, left - 8, y(value) + 4, text
            )
        )
    every = 1 if slot >= 24 else math.ceil(len(order) / (24 if slot >= 6 else 12))
    for place, cluster in enumerate(order.tolist()):
        size, num_reliable = int(sizes[cluster]), int(reliable[cluster])
        middle = left + (place + 0.5) * slot
        parts.append(
            Markup(
                '<a href="#cluster-{}"><title>Cluster {}: {:,} images, {:,} reliable</title>'
                '<rect class="hit" x="{:.1f}" y="{}" width="{:.1f}" height="{}"/>'
                '<rect class="bar weak" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
                '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/></a>'
            ).format(
                *(cluster, cluster, size, num_reliable),
                *(middle - slot / 2, top, slot, height - top - bottom),
                *(middle - bar / 2, y(size), bar, y(num_reliable) - y(size)),
                *(middle - bar / 2, y(num_reliable), bar, y(0) - y(num_reliable)),
            )
        )
        if slot >= 34:
            parts.append(
                Markup('<text class="count mid" x="{:.1f}" y="{:.1f}">{:,}</text>').format(middle, y(size) - 6, size)
            )
        if place % every == 0:
            parts.append(
                Markup('<text class="tick mid" x="{:.1f}" y="{}">{}</text>').format(
                    middle, height - bottom + 17, cluster
                )
            )
    even = float(sizes.sum()) / len(sizes)
    parts.append(Markup('<path class="axis" d="M{} {:.1f}H{}"/>').format(left, y(0), width - right))
    parts.append(
        Markup('<path class="reference" d="M{} {:.1f}H{}"><title>All of one size: {} images</title></path>').format(
            left, y(even), width - right, short(even)
        )
    )
    title = f"Sizes of {len(sizes)} clusters, from {sizes.min():,} to {sizes.max():,} images"
    return svg(title, width, height, parts, role="group")  # bars are links, which an image may not hold


def feature_map(points: np.ndarray, labels: np.ndarray, name_clusters: bool) -> Markup:
    """Draw points (n, 2) as marks by cluster, on equal scales, with the cluster's number at its median."""
    width = 700
    low, high = points.min(axis=0), points.max(axis=0)
    span = np.maximum(high - low, 1e-9)
    height = int(np.clip(width * span[1] / span[0], width * 0.6, width * 0.8))
    scale = min((width - 32) / span[0], (height - 32) / span[1])
    flipped = (points - (low + high) / 2) * [scale, -scale] + [width / 2, height / 2]
    parts = []
    for cluster in np.unique(labels).tolist():
        members = flipped[labels == cluster]
        marks = "".join(_mark(cluster, px, py, 2.9) for px, py in members.tolist())
        parts.append(
            Markup('<path class="mark {}" d="{}"><title>Cluster {}</title></path>').format(
                _look(cluster), marks, cluster
            )
        )
    if name_clusters:
        for cluster in np.unique(labels).tolist():
            middle = np.median(flipped[labels == cluster], axis=0)
            parts.append(
                Markup('<text class="name mid" x="{:.1f}" y="{:.1f}">{}</text>').format(
                    middle[0], middle[1] + 5, cluster
                )
            )
    title = f"Map of {len(points):,} images by the two main directions of their features, coloured by cluster"
    return svg(title, width, height, parts)


def cluster_mark(cluster: int) -> Markup:
    """Draw the colour and shape of a cluster, for legends and headings."""
    return Markup(
        '<svg class="key" viewBox="0 0 14 14" width="14" height="14" aria-hidden="true">'
        '<path class="mark {}" d="{}"/></svg>'
    ).format(_look(cluster), _mark(cluster, 7.0, 7.0, 5.0))


def _look(cluster: int) -> str:
    return f"c{cluster % NUM_COLOURS}"


def _mark(cluster: int, x: float, y: float, r: float) -> str:
    """Return a closed path around x, y; all shapes have about the same area."""
    match SHAPES[cluster // NUM_COLOURS % len(SHAPES)]:
        case "square":
            return f"M{x - r * 0.88:.1f} {y - r * 0.88:.1f}h{r * 1.76:.1f}v{r * 1.76:.1f}h{-r * 1.76:.1f}z"
        case "triangle":
            return f"M{x:.1f} {y - r * 1.3:.1f}l{r * 1.25:.1f} {r * 2.15:.1f}h{-r * 2.5:.1f}z"
        case "diamond":
            d = r * 1.25
            return f"M{x:.1f} {y - d:.1f}l{d:.1f} {d:.1f}l{-d:.1f} {d:.1f}l{-d:.1f} {-d:.1f}z"
    return f"M{x - r:.1f} {y:.1f}a{r:.1f} {r:.1f} 0 1 0 {2 * r:.1f} 0a{r:.1f} {r:.1f} 0 1 0 {-2 * r:.1f} 0z"


def _range(low: float, high: float, pad: float) -> tuple[float, float]:
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-30):
        half = max(abs(high) * 0.05, 1e-30) if high else 0.5
        return low - half, high + half
    return low - (high - low) * pad, high + (high - low) * pad


def _pieces(points: list[tuple]) -> list[list[tuple]]:
    """Return the runs of points whose value is finite."""
    pieces, piece = [], []
    for point in points:
        if math.isfinite(point[1]):
            piece.append(point)
        elif piece:
            pieces.append(piece)
            piece = []
    return [*pieces, piece] if piece else pieces


def svg(title: str, width: int, height: int, parts: list[Markup], role: str = "img") -> Markup:
    return Markup('<svg class="chart" role="{}" aria-label="{}" viewBox="0 0 {} {}">{}</svg>').format(
        role, title, width, height, Markup("").join(parts)
    )
