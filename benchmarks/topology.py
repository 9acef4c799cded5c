"""``python -m benchmarks.topology``: a request on a cluster and behind sentinels, beside one server alone.

Needs a checkout: the servers are those of the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from flask import Flask, session

from luasession import Session

from .samples import Row, median, summary, timed

ROUNDS, CALLS = 60, 20


def _read() -> str:
    return str(session["key1"])[:1]


class _Numbers:
    """Views that write another number each time."""

    def __init__(self) -> None:
        self._last = 0

    def write(self) -> str:
        """Set one key, and read none."""
        self._last += 1
        session["key1"] = f"{self._last:038}"
        return "x"


def _calls(url: str) -> dict[str, Callable[[], object]]:
    app = Flask(__name__)
    app.config.update(SESSION_REDIS_URL=url, SESSION_CACHE_TTL=0)
    Session(app)
    app.add_url_rule("/read", view_func=_read)
    app.add_url_rule("/write", "write", view_func=_Numbers().write)
    app.add_url_rule("/start", "start", view_func=lambda: str(session.update({"key1": "v" * 38})))
    client = app.test_client()
    client.get("/start")
    return {path: lambda path=path: client.get(path) for path in ("/read", "/write")}  # type: ignore[misc]


def measure(kind: str = "valkey-9.1") -> list[Row]:
    """Return percentiles of a validating read and of a blind write, interleaved, each over TCP."""
    from tests.servers import cluster, sentinel, standalone

    with ExitStack() as stack:
        urls = {
            "one server": f"redis://127.0.0.1:{stack.enter_context(standalone(kind)).port}/0",
            "cluster": stack.enter_context(cluster(kind)).url,
            "sentinel": stack.enter_context(sentinel(kind)).url,
        }
        calls = {name: _calls(url) for name, url in urls.items()}
        series: dict[tuple[str, str], list[float]] = {}
        for _ in range(ROUNDS):
            for name, paths in calls.items():
                for path, call in paths.items():
                    call()
                    series.setdefault((path, name), []).extend(timed(call) for _ in range(CALLS))
    return [
        {
            "request": path,
            "on": name,
            **summary(values),
            "ratio": round(median(values) / median(series[path, "one server"]), 2),
        }
        for (path, name), values in series.items()
    ]


def main() -> None:
    """Measure, and print a table."""
    print(f"{'request':10}{'on':14}{'P50':>9}{'P90':>9}{'P99':>9}{'max':>10}{'to one server':>16}")
    for row in sorted(measure(), key=lambda row: row["request"]):
        figures = "".join(f"{row[name]:9.1f}" for name in ("p50", "p90", "p99"))
        print(f"{row['request']:10}{row['on']:14}{figures}{row['max']:10.1f}{row['ratio']:16.2f}")


if __name__ == "__main__":
    main()
