"""Pictures of a report as SVG that takes its colours and its font from the page, drawn by matplotlib.

The same figures give the same bytes. matplotlib is imported where it draws, so that the command line starts fast.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from embedistill.report.parts import About, Figure
from embedistill.report.wording import Roles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_WIDTH, _FONT = 400.0, 11.0  # in points, which are the page's pixels: readable on a phone, where it is a little smaller
_ROW = 34.0
_INK, _LINE = "#010203", "#010204"
_SERIES = [f"#0103{number:02x}" for number in range(7)]
_COLOURS = {
    _INK: "currentColor",
    _LINE: "var(--line)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES)},
}
"""Colours that matplotlib is given, and what the page has in their place."""
_MARKERS = ["s", "^", "D", "v", "P", "X", "<", ">"]
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_POINTS = 300  # of a curve: of more, means are drawn
_BEYOND, _MOST = 0.2, 1.5  # how far from the judged the scale goes, and how far at all


@dataclass(frozen=True)
class Look:
    """What a model is called and how it looks, in all pictures."""

    name: str
    colour: str
    marker: str


@dataclass(frozen=True)
class Row:
    """One row of a picture of intervals.

    Attributes:
        label: What stands above it.
        note: What stands above it at the right.
        intervals: Lower end, value and upper end by model.
        marks: Values of further models.
    """

    label: str
    note: str
    intervals: Mapping[str, tuple[float, float, float]]
    marks: Mapping[str, float] = field(default_factory=dict)


def assign_looks(roles: Roles) -> dict[str, Look]:
    """Return a colour and a shape for each model."""
    looks = {role: Look(roles.names[role], _INK, "*") for role in roles.teacher}
    for number, role in enumerate(roles.judged + roles.others):
        marker = "o" if role in roles.judged else _MARKERS[(number - len(roles.judged)) % len(_MARKERS)]
        looks[role] = Look(roles.names[role], _SERIES[number % len(_SERIES)], marker)
    return looks


def draw_intervals(
    about: About,
    rows: Sequence[Row],
    *,
    looks: Mapping[str, Look],
    threshold: float | None = None,
) -> Figure:
    """Draw shares as points with intervals, a row each, under each other.

    Args:
        about: What the picture is called, and what it shows.
        rows: From top to bottom.
        looks: Of the models.
        threshold: Where a dashed line stands.
    """
    shown = list(dict.fromkeys(model for row in rows for model in [*row.intervals, *row.marks]))
    legend = shown if len(shown) > 1 else []
    low, high = _find_limits(rows, threshold)
    with _drawing(about.name):
        bottom = 34 + 16 * math.ceil(len(legend) / 2)
        canvas, axes = _make_canvas(len(rows) * _ROW + bottom + 8, left=6, right=6, top=8, bottom=bottom)
        axes.set_xlim(low, high)
        axes.set_ylim(-len(rows) + 0.4, 0.75)
        lowest, highest = ([-number + end for number in range(len(rows))] for end in (-0.42, 0.04))
        axes.vlines([1.0] * len(rows), lowest, highest, color=_INK, linewidth=1)
        if threshold is not None:
            axes.vlines([threshold] * len(rows), lowest, highest, color=_INK, linewidth=1, linestyle=(0, (2, 2)))
        for number, row in enumerate(rows):
            _draw_row(axes, -number, row, looks)
        _label_shares(axes)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        _draw_legend(canvas, [looks[model] for model in legend])
        return _finish(canvas, about)


def draw_tradeoff(
    about: About,
    points: Mapping[str, tuple[float, float]],
    *,
    looks: Mapping[str, Look],
    cost: str,
    less_is_better: bool,
) -> Figure:
    """Draw models by what they cost, on a logarithmic scale, and what they keep; a line joins those that none beats.

    Args:
        about: What the picture is called, and what it shows.
        points: Cost and share by model.
        looks: Of the models.
        cost: Name of the scale.
        less_is_better: Whether a cost is paid, or a speed is had.
    """
    with _drawing(about.name):
        canvas, axes = _make_canvas(280, left=44, right=10, top=10, bottom=40)
        costs, shares = zip(*points.values(), strict=True)
        axes.set_xscale("log")
        axes.set_xlim(min(costs) / 1.5, max(costs) * 1.5)
        margin = 0.14 * ((max(shares) - min(shares)) or 0.1)
        axes.set_ylim(min(shares) - margin, max(shares) + margin)
        ticks = _list_ticks(*axes.get_xlim())
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(color=_LINE, linewidth=0.6)
        axes.set_xlabel(cost)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        front = _find_front(points, less_is_better)
        axes.plot(*zip(*front, strict=True), color=_INK, linewidth=0.8, linestyle=(0, (1, 2)))
        for model, (x, y) in points.items():
            axes.plot([x], [y], color=looks[model].colour, marker=looks[model].marker, markersize=8, linestyle="")
        _label_points(axes, points, looks)
        return _finish(canvas, about)


def draw_histograms(
    about: About,
    edges: Sequence[float],
    shares: Mapping[str, Sequence[float]],
    *,
    looks: Mapping[str, Look],
) -> Figure:
    """Draw distributions over each other, the first one filled.

    Args:
        about: What the picture is called, and what it shows.
        edges: Of the bins.
        shares: By model, one a bin.
        looks: Of the models.
    """
    filled = [number for number in range(len(edges) - 1) if any(some[number] for some in shares.values())]
    first, last = (filled[0], filled[-1] + 1) if filled else (0, len(edges) - 1)
    with _drawing(about.name):
        canvas, axes = _make_canvas(240, left=44, right=10, top=10, bottom=60)
        for number, (model, some) in enumerate(shares.items()):
            colour = looks[model].colour
            if number == 0:
                axes.stairs(some, edges, color=colour, fill=True, alpha=0.18, linewidth=0)
            axes.stairs(some, edges, color=colour, linewidth=1.6, baseline=None)
        axes.set_xlim(edges[first], edges[last])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("cosine of two different texts")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        _draw_legend(canvas, [replace(looks[model], marker="") for model in shares])
        return _finish(canvas, about)


def draw_curve(about: About, steps: Sequence[float], values: Sequence[float]) -> Figure:
    """Draw values over steps, on a logarithmic scale where they span more than a factor of twenty.

    Args:
        about: What the picture is called, and what it shows.
        steps: Of the training.
        values: Finite ones.
    """
    with _drawing(about.name):
        canvas, axes = _make_canvas(170, width=300, left=46, right=10, top=8, bottom=36)
        few = len(values) < 25
        x, y = _thin(steps), _thin(values)
        axes.plot(x, y, color=_SERIES[0], linewidth=1.5, marker="o" if few else "", markersize=3.5)
        if min(y) > 0 and max(y) > 20 * min(y):
            axes.set_yscale("log")
            axes.set_yticks(_list_ticks(*axes.get_ylim()))
            axes.minorticks_off()
        else:
            axes.locator_params(axis="y", nbins=5)
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(color=_LINE, linewidth=0.6)
        axes.set_xlabel("step")
        return _finish(canvas, about)


def draw_bars(about: About, bars: Sequence[tuple[str, float]]) -> Figure:
    """Draw numbers as bars under each other.

    Args:
        about: What the picture is called, and what it shows.
        bars: A name and a number each, from top to bottom.
    """
    with _drawing(about.name):
        canvas, axes = _make_canvas(len(bars) * _ROW + 8, left=2, right=2, top=8, bottom=0)
        for number, (text, value) in enumerate(bars):
            axes.barh([-number - 0.2], [value], height=0.32, color=_SERIES[0])
            _write(axes, -number, text, f"{value:,.0f}", above=0.05)
        axes.set_xlim(0, max(1, *(value for _, value in bars)))
        axes.set_ylim(-len(bars) + 0.4, 0.6)
        axes.set_axis_off()
        return _finish(canvas, about)


@contextmanager
def _drawing(name: str) -> Iterator[None]:
    """Draw by matplotlib's own settings and ours, whatever the user's are, and leave those as they were."""
    import matplotlib

    settings: dict[Any, Any] = {
        "font.size": _FONT,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,  # a dollar sign in a name is one
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.edgecolor": _LINE,
        "legend.frameon": False,
        **dict.fromkeys(["text.color", "axes.labelcolor", "xtick.color", "ytick.color"], _INK),
        **dict.fromkeys(["axes.facecolor", "figure.facecolor"], "none"),
    }
    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's font has it
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield


def _make_canvas(
    height: float, *, left: float, right: float, top: float, bottom: float, width: float = _WIDTH
) -> tuple[Canvas, Axes]:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(width / 72, height / 72))
    inner = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    return canvas, canvas.add_axes(inner)


def _draw_row(axes: Axes, place: float, row: Row, looks: Mapping[str, Look]) -> None:
    _write(axes, place, row.label, row.note, above=0.14)
    axes.axhline(place - 0.18, color=_LINE, linewidth=0.6, zorder=0.5)
    for model, value in row.marks.items():
        _mark(axes, value, place - 0.18, looks[model], markersize=5, alpha=0.75)
    for number, (model, (lower, value, upper)) in enumerate(row.intervals.items()):
        line = place - 0.18 - 0.16 * (number - (len(row.intervals) - 1) / 2)
        axes.plot([lower, upper], [line] * 2, color=looks[model].colour, linewidth=3, solid_capstyle="butt", zorder=3)
        _mark(axes, value, line, looks[model], markersize=6.5, zorder=4)


def _mark(axes: Axes, value: float, line: float, look: Look, **style: Any) -> None:
    """Mark a value, or at the end of the scale that it is further out."""
    low, high = axes.get_xlim()
    marker = ">" if value > high else "<" if value < low else look.marker
    axes.plot([min(max(value, low), high)], [line], marker, color=look.colour, clip_on=False, **style)


def _find_limits(rows: Sequence[Row], threshold: float | None) -> tuple[float, float]:
    """Return a scale that has all intervals, and the other marks that are not too far from them."""
    wanted = [1.0, *([] if threshold is None else [threshold])]
    wanted += [end for row in rows for interval in row.intervals.values() for end in interval]
    marks = [value for row in rows for value in row.marks.values()]
    low, high = min(wanted), max(wanted)
    low = max(0.0, low - _BEYOND, min([low, *marks]))
    high = min(_MOST, high + _BEYOND / 2, max([high, *marks]))
    space = 0.03 * (high - low)
    return low - space, high + space


def _write(axes: Axes, place: float, left: str, right: str, above: float) -> None:
    room = 62 - len(right)
    transform = axes.get_yaxis_transform()
    axes.text(0, place + above, _clean(left, room), transform=transform, va="baseline")
    axes.text(1, place + above, _clean(right, 40), transform=transform, va="baseline", ha="right")


def _label_shares(axes: Axes) -> None:
    axes.locator_params(axis="x", nbins=7)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")


def _draw_legend(canvas: Canvas, looks: Sequence[Look]) -> None:
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=look.colour, marker=look.marker, linestyle="" if look.marker else "-", markersize=6)
        for look in looks
    ]
    if looks:
        names = [_clean(look.name, 28) for look in looks]
        canvas.legend(
            lines,
            names,
            loc="lower left",
            ncols=2,
            borderaxespad=0,
            columnspacing=1.5,
            labelspacing=0.4,
            handlelength=1.2,
        )


def _label_points(axes: Axes, points: Mapping[str, tuple[float, float]], looks: Mapping[str, Look]) -> None:
    """Write each model's name beside its point, a line further down where another stands there."""
    places = {model: axes.transData.transform(point) * 72 / axes.figure.dpi for model, point in points.items()}
    taken = [(x - 6, x + 6, y) for x, y in places.values()]
    for model in sorted(places, key=lambda model: (-places[model][1], model)):
        x, y = (float(value) for value in places[model])
        text = _clean(looks[model].name, 28)
        left = x < _WIDTH / 2
        start, end = (x + 9, x + 9 + 6.5 * len(text)) if left else (x - 9 - 6.5 * len(text), x - 9)
        line = y
        while any(start < other_end and other < end and abs(line - at) < 11 for other, other_end, at in taken):
            line -= 4
        taken.append((start, end, line))
        axes.annotate(
            text,
            points[model],
            xytext=(9 if left else -9, line - y),
            textcoords="offset points",
            ha="left" if left else "right",
            va="center",
        )


