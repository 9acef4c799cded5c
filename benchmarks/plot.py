"""``python -m benchmarks.plot``: the pictures of a result, light and dark, readable without colour.

Without an argument it redraws those of the newest full result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .contention import LOCKED, TUNED
from .growth import PATHS, above_floor
from .peers import BARE_MIX, CACHED, COLD, COOKIE, DEFAULTS, FLOOR, LOADED, RIVAL, VALIDATING
from .samples import Row
from .system import FEW
from .web import GEVENT, GTHREAD, PROCESSES, THREADS
from .workloads import FRESH, SMALL, STANDING

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Theme:
    """The colours of one background."""

    name: str
    paper: str
    ink: str
    faint: str
    ours: str
    theirs: str
    other: str


THEMES = (
    Theme("light", "#ffffff", "#1f2328", "#d1d9e0", "#0550ae", "#bc4c00", "#59636e"),
    Theme("dark", "#0d1117", "#f0f6fc", "#3d444d", "#79c0ff", "#ffa657", "#9198a1"),
)

#: Marker and dashes by peer; luasession's markers are filled, all others' are hollow.
_MARKS = {
    COOKIE: ("v", ":"),
    LOADED: ("s", "--"),
    RIVAL: ("D", "-."),
    LOCKED: ("X", "--"),
    TUNED: ("P", ":"),
    COLD: ("o", "--"),
    VALIDATING: ("^", "-."),
    CACHED: ("*", "-"),
    DEFAULTS: ("P", "-"),
    FLOOR: ("|", ":"),
    BARE_MIX: ("x", ":"),
}


def _style(peer: str, theme: Theme) -> dict[str, Any]:
    marker, dashes = _MARKS[peer]
    ours = peer.startswith("luasession")
    color = theme.ours if ours else theme.theirs if peer.startswith("Flask-Session") else theme.other
    size = {"*": 10, "P": 8}.get(marker, 6.5)
    return {
        "color": color,
        "marker": marker,
        "linestyle": dashes,
        "markersize": size,
        "markerfacecolor": color if ours else theme.paper,
        "markeredgewidth": 1.4,
        "linewidth": 2.0 if ours else 1.4,
        "label": peer,
    }


def _requests(result: dict[str, Any], theme: Theme) -> Figure:
    """Draw a row for each workload, a mark for each peer's P50 above the floor, and a line up to its P90."""
    peers = (COOKIE, LOADED, RIVAL, COLD, VALIDATING, CACHED)
    figure, axes = plt.subplots(figsize=(8.6, 7.4), layout="constrained")
    workloads = [*STANDING, *FRESH]
    rows = {(row["workload"], row["peer"]): row for row in result["requests"] if row["shape"] == SMALL}
    for place, workload in enumerate(workloads):
        floor = rows[workload, FLOOR]["p50"]
        if place % 2:
            axes.axhspan(place - 0.5, place + 0.5, color=theme.faint, alpha=0.25, linewidth=0)
        for step, peer in enumerate(peers):
            row, y = rows[workload, peer], place + (step - 2.5) * 0.13
            style = _style(peer, theme)
            axes.plot([row["p50"] - floor, row["p90"] - floor], [y, y], color=style["color"], linewidth=1.0)
            style |= {"linestyle": "none", "label": peer if place == 0 else None}
            axes.plot([row["p50"] - floor], [y], **style)
    axes.set_yticks(range(len(workloads)), workloads)
    axes.set_ylim(len(workloads) - 0.5, -0.5)
    axes.set_xlim(left=-10)
    axes.set_xlabel("microseconds above Flask without sessions: P50, and a line up to P90")
    axes.set_title(f"One request, session of {SMALL}: left is better", loc="left")
    _finish(axes, theme, "x")
    _legend(figure, [axes], theme)
    return figure


