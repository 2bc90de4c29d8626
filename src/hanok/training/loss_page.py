"""A training's losses as a page: one file that opens from disk and asks no one for anything.

Where matplotlib is installed the plot is a PNG file too.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hanok.checkpoint.writer import write_bytes

TEMPLATE = Path(__file__).with_name("loss.html")
PAGE, PICTURE = "loss.html", "loss.png"
WIDTH, LEFT, RIGHT = 860, 56, 16
TOP, LOSS_HEIGHT, RATE_TOP, RATE_HEIGHT = 12, 300, 348, 84
HEIGHT = RATE_TOP + RATE_HEIGHT + 30
MOST_POINTS = 1000
"""Points of a line: of longer trainings each is the mean of several steps."""
MOST_TICKS = 6

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """What is drawn, each as (step, value)."""

    loss: Points
    held_out: Points
    learning_rate: Points

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> "Curves":
        """Return what the lines of a log say."""

        def named(name: str) -> Points:
            return [
                (float(line["step"]), float(line[name]))
                for line in kept
                if isinstance(line.get(name), int | float) and math.isfinite(line[name])
            ]

        kept = list(lines)
        return cls(
            loss=_thinned(named("loss")),
            held_out=named("held_out_loss"),
            learning_rate=_thinned(named("learning_rate")),
        )


def write_plots(output: Path, title: str, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write the page of a log's lines below an output folder, and the picture if there is matplotlib."""
    curves = Curves.of(lines)
    write_bytes(output / PAGE, page_of(title, curves).encode())
    if curves.loss and find_spec("matplotlib") is not None:
        _write_picture(output / PICTURE, title, curves)


def page_of(title: str, curves: Curves) -> str:
    """Return the page."""
    facts = []
    if curves.loss:
        facts.append(f"{curves.loss[-1][0]:,.0f} steps")
        facts.append(f"loss {curves.loss[0][1]:.4f} at first, {curves.loss[-1][1]:.4f} in the end")
    if curves.held_out:
        first, last = curves.held_out[0][1], curves.held_out[-1][1]
        facts.append(f"held out {first:.4f} at first, {last:.4f} in the end")
    text = TEMPLATE.read_text(encoding="utf-8")
    values = {"TITLE": escape(title), "FACTS": escape("; ".join(facts)), "PLOT": _plot(curves)}
    for name, value in values.items():
        text = text.replace(f"<!--{name}-->", value)
    return text


def _plot(curves: Curves) -> str:
    if not curves.loss:
        return "<p>No step has been done yet.</p>"
    steps = [step for line in (curves.loss, curves.held_out) for step, _ in line]
    losses = [loss for line in (curves.loss, curves.held_out) for _, loss in line]
    rates = [rate for _, rate in curves.learning_rate]
    across = _Scale(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    down = _Scale(min(losses), max(losses), TOP + LOSS_HEIGHT, TOP)
    rate = _Scale(0.0, max(rates, default=0.0), RATE_TOP + RATE_HEIGHT, RATE_TOP)
    marks = "".join(
        f'<circle class="held" cx="{across(x):.1f}" cy="{down(y):.1f}" r="3">'
        f"<title>step {x:.0f}: {y:.4f} held out</title></circle>"
        for x, y in curves.held_out
    )
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Loss and learning rate by step">',
        _rows(down, "loss", TOP),
        _rows(rate, "learning rate", RATE_TOP, most=2),
        _columns(across),
        _line("loss", curves.loss, across, down),
        _line("held", curves.held_out, across, down),
        marks,
        _line("rate", curves.learning_rate, across, rate),
        "</svg>",
    ]
    return "\n".join(parts)


class _Scale:
    """From values to places of the drawing."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, high if high > low else low + (abs(low) or 1.0)
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self._start + share * (self._end - self._start)

    def ticks(self, most: int) -> list[float]:
        """Return round values within the scale, at most about so many."""
        raw = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * size for size in (1, 2, 5, 10) if power * size >= raw)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def _rows(scale: _Scale, name: str, top: float, most: int = MOST_TICKS) -> str:
    lines = "".join(
        f'<path class="grid" d="M{LEFT} {scale(value):.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 8}" y="{scale(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>'
        for value in scale.ticks(most)
    )
    place = f'x="{WIDTH - RIGHT}" y="{top + 12}" text-anchor="end"'
    return f'{lines}<text class="name" {place}>{name}</text>'


def _columns(scale: _Scale) -> str:
    below = RATE_TOP + RATE_HEIGHT + 18
    return "".join(
        f'<text x="{scale(value):.1f}" y="{below}" text-anchor="middle">{value:,.0f}</text>'
        for value in scale.ticks(2 * MOST_TICKS)
        if value == round(value)
    )


def _line(name: str, points: Points, across: _Scale, down: _Scale) -> str:
    places = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
    return f'<polyline class="{name}" points="{places}"/>'


def _thinned(points: Points) -> Points:
    """Return at most MOST_POINTS points: the first and the last, between them means of several."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return points
    inner = points[1:-1]
    groups = [inner[i : i + size] for i in range(0, len(inner), size)]
    means = [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
    return [points[0], *means, points[-1]]


def _write_picture(path: Path, title: str, curves: Curves) -> None:
    # Imported here: it is optional, and takes a second.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    losses.plot(*zip(*curves.loss, strict=True), label="training", linewidth=1.2)
    if curves.held_out:
        losses.plot(*zip(*curves.held_out, strict=True), "o-", label="held out", markersize=4)
    losses.set(ylabel="loss", title=title)
    losses.legend()
    if curves.learning_rate:
        rates.plot(*zip(*curves.learning_rate, strict=True), color="tab:gray", linewidth=1.2)
    rates.set(xlabel="step", ylabel="learning rate")
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
