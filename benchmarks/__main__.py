"""``python -m benchmarks``: peers interleaved round by round in one run; tables, JSON and pictures."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis

from luasession import embedded

from . import aims, contention, growth, limits, plot, population, report, requests, server, system
from .effort import FULL, QUICK, SMOKE, Effort


def run(effort: Effort, say: report.Progress) -> dict[str, Any]:
    """Measure everything; return the result, ready for JSON."""
    logging.getLogger("luasession").setLevel(logging.ERROR)  # that the server is for demos is no news here
    with tempfile.TemporaryDirectory(prefix="luasession-bench-") as folder:
        home = Path(folder) / "server"
        socket = embedded.start(home, name="benchmarks")
        client = redis.Redis(unix_socket_path=socket, protocol=2)
        try:
            now = datetime.now(UTC)
            result: dict[str, Any] = {
                "date": f"{now:%Y-%m-%d}",
                "effort": effort.name,
                **report.about(client),
            }
            commands = limits.Limits(socket, effort.commands)
            result["requests"] = requests.measure(socket, effort.rounds, commands, say)
            result["limits"] = commands.rows()
            client.flushdb()
            result["growth"] = growth.measure(socket, *effort.growth, say)
            client.flushdb()
            result["contention"] = contention.measure(socket, effort.parallel, effort.contention, say)
            client.flushdb()
            say(f"{effort.population} sessions")
            people = population.Population(socket, effort.population)
            result["population"] = people.rows
            say("the mix")
            result["requests"] += population.measure(people, socket, *effort.mix)
            result["growth"] += growth.among_many(people, socket, effort.sessions, effort.among_many, say)
            served = system.servings(effort.all_systems, effort.processes)
            result["system"] = system.measure(socket, people, effort.system, served, say)
            client.flushdb()
            result["server"], result["memory"] = [], []
            with server.servers(effort.all_servers, socket) as found:
                for kind, path in found.items():
                    say(f"the server's side: {kind}")
                    result["server"] += server.time_of(kind, path, effort.server)
                    result["memory"] += server.memory(kind, path)
            result["spread"] = server.spread(effort.handles, say)
        finally:
            client.close()
            embedded.stop(home)
    result["aims"] = aims.judge(result)
    result["machine"]["load_after"] = [round(each, 2) for each in os.getloadavg()]
    result["seconds"] = round(say.done(), 1)
    return result


def main() -> None:
    """Run, write the result and the pictures, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer rounds: 40 s, and rougher figures")
    size.add_argument("--smoke", action="store_true", help="a few calls, to see that it works; no figures")
    parser.add_argument("--out", type=Path, default=plot.RESULTS, help="where the result goes (%(default)s)")
    options = parser.parse_args()
    effort = QUICK if options.quick else SMOKE if options.smoke else FULL
    say = report.Progress()
    result = run(effort, say)
    name = result["date"] if effort is FULL else f"{result['date']}-{effort.name}"
    path = options.out / f"{name}.json"
    report.write(result, path)
    report.show(result)
    say("drawing")
    plot.draw(path)
    print(f"\n{path}, pictures in {path.with_suffix('')}, {say.done():.0f} s")


if __name__ == "__main__":
    main()