def _growth(result: dict[str, Any], theme: Theme) -> Figure:
    """Draw what requests cost against bytes, keys and number of sessions, and what more workers bring."""
    figure, grid = plt.subplot_mosaic("AAABBB;CCCDDD;EEFFGG", figsize=(9.6, 10.4), layout="constrained")
    one_session = [grid[name] for name in "ABCD"]
    for axes, (workload, axis) in zip(one_session, product(PATHS, ("bytes", "keys")), strict=True):
        rows = [row for row in result["growth"] if (row["axis"], row["workload"]) == (axis, workload)]
        _curves(axes, theme, rows, ("size", "p50"))
        axes.sharey(one_session[0])
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("bytes in ten keys" if axis == "bytes" else "keys of 40 bytes")
        axes.set_title(workload, loc="left")
        if axis == "bytes":
            axes.set_ylabel("microseconds, P50")
    _sessions(result, theme, {"p50": grid["E"], "p99": grid["F"]})
    _workers(result, theme, grid["G"])
    for axes in grid.values():
        axes.minorticks_off()  # they take half of the time to draw, and show little
    _legend(figure, grid.values(), theme)
    return figure


def _sessions(result: dict[str, Any], theme: Theme, panels: dict[str, Axes]) -> None:
    rows = above_floor(result["growth"])
    for name, axes in panels.items():
        _curves(axes, theme, rows, ("size", name))
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.tick_params(axis="x", labelsize="small")
        axes.set_xlabel("sessions")
        axes.set_title(f"mix, {name.upper()}", loc="left")
    panels["p50"].set_ylabel("microseconds above the floor")


