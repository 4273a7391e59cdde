"""The charts of a page, as figures of Bokeh. Colours read well on white and on black.

Bokeh is imported when a chart is made.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedrevive_jax.pages.document import plain
from fedrevive_jax.pages.series import Binned, PoolCounts, Row, Timeline, column

PALETTE = (
    "#3b8fd1", "#f07f1f", "#35a853", "#e0483f", "#9a6fd0",
    "#a5714f", "#e065b4", "#8a8f96", "#b0a91d", "#17b3c4",
)  # fmt: skip
# Names on an axis beyond this many would cover each other.
MOST_NAMES = 62


def color(position: int) -> str:
    return PALETTE[position % len(PALETTE)]


def _style(position: int) -> dict[str, str]:
    """Of a line: ten colours, then the same ten dashed, then dotted."""
    dash = ("solid", "dashed", "dotted")[position // len(PALETTE) % 3]
    return {"color": color(position), "line_dash": dash}


def _small(*arrays: Any) -> list[np.ndarray]:
    """As float32, which is exact enough for a screen and half the size."""
    return [np.asarray(array, np.float32) for array in arrays]


def source_of(**columns: Any) -> Any:
    """Columns of numbers that several curves may share."""
    from bokeh.models import ColumnDataSource

    return ColumnDataSource(dict(zip(columns, _small(*columns.values()), strict=True)))


def _figure(name: str, title: str, x: str, y: str, height: int = 300, **fields: Any) -> Any:
    from bokeh.models import DataRange1d
    from bokeh.plotting import figure

    # What is hidden does not count for the range.
    fields.setdefault("x_range", DataRange1d(only_visible=True, range_padding=0.02))
    fields.setdefault("y_range", DataRange1d(only_visible=True))
    chart = figure(
        name=name,
        title=plain(title),
        x_axis_label=plain(x),
        y_axis_label=plain(y),
        height=height,
        sizing_mode="stretch_width",
        tools="pan,box_zoom,wheel_zoom,reset,save",
        **fields,
    )
    chart.toolbar.logo = None
    chart.min_border_left = 60  # one above the other they agree
    return chart


def _hover(chart: Any, renderers: Sequence[Any], **told: str) -> None:
    from bokeh.models import HoverTool

    tips = [(plain(name.replace("_", " ")), field) for name, field in told.items()]
    chart.add_tools(HoverTool(renderers=list(renderers), tooltips=tips))


def _legend(chart: Any) -> None:
    """Beside the curves, which a click on it hides."""
    chart.add_layout(chart.legend[0], "right")
    chart.legend.click_policy = "hide"
    chart.legend.background_fill_alpha = 0
    chart.legend.border_line_color = None


def accuracy(
    name: str,
    title: str,
    x: str,
    curves: Mapping[str, tuple[Any, Any, Any]],
    seeds: Sequence[tuple[str, int, Any]],
    places: Mapping[str, int],
) -> Any:
    """Mean accuracy by label with a band of one deviation, and the curves of its seeds.

    Args:
      name: of the chart, and the column of the seeds' sources that is its axis.
      title: of the chart.
      x: what the axis is.
      curves: by label, places, mean and deviation; tagged `method:LABEL` and `seed:mean`.
      seeds: label, seed, source with a column `accuracy`; tagged `method:LABEL` and `seed:SEED`.
      places: of the labels among the colours.
    """
    chart = _figure(name, title, x, "accuracy", 420)
    lines = []
    for label, seed, source in seeds:
        style = _style(places[label])
        line = chart.step(name, "accuracy", source=source, mode="after", alpha=0.7, **style)
        line.name = plain(f"{label}, seed {seed}")
        line.tags = [f"method:{label}", f"seed:{seed}"]
        lines.append(line)
    for label, (at, mean, deviation) in curves.items():
        told = source_of(x=at, y=mean, low=mean - deviation, high=mean + deviation)
        band = chart.varea("x", "low", "high", source=told, alpha=0.15, color=color(places[label]))
        line = chart.line("x", "y", source=told, line_width=2, **_style(places[label]))
        line.name = plain(label)
        band.tags = line.tags = [f"method:{label}", "seed:mean"]
        lines.append(line)
    _hover(chart, lines, curve="$name", at="$x{0.[00]}", accuracy="$snap_y{0.0000}")
    return chart


def shares(
    name: str, title: str, x: str, curves: Mapping[str, tuple[Any, Any]], places: Mapping[str, int]
) -> Any:
    """By label, the share that is at most so large; tagged `method:LABEL`."""
    chart = _figure(name, title, x, "share of arrivals at most so stale", 360)
    lines = []
    for label, (at, share) in curves.items():
        source = source_of(x=at, y=share)
        style = {"line_width": 2, **_style(places[label])}
        line = chart.step("x", "y", source=source, mode="after", **style)
        line.name = plain(label)
        line.tags = [f"method:{label}"]
        lines.append(line)
    _hover(chart, lines, curve="$name", staleness="@x{0}", share="@y{0.000}")
    return chart


def line(name: str, x: str, y: str, at: Any, values: Any, **fields: Any) -> Any:
    """One curve with its points, such as the accuracy of a run."""
    at, values = _small(at, values)
    chart = _figure(name, y, x, "", **fields)
    chart.line(at, values, line_width=1.5, color=color(0))
    points = chart.scatter(at, values, size=4, color=color(0))
    _hover(chart, [points], at="@x{0.[00]}", value="@y{0.0000}")
    return chart


def values(name: str, x: str, y: str, found: Binned, place: int = 0, **fields: Any) -> Any:
    """A value of each arrival, or the means of bins in a band."""
    chart = _figure(name, y, x, "", **fields)
    at, means, low, high = _small(*found[:4])
    if found.per == 1:
        drawn = chart.scatter(at, means, size=3, alpha=0.7, color=color(place))
    else:
        chart.varea(at, low, high, alpha=0.2, color=color(place))
        drawn = chart.line(at, means, line_width=1.5, color=color(place))
    _hover(chart, [drawn], at="@x{0.[00]}", value="@y{0.[0000]}")
    return chart


def terms(
    name: str, title: str, x: str, y: str, found: Mapping[str, tuple[Any, Any]], **fields: Any
) -> Any:
    """Several curves with a legend; a click on it hides one.

    Args:
      name, title: of the chart.
      x, y: what the axes are.
      found: by the curve's name, places and values.
      fields: `mode="after"` for steps; others as for a figure.
    """
    mode = fields.pop("mode", None)
    chart = _figure(name, title, x, y, **fields)
    for place, (word, (at, heights)) in enumerate(found.items()):
        at, heights = _small(at, heights)
        style = {"line_width": 1.5, "color": color(place), "legend_label": plain(word)}
        if mode:
            drawn = chart.step(at, heights, mode=mode, **style)
        else:
            drawn = chart.line(at, heights, **style)
        drawn.name = plain(f"{name}/{word}")
        _hover(chart, [drawn], **{plain(word): "@y{0.[0000]}", "at": "@x{0.[00]}"})
    if len(found) > 1:
        _legend(chart)
    else:
        chart.legend.visible = False
    return chart


def jobs(x: str, found: Timeline, **fields: Any) -> Any:
    """Who worked when: a bar for each job, from its start to its arrival, shaded by staleness.

    A record that does not tell the start has marks at the arrivals.
    """
    from bokeh.models import ColumnDataSource, Range1d
    from bokeh.palettes import Viridis256
    from bokeh.transform import linear_cmap

    rows: dict[int, int] = {client: row for row, client in enumerate(found.clients)}
    own: Sequence[Row] = found.jobs
    end, start = column(own, "time"), column(own, "start")
    start = np.where(np.isfinite(start), start, end)
    staleness = column(own, "staleness")
    lane = np.asarray([rows[row["client"]] for row in own])
    names = ("start", "end", "staleness", "low", "high", "base", "version")
    numbers = _small(
        start, end, staleness, lane - 0.4, lane + 0.4,
        column(own, "base_version"), column(own, "version"),
    )  # fmt: skip
    rejected = [row.get("rejected") for row in own]
    told: dict[str, Any] = dict(zip(names, numbers, strict=True))
    told["client"] = np.asarray([row["client"] for row in own], np.int32)
    told["fate"] = [plain(f"rejected: {word}") if word else "accepted" for word in rejected]
    told["edge"] = [color(3) if word else "rgba(0,0,0,0)" for word in rejected]
    chart = _figure(
        "jobs", "clients at work", x, "client", max(240, 12 * len(rows) + 90),
        y_range=Range1d(start=len(rows) - 0.4, end=-0.6), **fields,
    )  # fmt: skip
    # Without the darkest and the brightest, which one of the two backgrounds would swallow.
    shades = linear_cmap(
        "staleness", Viridis256[70:235], 0, max(1.0, float(np.max(staleness, initial=0.0)))
    )
    bars = chart.quad(
        left="start", right="end", bottom="low", top="high", fill_color=shades,
        line_color="edge", line_width=2, source=ColumnDataSource(told),
    )  # fmt: skip
    marks = chart.scatter("end", "low", size=0, source=bars.data_source)
    if not np.any(start < end):
        marks.glyph.size, marks.glyph.fill_color = 4, shades
    _name_lanes(chart, {row: str(client) for client, row in rows.items()})
    chart.ygrid.visible = False
    chart.add_layout(bars.construct_color_bar(title="staleness", width=10), "right")
    _hover(
        chart, [bars], client="@client", started="@start{0.[00]} from version @base",
        arrived="@end{0.[00]} at version @version", staleness="@staleness", upload="@fate",
    )  # fmt: skip
    return chart


def pool(x: str, found: PoolCounts, classes: Sequence[str], **fields: Any) -> Any:
    """How many samples of each class the pool held, the more the stronger."""
    from bokeh.models import ColumnDataSource, Range1d

    moments, count = found.counts.shape
    top = max(1, int(found.counts.max()))
    lanes = np.tile(np.arange(count), moments)
    held = found.counts.ravel()
    kept = held > 0
    left, right = np.repeat(found.starts, count), np.repeat(found.ends, count)
    words = [plain(name) for name in classes] or [str(lane) for lane in range(count)]
    cells = _small(left, right, lanes - 0.45, lanes + 0.45, held, held / top)
    names = ("left", "right", "low", "high", "held", "share")
    told: dict[str, Any] = {name: cell[kept] for name, cell in zip(names, cells, strict=True)}
    told["class"] = [words[lane] for lane in lanes[kept]]
    chart = _figure(
        "pool", f"samples in the pool by class, strongest: {top}", x, "class",
        max(220, min(14 * count, 900) + 90), y_range=Range1d(start=count - 0.4, end=-0.6), **fields,
    )  # fmt: skip
    drawn = chart.quad(
        left="left", right="right", bottom="low", top="high", fill_alpha="share",
        fill_color=color(0), line_color=None, source=ColumnDataSource(told),
    )  # fmt: skip
    _name_lanes(chart, dict(enumerate(words)))
    chart.ygrid.visible = False
    _hover(chart, [drawn], **{"class": "@class", "samples": "@held{0}", "from": "@left{0.[00]}"})
    return chart


def _name_lanes(chart: Any, names: dict[int, str]) -> None:
    """Names for the places of an axis, of some of them where there are many."""
    step = -(-len(names) // MOST_NAMES)
    shown = dict(itertools.islice(names.items(), 0, None, step))
    chart.yaxis.ticker = list(shown)
    chart.yaxis.major_label_overrides = shown
