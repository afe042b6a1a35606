"""The plots of a report. Each is defined once: drawn with others into a PNG, or alone as SVG whose colours follow the page that holds it."""

import contextlib
import dataclasses
import io
import itertools
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

COLOURS = {  # by name, on light and on dark ground; told apart with every kind of colour blindness, and by their dashes too
    "ink": ("#1d2228", "#e6e9ed"), "soft": ("#545f6a", "#a5b0bb"), "line": ("#d5dae0", "#39424d"), "ground": ("#ffffff", "#14181d"),
    "card": ("#f5f7f9", "#1d232a"), "blue": ("#0b62b5", "#6cb2ff"), "orange": ("#b8460b", "#ff9a5c"), "teal": ("#00745a", "#45cfa4"),
    "purple": ("#8336a6", "#d59cf2"), "ochre": ("#806000", "#e2b53f"), "pink": ("#bb1657", "#ff8ab8"), "cyan": ("#00728a", "#52cfe4"),
    "grey": ("#5b6672", "#9ca8b4"),
}  # fmt: skip
SERIES = ("blue", "orange", "teal", "purple", "ochre", "pink", "cyan", "grey")
DASHES = ((), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2))
WIDTH = 4.6  # inches of a panel: narrow, so that its text can be read on a phone


@dataclasses.dataclass(frozen=True)
class Panel:
    """One plot."""

    title: str
    note: str  # what is to be seen, in words
    draw: Callable[[Any], None]  # from matplotlib's axes
    legend: tuple[tuple[str, str, tuple | None], ...] = ()  # (name, colour, dashes or, of dots, None); a page and a PNG show it in their own way
    height: float = 2.3  # inches


def colour(name: str) -> str:
    return COLOURS[name][0]


# --- kinds of plots ---


def bars(title: str, note: str, rows) -> Panel:
    """Returns scores in percent as bars with their intervals, the first on top.

    Args:
      rows: (label, {mean, ci95}, colour's name) of each.
    """
    rows = list(rows)

    def draw(axes):
        for place, (_, score, name) in enumerate(rows):
            low, high = (100 * bound for bound in score["ci95"])
            axes.barh(place, 100 * score["mean"], height=0.62, color=colour(name), alpha=0.45, linewidth=0)
            axes.plot([low, high], [place, place], color=colour(name), linewidth=2.2, solid_capstyle="butt")
            axes.plot(100 * score["mean"], place, "|", color=colour(name), markersize=11, markeredgewidth=2.2)
            axes.annotate(f"{100 * score['mean']:.1f}", (high, place), xytext=(6, 0), textcoords="offset points", va="center", color=colour("ink"))
        axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
        axes.tick_params(axis="y", length=0, labelcolor=colour("ink"))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 116)
        axes.set_xticks(range(0, 101, 25), [f"{tick}%" for tick in range(0, 101, 25)])
        axes.grid(visible=False, axis="y")

    return Panel(title, note, draw, height=0.55 + 0.3 * len(rows))


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a plot: its points are those that are finite."""

    name: str
    x: Any
    y: Any
    smooth: bool = False  # thin through the points, and thick through their running mean
    steps: bool = False  # it keeps its value until the next point
    dots: bool = False  # points alone


def lines(title: str, note: str, shown, marks=(), until: int | None = None, percent: bool = False) -> Panel:
    """Returns lines over the steps of training.

    Args:
      shown: `Line` of each; those without a point still take their colour.
      marks: (step, text) of what begins there.
      until: the last step that the axis shows; None: that of the lines.
      percent: y is a share.
    """
    from matplotlib import ticker

    styles = list(zip(shown, itertools.cycle(SERIES), itertools.cycle(DASHES)))

    def draw(axes):
        for line, name, dashes in styles:
            x, y = (np.asarray(values, np.float64) for values in (line.x, line.y))
            x, y = x[np.isfinite(y)], y[np.isfinite(y)] * (100 if percent else 1)
            if not len(x):
                continue
            style = {"color": colour(name), "dashes": dashes, "label": line.name, "dash_capstyle": "butt"}
            if line.dots:
                axes.plot(x, y, "o", color=colour(name), markersize=5, label=line.name)
            elif line.smooth and len(x) > 20:
                axes.plot(x, y, color=colour(name), linewidth=0.7, alpha=0.4)
                axes.plot(x, running_mean(y), linewidth=1.9, **style)
            else:
                marker = {"marker": "o", "markersize": 4} if len(x) <= 20 else {}
                axes.plot(x, y, linewidth=1.6, drawstyle="steps-post" if line.steps else "default", **style, **marker)
        axes.margins(x=0.03)
        if until:
            axes.set_xlim(-0.03 * until, 1.03 * until)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(ticker.MaxNLocator(5))
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
        low, high = axes.dataLim.intervaly
        if low >= 0:
            axes.set_ylim(0, max(1.05 * high, 1e-9))
        for place, (step, text) in enumerate(marks):
            axes.axvline(step, color=colour("soft"), linewidth=0.8, dashes=(2, 2))
            axes.annotate(text, (step, 1), xycoords=("data", "axes fraction"), xytext=(3, -2 - 9 * place), textcoords="offset points", va="top", fontsize=7.5, color=colour("soft"))
        axes.set_xlabel("step")

    return Panel(title, note, draw, tuple((line.name, name, None if line.dots else dashes) for line, name, dashes in styles if len(line.x)))


def heat(title: str, note: str, rows: dict, percent: bool = False) -> Panel:
    """Returns numbers by layer as a heat map, a row of cells for each name.

    Args:
      rows: {name: a number for each layer}.
      percent: they are shares.
    """

    def draw(axes):
        import matplotlib
        from matplotlib import ticker

        values = np.array(list(rows.values()), np.float64) * (100 if percent else 1)
        edges = np.arange(values.shape[1] + 1) - 0.5, np.arange(len(values) + 1) - 0.5
        top = max(np.nanmax(values, initial=0), 1e-9)
        cells = axes.pcolormesh(*edges, values, cmap=matplotlib.colormaps["cividis"].resampled(48), vmin=0, vmax=top, antialiased=False)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.tick_params(axis="y", length=0, labelcolor=colour("ink"))
        axes.invert_yaxis()
        axes.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
        axes.set_xlabel("layer of the actor")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        bar = axes.figure.colorbar(cells, ax=axes, aspect=12, pad=0.02, ticks=ticker.MaxNLocator(4), format="%g%%" if percent else "%g")
        bar.outline.set_visible(False)
        bar.solids.set_antialiased(False)

    return Panel(title, note, draw, height=1.05 + 0.34 * len(rows))


def running_mean(values) -> np.ndarray:
    """Returns the mean of each value and those around it, a twentieth of all; fewer at the ends."""
    reach = max(len(values) // 40, 1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    first, last = (np.clip(np.arange(len(values)) + shift, 0, len(values)) for shift in (-reach, reach + 1))
    return (total[last] - total[first]) / (last - first)


# --- to PNG and SVG ---


def png(panels, path) -> None:
    """Writes panels into one PNG, two a row, on light ground."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(panels), 2)
    groups = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(panel.height for panel in group) + 0.3 for group in groups]
    with _styled():
        figure = Figure(figsize=(columns * WIDTH, sum(heights)), facecolor=colour("ground"))
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(groups), columns, squeeze=False, height_ratios=heights)
        for axes, panel in itertools.zip_longest(grid.flat, panels):
            if panel is None:
                axes.set_visible(False)
                continue
            panel.draw(axes)
            axes.set_title(panel.title, loc="left", fontsize=9.5, color=colour("ink"))
            if len(panel.legend) > 1:
                axes.legend(fontsize=7.5, framealpha=0.7, edgecolor="none")
        figure.savefig(path, format="png", dpi=120, metadata={"Software": None})