def _workers(result: dict[str, Any], theme: Theme, axes: Axes) -> None:
    rows = [row for row in result["system"] if row["worker_class"] == GTHREAD and row["peer"] in FEW]
    _curves(axes, theme, rows, ("processes", "requests_per_second"))
    many = sorted({row["processes"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(many, [str(each) for each in many])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"processes of {THREADS} threads")
    axes.set_title("mix, requests per second", loc="left")


def _curves(axes: Axes, theme: Theme, rows: list[Row], names: tuple[str, str]) -> None:
    """Draw a line for each peer, one figure of its rows against another."""
    for peer in dict.fromkeys(row["peer"] for row in rows):
        points = sorted(tuple(row[name] for name in names) for row in rows if row["peer"] == peer)
        axes.plot(*zip(*points, strict=True), **_style(peer, theme))
    _finish(axes, theme, "y")


def _contention(result: dict[str, Any], theme: Theme) -> Figure:
    """Draw what is kept of parallel changes, and how long they take."""
    peers = (COOKIE, RIVAL, LOCKED, TUNED, CACHED)
    figure, (kept, taken) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for peer in peers:
        rows = [
            row
            for row in result["contention"]
            if (row["kind"], row["pause_ms"], row["peer"]) == ("own", 10, peer)
        ]
        many = [row["parallel"] for row in rows]
        style = _style(peer, theme)
        kept.plot(many, [row["kept"] for row in rows], **style)
        taken.plot(many, [row["seconds"] for row in rows], **style)
    for axes, title, y in (
        (kept, "Changes kept: higher is better", "changes in the session afterwards"),
        (taken, "Until the last is answered: lower is better", "seconds"),
    ):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2 if axes is kept else 10)
        axes.set_xticks(many, [str(each) for each in many])
        axes.minorticks_off()
        axes.margins(y=0.12)
        axes.set_xlabel("parallel requests on one session, each sets its own key")
        axes.set_ylabel(y)
        axes.set_title(title, loc="left")
        _finish(axes, theme, "y")
    kept.set_yticks(many, [str(each) for each in many])
    taken.yaxis.set_major_formatter("{x:g}")
    best = max(row["kept"] for row in rows)
    _note(kept, "luasession, and what waits for a lock", (many[-1], best), (-4, 13), theme)
    _note(kept, "signed cookie and Flask-Session", (many[-2], 1), (-24, 12), theme)
    _legend(figure, [kept], theme)
    return figure


def _system(result: dict[str, Any], theme: Theme) -> Figure:
    """Draw requests per second and latencies under gunicorn, with threads and with gevent."""
    groups = {
        words: [
            row
            for row in result["system"]
            if (row["worker_class"], row["processes"]) == (worker_class, PROCESSES)
        ]
        for worker_class, words in (
            (GTHREAD, f"{PROCESSES} processes of {THREADS} threads"),
            (GEVENT, f"{PROCESSES} processes, gevent"),
        )
    }
    heights = [len(rows) + 1 for rows in groups.values()]
    figure, grid = plt.subplots(
        2, 2, figsize=(10, 6.6), sharex="col", sharey="row", height_ratios=heights, layout="constrained"
    )
    for (rate, late), (words, rows) in zip(grid, groups.items(), strict=True):
        _served(rate, late, rows, theme)
        rate.set_title(words, loc="left")
        late.set_title("P50 dot, P90 diamond, P99 bar", loc="left")
    # Shared, so that it has to hold for all rows.
    late.set_xlim(0, 1.04 * max(row["p99"] for rows in groups.values() for row in rows) / 1e3)
    rate.set_xlabel("requests per second: right is better")
    late.set_xlabel("milliseconds: left is better")
    return figure


def _served(rate: Axes, late: Axes, rows: list[Row], theme: Theme) -> None:
    places = range(len(rows))
    for place, row in enumerate(rows):
        style = _style(row["peer"], theme)
        ours = row["peer"].startswith("luasession")
        rate.barh(
            place,
            row["requests_per_second"],
            height=0.62,
            facecolor=style["color"] if ours else theme.paper,
            edgecolor=style["color"],
            linewidth=1.4,
            hatch=None if ours else "////" if "Flask-Session" in row["peer"] else "....",
        )
        rate.annotate(
            f"{row['requests_per_second']:.0f}",
            (row["requests_per_second"], place),
            (4, 0),
            textcoords="offset points",
            va="center",
            color=theme.ink,
        )
        late.plot([row["p50"] / 1e3, row["p99"] / 1e3], [place, place], color=style["color"], linewidth=1.4)
        for name, marker in (("p50", "o"), ("p90", "D"), ("p99", "|")):
            late.plot(
                row[name] / 1e3,
                place,
                marker=marker,
                markersize=7 if marker != "|" else 13,
                markeredgewidth=1.8,
                color=style["color"],
                markerfacecolor=style["color"] if marker == "o" else theme.paper,
            )
    rate.set_yticks(places, [row["peer"] for row in rows])
    rate.invert_yaxis()
    rate.margins(x=0.16)
    for axes in (rate, late):
        _finish(axes, theme, "x")
    late.tick_params(axis="y", length=0)


_PICTURES: dict[str, Callable[[dict[str, Any], Theme], Figure]] = {
    "requests": _requests,
    "growth": _growth,
    "contention": _contention,
    "system": _system,
}


def _finish(axes: Axes, theme: Theme, grid: str) -> None:
    axes.grid(axis=grid, which="major", color=theme.faint, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _note(axes: Axes, text: str, at: tuple[float, float], shift: tuple[int, int], theme: Theme) -> None:
    axes.annotate(text, at, shift, textcoords="offset points", ha="right", va="center", color=theme.ink)


def _legend(figure: Figure, axes: Iterable[Axes], theme: Theme) -> None:
    """Put what the marks mean above, each once."""
    named = {
        label: handle
        for each in axes
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True)
    }
    columns = 3 if len(named) > 4 else len(named)
    figure.legend(
        named.values(),
        named.keys(),
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        handlelength=3.2,
    )


def draw(path: Path, kinds: Iterable[str] = ("svg",)) -> list[Path]:
    """Draw all pictures of a result, into a directory beside it of the same name; return their paths.

    :param kinds: the endings of what to write.
    """
    result = json.loads(path.read_text())
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    drawn: list[Path] = []
    for theme in THEMES:
        colors = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), theme.paper)
        names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        # The salt and no date: the same result gives the same bytes.
        settings = {"svg.hashsalt": "benchmarks", "font.size": 10.5, "hatch.linewidth": 0.7}
        with plt.rc_context(settings | colors | dict.fromkeys(names, theme.ink)):
            for name, picture in _PICTURES.items():
                figure = picture(result, theme)
                for kind in kinds:
                    target = folder / f"{name}-{theme.name}.{kind}"
                    figure.savefig(target, metadata={"Date": None} if kind == "svg" else None)
                    drawn.append(target)
                plt.close(figure)
    return drawn


def main() -> None:
    """Redraw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("result", type=Path, nargs="?", help="a JSON file of python -m benchmarks")
    path = parser.parse_args().result
    if path is None:
        full = sorted(RESULTS.glob("????-??-??.json"))
        if not full:
            parser.error(f"there is no full result in {RESULTS}")
        path = full[-1]
    for target in draw(path):
        print(target)


if __name__ == "__main__":
    main()
