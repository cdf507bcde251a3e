"""The look of all charts, and how they are drawn and written.

matplotlib takes half a second to import, so it is imported when the first chart is drawn. Charts use its object API,
whose figures belong to nobody but the caller; pyplot would keep them, and choose a window system. A chart contains only
words of the suite: names of users may have characters that the font lacks.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter
    from matplotlib.typing import RcKeyType

WIDTH, HEIGHT = 9.6, 5.4  # inches: 960 x 540 points of a screen
SHARPNESS = 200  # pixels per inch of a file: two for each point of a screen, for fine ones and for zooming in

# Colours that people with any kind of colour blindness can tell apart (Okabe and Ito, 2008).
BLUE, ORANGE, VERMILION, GREEN = "#0072b2", "#e69f00", "#d55e00", "#009e73"
LINES = (BLUE, ORANGE, GREEN, "#cc79a7", "#56b4e9")
FAINT_BLUE, GRAY, LIGHT, INK = "#a9cbe3", "#6f6f6f", "#e3e3e3", "#202020"

SETTINGS: dict[RcKeyType, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that charts are the same everywhere
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRAY,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.xmargin": 0.01,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,  # 0.0713 and 0.0714, not 3 and 4 beside "1e-4 + 0.071"
    "axes.formatter.limits": (-4, 6),
    "grid.color": LIGHT,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.dpi": SHARPNESS,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
}


@contextlib.contextmanager
def our_settings() -> Iterator[None]:
    """Within it matplotlib has the settings of the suite, and none of the user's file; afterwards those from before."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def new_figure(width: float = WIDTH, height: float = HEIGHT) -> Figure:
    """Return an empty figure of a size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all; equal figures give equal bytes."""
    with replacing(path) as temporary, our_settings():
        figure.savefig(temporary, format="png", metadata={"Software": None})


def legend_below(figure: Figure, columns: int) -> None:
    """Put one legend of all axes below them, where it hides nothing."""
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles, labels = (list(itertools.chain.from_iterable(lists)) for lists in zip(*found, strict=True))
    figure.legend(handles, labels, loc="outside lower left", ncols=columns)


def rate_text(rate: float) -> str:
    """Return a learning rate in at most three digits: 0, 1e-4, 6.42e-4."""
    digits, exponent = f"{rate:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}" if rate else "0"


def scale_losses(axes: Axes, *, is_log: bool) -> None:
    """Give the y axis plain round numbers: 0.05, 0.1, 0.2."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    if is_log:
        _log_scale(axes, ticks=(1.0, 2.0, 5.0))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.6g}"))


def scale_rates(axes: Axes, *, is_log: bool) -> None:
    """Give the y axis learning rates as they are written in options: 5e-5, 1e-4."""
    rate_axis(axes.yaxis)
    if is_log:
        _log_scale(axes, ticks=(1.0,))
        axes.yaxis.set_major_formatter(_rate_formatter())


def rate_axis(axis: Axis) -> None:
    """Give an axis round learning rates as they are written in options: 5e-5, 1e-4."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(_rate_formatter())


def _rate_formatter() -> Formatter:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda rate, _: rate_text(rate))


def _log_scale(axes: Axes, ticks: tuple[float, ...]) -> None:
    """Make the y axis logarithmic, with ticks at these numbers times powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=ticks, numticks=7))
    axes.yaxis.set_minor_locator(NullLocator())


def whole_axis(axis: Axis, ticks: int) -> None:
    """Give an axis up to a number of ticks at round whole numbers, with commas between thousands."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axis.set_major_locator(MaxNLocator(nbins=ticks, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
