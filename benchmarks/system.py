"""The whole system: the peers under gunicorn, a client that keeps cookies, the mix over many sessions."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict

import redis

from .browsers import Browsers, connected
from .peers import DEFAULTS, FLOOR, LOADED, RIVAL, SERVED
from .population import Population
from .samples import Row, median, summary
from .web import GEVENT, GTHREAD, PROCESSES, Gunicorns, Serving, cpu_of_workers

_WARM_UP = 0.2
#: Whom every kind of web server serves.
FEW = (FLOOR, LOADED, DEFAULTS)
_GREEN = (FLOOR, LOADED, RIVAL, DEFAULTS)


def servings(everyone: bool, processes: tuple[int, ...]) -> list[Serving]:
    """Return what is compared: worker classes with as many processes each, then threads in more and fewer.

    :param everyone: whether all peers are served, or just a few of them.
    :param processes: with how many processes of threads the few are served.
    """
    served = [Serving(name, GTHREAD, PROCESSES) for name in (SERVED if everyone else FEW)]
    served += [Serving(name, GEVENT, PROCESSES) for name in (_GREEN if everyone else FEW)]
    others = [many for many in processes if many != PROCESSES]
    return served + [Serving(name, GTHREAD, many) for many in others for name in FEW]


def _server_state(client: redis.Redis) -> tuple[float, int]:
    cpu, stats = client.info("cpu"), client.info("stats")
    wire = stats["total_net_input_bytes"] + stats["total_net_output_bytes"]
    return cpu["used_cpu_user"] + cpu["used_cpu_sys"], wire


def measure(
    redis_socket: str,
    population: Population,
    effort: tuple[int, float],
    served: list[Serving],
    say: Callable[[str], None],
) -> list[Row]:
    """Serve all at once and ask them in turn, round by round."""
    rounds, seconds = effort
    client = redis.Redis(unix_socket_path=redis_socket, protocol=2)
    series: dict[Serving, list[Row]] = {each: [] for each in served}
    times: dict[Serving, list[float]] = {each: [] for each in served}
    # A peer's sessions are the same whatever serves it, and so are those who have them.
    names = dict.fromkeys(each.peer for each in served)
    browsers = {name: Browsers(population, name, place) for place, name in enumerate(names)}
    with tempfile.TemporaryDirectory(prefix="luasession-web-") as folder, Gunicorns(folder) as web:
        say("starting gunicorn")
        started = {each: web.start(each, redis_socket) for each in served}
        for each, (_, path) in started.items():
            with connected(path, each.processes):
                pass  # it is up
        for number in range(rounds):
            for each, (pid, path) in started.items():
                where = f"{each.processes} x {each.worker_class}"
                say(f"gunicorn, round {number + 1} of {rounds}: {where}, {each.peer}")
                with connected(path, each.processes) as lines:
                    browsers[each.peer].run(lines, min(_WARM_UP, seconds / 2), 1000 + number)
                    cpu = cpu_of_workers(pid)
                    server_cpu, wire = _server_state(client)
                    begun = time.perf_counter()
                    taken = browsers[each.peer].run(lines, seconds, number)
                    elapsed = time.perf_counter() - begun
                    after = cpu_of_workers(pid)
                    server_cpu_after, wire_after = _server_state(client)
                count = len(taken)
                times[each] += taken
                series[each].append(
                    {
                        "requests_per_second": count / elapsed,
                        "worker_us": None if cpu is None or after is None else (after - cpu) / count * 1e6,
                        "redis_us": (server_cpu_after - server_cpu) / count * 1e6,
                        "redis_bytes": (wire_after - wire) / count,
                    }
                )
    client.close()
    for each, rows in series.items():
        # Of the same round, so that what else the machine does meets both.
        rival = series[Serving(LOADED, each.worker_class, each.processes)]
        for here, there in zip(rows, rival, strict=True):
            here["rate_to_flask_session"] = here["requests_per_second"] / there["requests_per_second"]
    return [{**asdict(each), **_middle(series[each]), **summary(times[each])} for each in served]


def _middle(rounds: list[Row]) -> Row:
    middle: Row = {}
    for name in rounds[0]:
        values = [each[name] for each in rounds if each[name] is not None]
        middle[name] = round(median(values), 3) if values else None
    return middle