def _find_front(points: Mapping[str, tuple[float, float]], less_is_better: bool) -> list[tuple[float, float]]:
    """Return the points that no other is better than in both, from left to right."""
    sign = -1 if less_is_better else 1
    ordered = sorted(points.values(), key=lambda point: (-sign * point[0], -point[1]))
    front: list[tuple[float, float]] = []
    for point in ordered:
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return sorted(front)


def _list_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten, the powers alone where that is too many, or the middle where none is."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    ticks = [times * power for power in powers for times in (1, 2, 5) if low <= times * power <= high]
    if not ticks:
        return [float(f"{math.sqrt(low * high):.2g}")]
    return ticks if len(ticks) < 7 else [power for power in powers if low <= power <= high]


def _thin(values: Sequence[float]) -> list[float]:
    size = math.ceil(len(values) / _POINTS)
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    return [sum(part) / len(part) for part in parts]


def _clean(text: str, longest: int) -> str:
    """Return a text as one line of letters that XML may hold, cut where it is too long."""
    line = "".join(letter for letter in " ".join(text.split()) if letter.isprintable())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def _finish(canvas: Canvas, about: About) -> Figure:
    stream = io.BytesIO()
    canvas.savefig(stream, format="svg", metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"]))
    root = ElementTree.fromstring(stream.getvalue())  # noqa: S314 - matplotlib wrote it
    for part in root.findall(f"{_SVG}metadata") + [part for part in root if part.find(f"{_SVG}style") is not None]:
        root.remove(part)
    for element in root.iter():
        _settle(element, about.name)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": about.label}
    return Figure(about, Markup(ElementTree.tostring(root, encoding="unicode")))  # noqa: S704 - it has escaped the text


def _settle(element: ElementTree.Element, name: str) -> None:
    """Give an element of a picture a place on a page: ids of its own, colours of the page, no namespace."""
    element.tag = element.tag.removeprefix(_SVG)
    for key, value in list(element.attrib.items()):
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif key == _LINK:
            del element.attrib[key]
            element.set("href", f"#{name}-{value[1:]}")
        else:
            element.set(key, _use_colours(value.replace("url(#", f"url(#{name}-")))


def _use_colours(value: str) -> str:
    return re.sub("#[0-9a-f]{6}", lambda found: _COLOURS.get(found[0], found[0]), value)
