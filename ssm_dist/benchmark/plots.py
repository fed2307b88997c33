"""Plots of a report: throughput and speed-up against degree, context length and batch, and the roofline."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssm_dist.benchmark.tables import Row, case_name, label
from ssm_dist.benchmark.targets import PREFILL, REQUESTS, SCALED, on_one_gpu

MARKERS = "osD^vP*X"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
"""Told apart by the colour-blind, too (Okabe and Ito)."""
AXES = {"degree": "GPUs", "prompt_tokens": "prompt tokens", "batch": "sequences"}


@dataclass(frozen=True)
class Plot:
    """Tokens a second on the left; on the right, how many times those of one GPU they are."""

    name: str
    title: str
    key: str
    """Of the rate in a row."""
    across: str
    """Of what lies on the x axis."""
    fixed: Callable[[Row], str]
    """What is alike along a line."""
    most: int
    """Values of it that are drawn: those with the most points."""


def _sequences(row: Row) -> str:
    return f"{row['batch']} sequence{'s' * (row['batch'] != 1)}"


def _prompts(row: Row) -> str:
    return f"{row['batch']}x{row['prompt_tokens']}"


def _context(row: Row) -> str:
    return f"after {row['prompt_tokens']} tokens"


def _shape(row: Row) -> str:
    return f"{row['prompt_tokens']}+{row['new_tokens']} tokens"


PLOTS = (
    Plot("requests", "output tokens/s of requests against GPUs", REQUESTS.name, "degree", case_name, 3),
    Plot("prefill", "prompt tokens/s against GPUs", PREFILL.name, "degree", _prompts, 3),
    Plot("context", "prompt tokens/s against context length", PREFILL.name, "prompt_tokens", _sequences, 1),
    Plot("batch", "output tokens/s of requests against batch", REQUESTS.name, "batch", _shape, 1),
    Plot("decode", "decoded tokens/s against batch", "decode_tokens_per_second", "batch", _context, 1),
)


def draw(model: str, rows: list[Row], roofs: Sequence[Any], folder: Path) -> list[tuple[str, str]]:
    """Write a model's plots into a folder; titles and file names. What has too few points is left out."""
    drawn = []
    for plot in PLOTS:
        figure = _rates(f"{model}: {plot.title}", plot, rows)
        if figure is not None:
            drawn.append((plot.title, _saved(figure, folder, f"{model}_{plot.name}.png")))
    figure = _roofline(f"{model}: roofline of one GPU", rows, next(filter(None, roofs), None))
    return drawn + ([("roofline", _saved(figure, folder, f"{model}_roofline.png"))] if figure else [])


Lines = dict[str, dict[float, float]]
"""By name, from x to y."""


def _rates(title: str, plot: Plot, rows: list[Row]) -> Figure | None:
    rates, times = _lines_of(plot, rows)
    if not rates:
        return None
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, fontweight="bold")
    _draw_lines(left, rates, list(rates), plot.across)
    left.set(ylabel="tokens/s", ylim=(0, None))
    _draw_lines(right, times, list(rates), plot.across)
    if not times:
        right.set_axis_off()
    else:
        right.set(ylabel="times one GPU", ylim=(0, None))
    if times and plot.across == "degree":
        degrees = range(1, int(max(max(points) for points in times.values())) + 1)
        right.plot(degrees, degrees, color="grey", linestyle=":")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _lines_of(plot: Plot, rows: list[Row]) -> tuple[Lines, Lines]:
    """Rates, and times one GPU, of lines of at least two points."""
    measured = [row for row in rows if row.get(plot.key) is not None]
    counted = Counter(plot.fixed(row) for row in measured)
    kept = sorted(counted, key=lambda value: (-counted[value], value not in SCALED))[: plot.most]
    rates: Lines = defaultdict(dict)
    times: Lines = defaultdict(dict)
    for row in measured:
        if plot.fixed(row) not in kept:
            continue
        degree = "" if plot.across == "degree" else f", {row['degree']} GPU{'s' * (row['degree'] != 1)}"
        name, single = f"{label(row)}: {plot.fixed(row)}{degree}", on_one_gpu(row, rows)
        rates[name][row[plot.across]] = row[plot.key]
        if single is not None and single.get(plot.key) and (row["degree"] > 1 or plot.across == "degree"):
            times[name][row[plot.across]] = row[plot.key] / single[plot.key]
    long = {name: points for name, points in rates.items() if len(points) > 1}
    return long, {name: points for name, points in times.items() if name in long}


def _draw_lines(axes: Axes, lines: Lines, names: list[str], across: str) -> None:
    """`names` of all lines of the figure, which give each its colour."""
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points.items()), strict=True), label=name, **_style(names.index(name)))
    ticks = sorted({x for points in lines.values() for x in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(AXES[across])
    axes.grid(alpha=0.3)


def _style(index: int) -> dict[str, Any]:
    again = index // len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[(index + again) % len(MARKERS)],
        "markersize": 5,
    }


def _roofline(title: str, rows: list[Row], roof: dict[str, float] | None) -> Figure | None:
    """Operations a second against operations a byte of weights, states, keys and values."""
    clouds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        for step in ("decode", "prefill"):
            x, y = row.get(f"{step}_flop_a_byte"), row.get(f"{step}_tflop_per_second_a_rank")
            if x and y:
                clouds[f"{step}, {label(row)}, degree {row['degree']}"].append((x, y))
    if not clouds:
        return None
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for index, (name, points) in enumerate(clouds.items()):
        axes.plot(*zip(*points, strict=True), label=name, linestyle="", **_style(index))
    if roof is not None:
        intensities = [x for points in clouds.values() for x, _ in points]
        ridge, top = roof["flops"] / roof["bytes"], roof["flops"] / 1e12
        ends = [min(intensities) / 2, ridge, max(2 * max(intensities), 4 * ridge)]
        axes.plot(ends, [ends[0] * roof["bytes"] / 1e12, top, top], color="black", label="copy, bf16 product")
    axes.set(xscale="log", yscale="log", title=title)
    axes.set(xlabel="operations a byte of weights, states, keys and values", ylabel="TFLOP/s a GPU")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _saved(figure: Figure, folder: Path, name: str) -> str:
    figure.savefig(folder / name, dpi=110)
    return name
