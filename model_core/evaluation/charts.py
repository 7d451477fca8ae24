"""Line charts as SVG: small, without scripts, coloured by the page around them."""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 26  # margins
NUM_TICKS = 4


def line_chart(points: Sequence[tuple[float, float]], *, label: str) -> str:
    """An SVG of (x, y) points with ticks on both axes; a running mean lies over noisy points. Values that are not finite are left out."""
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return ""
    ticks = nice_ticks(min(y for _, y in points), max(y for _, y in points))
    low, high = ticks[0], ticks[-1]
    last = max(x for x, _ in points) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (WIDTH - LEFT - RIGHT) * x / last, TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">']
    for tick in ticks:
        y = place(0, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x = place(last * share, low)[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{last * share:,.0f}</text>')
    smooth = running_mean([y for _, y in points], max(1, len(points) // 12))
    if len(points) > 12:
        parts.append(f'<path class="raw" d="{_path([place(*point) for point in points])}"/>')
    parts.append(f'<path class="line" d="{_path([place(x, y) for (x, _), y in zip(points, smooth, strict=True)])}"/>')
    x, y = place(points[-1][0], smooth[-1])
    parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/></svg>')
    return "".join(parts)


def nice_ticks(low: float, high: float) -> list[float]:
    """Round numbers, evenly apart, that enclose [low, high]; at least two."""
    if high <= low:
        high = low + max(abs(low), 1.0) * 0.1
    rough = (high - low) / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Means over up to `reach` neighbours on either side, as many on one as on the other."""
    means = []
    for index in range(len(values)):
        width = min(reach, index, len(values) - 1 - index)
        window = values[index - width : index + width + 1]
        means.append(sum(window) / len(window))
    return means


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
