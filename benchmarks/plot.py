"""The pictures of docs/performance.md: speeds side by side, and the roofline with every engine's points on it.

SVG whose ink and paper follow the reader's colour scheme. Needs matplotlib (the `bench` extra), imported when drawing.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.results import OURS, Block, Results, number
from miniphi.atomic_write import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _PAPER = "#1f2328", "#fefefe"
_DARK_INK, _DARK_PAPER = "#e6edf3", "#0d1117"
_COLOURS = ("#159a80", "#d9722e", "#7a6ff0", "#b0578d")  # told apart on both papers, and without red against green
_MARKERS = ("o", "s", "^", "D")
_MOST_OPS = 3e4  # per byte, where the axis ends
_STYLE = f"""<style>
svg {{ --ink: {_INK}; --paper: {_PAPER}; }}
@media (prefers-color-scheme: dark) {{ svg {{ --ink: {_DARK_INK}; --paper: {_DARK_PAPER}; }} }}
</style>"""


def draw(results: Results, folder: Path) -> list[Path]:
    """Write speed.svg and roofline.svg and return their paths; only what there are figures for."""
    import matplotlib as mpl  # noqa: PLC0415 - measuring works without it

    mpl.use("agg")
    style = {"svg.fonttype": "none", "svg.hashsalt": "miniphi", "font.size": 9, "font.family": "sans-serif"}
    style |= dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
    ) | dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), _PAPER)
    pictures: dict[str, Callable[[Results], Figure | None]] = {"speed.svg": _speeds, "roofline.svg": _roofline}
    paths = []
    with mpl.rc_context(style):
        for name, picture in pictures.items():
            figure = picture(results)
            if figure is None:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(folder / name, overwrite=True) as file:
                file.write(_svg(figure).encode())
            paths.append(folder / name)
    return paths


def _svg(figure: "Figure") -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = text.getvalue().replace(_INK, "var(--ink)").replace(_PAPER, "var(--paper)")
    start = svg.index(">", svg.index("<svg")) + 1
    return svg[:start] + "\n" + _STYLE + svg[start:]


def _speeds(results: Results) -> "Figure | None":
    """Draw a bar per engine and row, as long as it is faster than the best peer; a row without a peer stays out."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    peers = [name for name in results.engines if name != OURS]
    rows = [block for block in results.blocks if any(block.ratio(peer) is not None for peer in peers)]
    if not rows:
        return None
    figure = Figure(figsize=(7.5, 0.8 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(results.engines)
    for row, block in enumerate(rows):
        scores = {peer: ratio for peer in peers if (ratio := block.ratio(peer)) is not None}
        best = min(scores.values())
        for index, engine in enumerate(results.engines):
            median = block.median(engine)
            if median is None:
                continue
            length = best if engine == OURS else best / scores[engine]
            place = row + (index - (len(results.engines) - 1) / 2) * height
            axes.barh(place, length, height * 0.9, color=_COLOURS[index], label=engine if row == 0 else None)
            axes.text(length, place, f" {number(median)} {block.unit}", va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [f"{block.label}\n{_short(block.model)}" for block in rows])
    axes.invert_yaxis()
    axes.axvline(1, color=_INK, linewidth=0.8, linestyle=":")
    axes.set_xlabel("speed, best peer = 1")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*_legend(axes), loc="outside upper center", ncols=len(results.engines), frameon=False)
    return figure


def _roofline(results: Results) -> "Figure | None":
    """Draw operations per second over operations per byte: the machine's two limits, and what each engine reached."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    blocks = [block for block in results.blocks if block.demands and block.samples]
    if not blocks:
        return None
    limits = [limits for block in blocks for sample in block.samples for limits in (sample.before, sample.after)]
    rate = max(limit.int8_ops_per_s for limit in limits) / 1e9
    bandwidths = [pick(limit.read_bytes_per_s for limit in limits) / 1e9 for pick in (min, max)]
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    xs = [1.0, *(rate / bandwidth for bandwidth in reversed(bandwidths)), _MOST_OPS]
    low, high = ([min(rate, bandwidth * x) for x in xs] for bandwidth in bandwidths)
    axes.fill_between(xs, low, high, color=_INK, alpha=0.15, linewidth=0)
    axes.plot(xs, low, color=_INK, linewidth=1)
    axes.plot(xs, high, color=_INK, linewidth=1)
    axes.text(1.1, 0.42 * rate, f"reads\n{bandwidths[0]:.0f} to {bandwidths[1]:.0f} GB/s", fontsize=8)
    axes.text(_MOST_OPS, rate * 1.08, f"{rate:.0f} int8 Gop/s", ha="right", va="bottom", fontsize=8)
    for index, engine in enumerate(results.engines):
        points = [point for block in blocks if (point := _point(block, engine)) is not None]
        if points:
            places = ([point[0] for point in points], [point[1] for point in points])
            axes.scatter(*places, s=26, color=_COLOURS[index], marker=_MARKERS[index], label=engine, zorder=3)
    for place, block in enumerate(blocks, 1):
        if (point := _point(block, OURS)) is not None:
            axes.annotate(str(place), point, xytext=(4, 5), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", xlim=(1, _MOST_OPS), xlabel="int8 operations per byte read", ylabel="Gop/s")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*_legend(axes), loc="outside upper center", ncols=len(results.engines), frameon=False)
    names = [f"{place}  {_short(block.model)}: {block.label}" for place, block in enumerate(blocks, 1)]
    figure.text(0.1, -0.02, "\n".join(names), fontsize=7, va="top")
    return figure


def _point(block: Block, engine: str) -> tuple[float, float] | None:
    demand, median = block.demands.get(engine), block.median(engine)
    if demand is None or median is None:
        return None
    return demand.intensity, demand.ops_per_s(median) / 1e9


def _legend(axes: "Axes") -> tuple[list[object], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    return list(handles), list(labels)


def _short(model: str) -> str:
    return "SmolLM2-135M" if model.startswith("smollm2") else "3.8 B, Phi-3-mini shape"
