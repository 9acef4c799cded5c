"""A load of real requests under faults, and its history read against the model.

``python -m tests.chaos --minutes 10 --seed 7`` runs a random mix on one server; ``--fault`` names one,
or ``all`` for each of a topology in turn. It ends with 1 and what went wrong if the history breaks a promise.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch
from urllib.parse import urlencode

from luasession.codec import make_serializer

from .chaos_app import MUTATION, MUTATIONS
from .faults import FAULTS, World, injecting, world_of
from .history import LISTS, SUMS, History, Record, Report, check
from .servers import eventually
from .web import Web, WebBrowser, serving

PREFIX = "chaos:"
#: Replicas of a primary, by topology.
REPLICAS = {"standalone": 1, "cluster": 1, "sentinel": 2}
#: Seconds that an answer may take; the app gives up long before.
PATIENCE = 20.0


@dataclass
class Plan:
    """What a run is made of."""

    topology: str = "standalone"
    fault: str = "mix"
    seconds: float = 10.0
    seed: int = 0
    kind: str = "valkey-9.1"
    browsers: int = 100
    #: How many of them are at work at a time.
    threads: int = 12
    #: Requests in a session, from and to.
    steps: tuple[int, int] = (15, 60)
    mutation: str = ""
    #: How long a hung server hangs, in seconds.
    hang: float = 3.0
    settings: dict[str, Any] = field(default_factory=dict)


class Browser:
    """One browser: a cookie jar, and the life that it leads at the moment."""

    def __init__(self, number: int, plan: Plan, port: int, history: History) -> None:
        self._random = random.Random(f"{plan.seed} {number}")
        self._number = number
        self._plan = plan
        self._port = port
        self._history = history
        self._lives = 0
        self._values = 0
        self._lock = threading.Lock()
        self.life = ""
        self._jar = WebBrowser(port, {})
        # When the hint that others are writing ends, which a jar of names and values does not know.
        self._hinted = 0.0
        self._handle = ""
        self._left = 0
        # Whether the id may have been replaced by one that never arrived.
        self._limbo = False

    # -- what it does -------------------------------------------------------

    def step(self, pool: ThreadPoolExecutor) -> None:
        """Send the next request, or some at a time."""
        if not self.life:
            self.begin()
        elif self._left <= 0:
            self._log_out(pool)
        elif not self._limbo and self._random.random() < 0.02:
            self.overtake(pool, self._random.randint(2, 6), self._random.choice(("", "1")))
        else:
            number = self._random.choice((1, 1, 1, 2, 3))
            wanted = [self._choose() for _ in range(number)]
            taken: set[str] = set()
            chosen = []
            for op, options in wanted:
                # Registers have one writer at a time, and an id one request that replaces it.
                name = "rotate" if op == "rotate" else options.get("key", "")
                if name in LISTS or name in SUMS or name not in taken or op == "read":
                    chosen.append((op, options))
                    taken.add(name)
            self._left -= len(chosen)
            self._after(self._send_all(chosen, pool))

    def finish(self) -> None:
        """Read the session for the last time, however often one has to ask."""
        if self.life:
            eventually(lambda: self._send("read").status == 200, 30)

    def begin(self) -> None:
        """Start a session."""
        self._lives += 1
        self.life = f"b{self._number}.{self._lives}"
        self._jar = WebBrowser(self._port, {})
        self._left = self._random.randint(*self._plan.steps)
        self._limbo = False
        record = self._send("start", key="owner", value=self._value("owner"))
        if record.applied and record.commits:
            self._handle = record.commits[0][0]
        else:
            self.life = ""

    def overtake(self, pool: ThreadPoolExecutor, rotations: int, reads: str) -> None:
        """Send a write that takes its time, and replace its id again and again meanwhile.

        :param reads: whether it reads first: if not, and its id is no longer known when it writes, it
            begins a session of its own.
        """
        key = f"k{self._values}"
        options = {"key": key, "value": self._value(key), "pause": 0.25, "reads": reads}
        slow = pool.submit(self._send, "put", **options)
        time.sleep(0.05)  # whether it was open before a rotation is exact to a call's transit
        records = []
        for _ in range(rotations):
            key = f"k{self._values}"
            records.append(self._send("rotate", key=key, value=self._value(key)))
            if not records[-1].applied:
                break
        records.append(slow.result())
        self._left -= len(records)
        self._after(records)

    def _choose(self) -> tuple[str, dict[str, Any]]:
        """Return the next request: what it does, and with what."""
        dice = self._random.random()
        pause = self._random.choice((0, 0, 0.002, 0.01, 0.03))
        options: dict[str, Any] = {"pause": pause, "reads": self._random.choice(("", "1"))}
        if dice < 0.25:
            return "read", {"pause": pause}
        if dice < 0.40:
            key = f"k{self._values}"
            return "put", {"key": key, "value": self._value(key), **options}
        if dice < 0.60:
            key = f"r{self._random.randrange(3)}"
            if self._random.random() < 0.25:
                return "drop", {"key": key, **options}
            return "put", {"key": key, "value": self._value(key), **options}
        if dice < 0.94 or self._limbo:
            key = self._random.choice((*LISTS, *LISTS, *SUMS))
            return "add", {"key": key, "value": self._value(key), **options}
        key = f"k{self._values}"
        drops = self._random.choice(("", "1"))
        return "rotate", {"key": key, "value": self._value(key), "drops": drops}

    def _value(self, key: str) -> str:
        self._values += 1
        return f"{self.life}:{key}.{self._values}"

    def _after(self, records: list[Record]) -> None:
        for record in records:
            if record.op == "rotate" and not record.applied:
                self._limbo = True
            if any(handle != self._handle for handle, _ in record.commits):
                self.life = ""  # it was told another id: the session is not what it was
                return
            if record.seen is not None and not record.seen:
                self.life = ""
                return

    def _log_out(self, pool: ThreadPoolExecutor) -> None:
        """Read it all, log out while others write, and try to come back under the old id."""
        self._send("read")
        old = dict(self._jar.cookies)
        how = self._random.choice(("clear", "destroy"))
        writers = [self._choose() for _ in range(self._random.randrange(3))]
        writers = [(op, {**options, "pause": 0.02}) for op, options in writers if op in {"put", "add"}]
        writers = [(op, options) for op, options in writers if not options["key"].startswith("r")]
        records = self._send_all([*writers, ("logout", {"value": how})], pool, old)
        while records[-1].status != 200:
            # Without an answer it may be dead, or die at any time.
            if time.monotonic() > records[0].start + 30:
                self.life = ""
                return
            records.append(self._send("logout", old, value=how))
        key = f"k{self._values}"
        self._send("late", old, key=key, value=self._value(key))
        if self._random.random() < 0.2:
            time.sleep(self._history.trust + 0.1)
        self._send("read", old)
        self.life = ""

    # -- how it sends -------------------------------------------------------

    def _send_all(
        self,
        wanted: list[tuple[str, dict[str, Any]]],
        pool: ThreadPoolExecutor,
        cookies: dict[str, str] | None = None,
    ) -> list[Record]:
        if len(wanted) == 1:
            return [self._send(wanted[0][0], cookies, **wanted[0][1])]
        futures = [pool.submit(self._send, op, cookies, **options) for op, options in wanted]
        return [future.result() for future in futures]

    def _send(self, op: str, cookies: dict[str, str] | None = None, **options: Any) -> Record:
        """Send a request, note it, and return what came of it.

        :param cookies: instead of those in the jar, which then is left alone. Of an answer they take the
            hints: it is an old id that comes back, in a browser that has seen what it was answered (G9).
        """
        began = time.monotonic()
        with self._lock:
            if began > self._hinted:
                self._jar.cookies.pop("session_o", None)
            sent = dict(self._jar.cookies) if cookies is None else dict(cookies)
        twin = WebBrowser(self._port, sent)
        value = options.get("value") if op != "logout" else None
        blind = op in {"start", "put", "rotate", "late"} and not options.get("reads")
        record = Record(self.life, op, began, began, 0, options.get("key", ""), value, blind=blind)
        query = urlencode({name: option for name, option in options.items() if option})
        try:
            status, body, headers = twin.answer(f"/{op}?{query}", PATIENCE)
        except (OSError, http.client.HTTPException) as error:
            record = replace(record, text=f"{type(error).__name__}: {error}")
        else:
            told = json.loads(headers.get("X-Told") or "{}")
            record = replace(
                record,
                status=status,
                commits=tuple((handle, version) for handle, version in told.get("commits", ())),
                discarded=told.get("discarded", ""),
                calls=tuple(told.get("calls", ())),
                text=body.decode(errors="replace")[-1500:] if status == 500 else "",
            )
            result = json.loads(body)["result"] if status == 200 else None
            if op == "read" and result is not None:
                record = replace(record, seen=result["seen"], version=result["version"])
            elif op == "drop" and result is not None:
                record = replace(record, version=result["version"], text=f"took {result['taken']!r}")
            if cookies is not None:
                set_now = dict(twin.cookies.items() - sent.items())
                # Under another id they are that session's, and no hint of what is in this one.
                if "session" not in set_now:
                    with self._lock:
                        hints = {"session_v", "session_o"} & set_now.keys()
                        cookies.update({name: set_now[name] for name in hints})
            else:
                with self._lock:
                    self._jar.take(sent, twin.cookies)
                    if any(line.startswith("session_o=1") for line in headers.get_all("Set-Cookie") or []):
                        self._jar.cookies["session_o"] = "1"
                        self._hinted = time.monotonic() + math.ceil(self._history.trust) + 1
        record = replace(record, end=time.monotonic())
        self._history.records.append(record)
        return record


@dataclass
class Outcome:
    """A run that is over."""

    plan: Plan
    history: History
    report: Report

    def __str__(self) -> str:
        report = self.report
        kinds = Counter(violation.kind.name for violation in report.violations)
        lost = sum(violation.count for violation in report.lost)
        lost += sum(v.count for v in report.violations if v.kind.name == "LOST")
        waits = self.plan.settings.get("SESSION_WAIT_REPLICAS", 0)
        fault = self.plan.fault + (f", waiting for {waits}" if waits else "")
        return (
            f"| {self.plan.topology} | {fault} | {report.requests} | {report.acknowledged} "
            f"| {report.unknown} | {lost} | {kinds['DOUBLED']} "
            f"| {sum(kinds.values()) - kinds['LOST'] - kinds['DOUBLED']} | {report.longest:.1f} s |"
        )

    def story(self, most: int = 5) -> str:
        """Return the first violations, each with its requests and what was done meanwhile."""
        parts = []
        for violation in self.report.violations[:most]:
            parts.append(str(violation))
            if violation.records:
                first, last = violation.records[0].start - 1, violation.records[-1].end + 1
                parts += [
                    f"    {at:9.3f}  -- {words}" for at, words in self.history.events if first < at < last
                ][:20]
        return "\n".join(parts)


HEAD = (
    "| topology | faults | requests | acknowledged | unknown | lost | doubled | other | longest |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def run(plan: Plan, world: World | None = None) -> Outcome:
    """Run the load under the fault, and check.

    :param world: the servers, whole and empty; otherwise they are started and stopped.
    """
    if world is None:
        with world_of(plan.topology, plan.kind, plan.seed) as own:
            return run(plan, own)
    world.hang = plan.hang
    settings = {
        "SESSION_REDIS_URL": world.url,
        "SESSION_KEY_PREFIX": PREFIX,
        # What is cut off in its middle waits that long.
        "SESSION_REDIS_TIMEOUT": 1.0,
        **plan.settings,
    }
    history = History(
        failovers=world.failovers,
        events=world.events,
        # With fewer than there are, one that lacks a change may be the one promoted.
        waits=int(settings.get("SESSION_WAIT_REPLICAS", 0)) >= REPLICAS[world.name],
        trust=float(settings.get("SESSION_CACHE_TTL", 2.0)),
        grace=float(settings.get("SESSION_ROTATION_GRACE", 60.0)),
    )
    app = "tests.chaos_app:create_app()"
    with (
        patch.dict(os.environ, {MUTATION: plan.mutation}),
        serving(None, workers=2, threads=16, app=app, **settings) as web,
    ):
        browsers = _load(plan, web, history, world)
        time.sleep(0.3)  # what a hung server still had to do
        with ThreadPoolExecutor(plan.threads) as pool:
            list(pool.map(Browser.finish, browsers))
    history.stored = stored_in(world)
    return Outcome(plan, history, check(history))


def _load(plan: Plan, web: Web, history: History, world: World) -> list[Browser]:
    browsers = [Browser(number, plan, web.port, history) for number in range(plan.browsers)]
    until = threading.Event()

    def work(mine: list[Browser]) -> None:
        with ThreadPoolExecutor(4) as pool:
            while not until.is_set():
                for browser in mine:
                    browser.step(pool)
                    if until.is_set():
                        return

    with ThreadPoolExecutor(plan.threads) as pool:
        futures = [pool.submit(work, browsers[each :: plan.threads]) for each in range(plan.threads)]
        try:
            with injecting(world, plan.fault):
                time.sleep(plan.seconds)
            time.sleep(0.2)
        finally:
            until.set()
    for future in futures:
        future.result()
    return browsers


def stored_in(world: World) -> dict[str, tuple[int, dict[str, Any]]]:
    """Return all sessions as they are in Redis."""
    loads = make_serializer("json").loads
    stored = {}
    with world.topology.client() as client:
        for key in set(client.scan_iter(f"{PREFIX}*", count=1000)):
            raw = client.hgetall(key) if b"principal:" not in key else {}
            if b"@i" in raw or any(not name.startswith(b"@") for name in raw):
                version = int.from_bytes(raw.get(b"@v", b"")[:4])
                content = {n.decode(): loads(v) for n, v in raw.items() if not n.startswith(b"@")}
                stored[key.decode().removeprefix(PREFIX)] = (version, content)
    return stored


def main() -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="for each fault")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--topology", choices=sorted(FAULTS), default="standalone")
    parser.add_argument("--fault", default="mix", help="one of a topology's, mix, none, or all of them")
    parser.add_argument("--kind", default="valkey-9.1")
    parser.add_argument("--browsers", type=int, default=100)
    parser.add_argument("--wait-replicas", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="tell what was done")
    parser.add_argument("--without", choices=sorted(MUTATIONS), default="", help="a guard to take out")
    arguments = parser.parse_args()
    faults = FAULTS[arguments.topology]
    names = list(faults) if arguments.fault == "all" else [arguments.fault]
    if not {*names} <= {*faults, "mix", "none"}:
        parser.error(f"--fault is one of {', '.join(faults)}, mix, none, all")
    print(f"seed {arguments.seed}\n{HEAD}", flush=True)
    wrong = False
    for name in names:
        plan = Plan(
            arguments.topology,
            name,
            arguments.minutes * 60,
            arguments.seed,
            arguments.kind,
            arguments.browsers,
            mutation=arguments.without,
        )
        if arguments.wait_replicas:
            plan.settings = {
                "SESSION_WAIT_REPLICAS": arguments.wait_replicas,
                "SESSION_WAIT_TIMEOUT": 0.5,
            }
        outcome = run(plan)
        print(outcome, flush=True)
        if outcome.report.limits:
            print(f"of the limits that README names, met: {len(outcome.report.limits)}", flush=True)
        if arguments.verbose:
            lines = [f"{at:9.3f}  {words}" for at, words in outcome.history.events]
            lines += [f"lost: {loss}" for loss in outcome.report.lost[:20]]
            lines += [f"limit: {limit}" for limit in outcome.report.limits]
            print(*lines, sep="\n", file=sys.stderr, flush=True)
        if outcome.report.violations:
            wrong = True
            print(outcome.story(), file=sys.stderr, flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