def svg(panel: Panel, name: str, label: str) -> str:
    """Returns a panel as an <svg> for a page of HTML, without title and legend, which the page has in words.

    Its colours are the page's variables of the names in COLOURS, its font is the page's.

    Args:
      name: of the plot on the page: what its ids begin with.
      label: what is to be seen, for who does not see it; as HTML.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with _styled(), io.StringIO() as file:
        figure = Figure(figsize=(WIDTH, panel.height), facecolor="none")
        FigureCanvasSVG(figure)
        panel.draw(figure.subplots())
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    names = {light: known for known, (light, _) in COLOURS.items()}
    text = re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda found: f"var(--{names[found[0]]})" if found[0] in names else found[0], text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", text).replace("xlink:href", "href")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    begin = lambda found: f'<svg {found[1]} role="img" aria-label="{label}">'
    return re.sub(r'<svg[^>]*(viewBox="[^"]*")[^>]*>', begin, text, count=1).strip()


@contextlib.contextmanager
def _styled():
    """Has matplotlib draw in our style while this is entered, and say nothing of letters that its font lacks."""
    import matplotlib

    soft = dict.fromkeys(("xtick.color", "ytick.color", "axes.labelcolor"), colour("soft"))
    style = {
        **soft, "axes.edgecolor": colour("line"), "text.color": colour("ink"), "grid.color": colour("line"), "grid.linewidth": 0.6,
        "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none",
        "font.family": "DejaVu Sans", "font.size": 9, "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "metatuner_jax",
        "figure.constrained_layout.use": True, "figure.constrained_layout.h_pad": 0.05, "figure.constrained_layout.w_pad": 0.05,
    }  # fmt: skip
    with warnings.catch_warnings(), matplotlib.rc_context(style):
        warnings.filterwarnings("ignore", message="Glyph ")
        yield
