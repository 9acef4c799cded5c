"""The benchmarks: a run of a few calls gives every row with its percentiles, and pictures that can be read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

ROOT = Path(__file__).parents[1]
#: Outside of a checkout the suite tests an installed wheel, which has no benchmarks.
IS_CHECKOUT = (ROOT / "pyproject.toml").exists()
if not IS_CHECKOUT:
    pytest.skip("no checkout: the suite runs against an installed wheel", allow_module_level=True)

from benchmarks import aims, browsers, contention, growth, peers, plot, system, web, workloads  # noqa: E402
from benchmarks.effort import SMOKE  # noqa: E402

PICTURES = {
    f"{name}-{theme}.svg"
    for name, theme in product(("requests", "growth", "contention", "system"), ("light", "dark"))
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a smoke run, as anybody starts it."""
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "benchmarks", "--smoke", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Aims" in done.stdout
    [written] = out.glob("*.json")
    assert written.stem.endswith("-smoke")
    return written


@pytest.fixture(scope="module")
def result(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def names(rows: Iterable[dict[str, Any]], *keys: str) -> set[tuple[Any, ...]]:
    return {tuple(row[key] for key in keys) for row in rows}


def test_every_request_has_its_row(result: dict[str, Any]) -> None:
    """Each workload is measured on each shape for each peer, where a browser could do it at all."""
    everybody = [name for name in peers.PEERS if name not in peers.LEAST]
    small = product((workloads.SMALL, workloads.MIXED), workloads.STANDING | workloads.FRESH, everybody)
    no_cookie = [name for name in everybody if name != peers.COOKIE]
    large = product((workloads.LARGE, workloads.HUGE), workloads.STANDING, no_cookie)
    mix = {("10 fields", "mix", name) for name in everybody if name != peers.CHECKED}
    least = {
        (shape, workload, name)
        for name, its in peers.LEAST.items()
        for shape, workload in product(workloads.SHAPES, its)
    }
    assert names(result["requests"], "shape", "workload", "peer") == {*small, *large} | mix | least
    assert names(result["limits"], "command") == {("PING",), ("GET",), ("HSET",), ("HGETALL",)}


def test_every_other_row_is_there(result: dict[str, Any]) -> None:
    """Contention, growth, gunicorn, the server's side and its memory, each for all that it compares."""
    bursts = names(result["contention"], "kind", "pause_ms", "parallel")
    assert bursts == set(product(contention.KINDS, contention.PAUSES, SMOKE.parallel))
    of_one = set(product(("bytes", "keys"), growth.PATHS, growth.PEERS))
    among_many = set(product(("sessions",), ("mix",), growth.AMONG_MANY))
    assert names(result["growth"], "axis", "workload", "peer") == of_one | among_many
    counts = {(row["size"],) for row in result["growth"] if row["axis"] == "sessions"}
    assert counts == {(count,) for count in SMOKE.sessions}
    servers = ((web.GTHREAD, 2), (web.GEVENT, 2), *((web.GTHREAD, many) for many in SMOKE.processes))
    assert names(result["system"], "worker_class", "processes", "peer") == {
        (*server, peer) for server, peer in product(servers, system.FEW)
    }
    assert {"load, cold", "load, unchanged", "commit of one key", "merge round"} < {
        what for (what,) in names(result["server"], "what")
    }
    assert names(result["memory"], "listpack", "shape") == set(product(("default", "1024"), workloads.SHAPES))
    assert result["spread"]["slots"] == 16384
    assert names(result["population"], "peer") == {(peers.COLD,), (peers.RIVAL,)}


def test_a_rate_is_compared_under_the_same_web_server(result: dict[str, Any]) -> None:
    """Requests per second are told as a ratio to Flask-Session's with the same workers, in the same round."""
    rates = {
        (row["peer"], row["worker_class"], row["processes"]): row["requests_per_second"]
        for row in result["system"]
    }
    for row in result["system"]:
        rival = rates[peers.LOADED, row["worker_class"], row["processes"]]
        # There is one round.
        assert row["rate_to_flask_session"] == pytest.approx(row["requests_per_second"] / rival, abs=0.01)


@pytest.mark.parametrize("worker_class", [web.GTHREAD, web.GEVENT])
def test_every_worker_is_asked(worker_class: str, tmp_path: Path) -> None:
    """The connections to a web server are shared evenly by its workers, each of which names itself."""
    serving = web.Serving(peers.FLOOR, worker_class, 2)
    with web.Gunicorns(str(tmp_path)) as servers:
        _, path = servers.start(serving, "no redis is asked")
        with browsers.connected(path, 2) as lines:
            answered = Counter(browsers.ask(line, web.WORKER)[1] for line in lines)
    assert list(answered.values()) == [browsers.CONNECTIONS // 2] * 2


def test_rows_have_percentiles(result: dict[str, Any]) -> None:
    """Nothing is a mean alone: a row has P50, P90, P99 and the maximum, in this order of size."""
    for part in ("limits", "requests", "growth", "contention", "system"):
        assert result[part], part
        for row in result[part]:
            assert row["n"] >= 1
            assert 0 < row["p50"] <= row["p90"] <= row["p99"] <= row["max"], row


def test_it_says_on_what(result: dict[str, Any]) -> None:
    """The result names machine, versions and server."""
    assert result["machine"]["cores"] >= 1
    assert {"python", "luasession", "flask", "flask-session", "redis"} <= result["versions"].keys()
    assert result["info"]["redis_version"]


def test_luasession_keeps_all(result: dict[str, Any]) -> None:
    """Parallel changes of one session are all kept by luasession, in the benchmark as anywhere."""
    ours = [row for row in result["contention"] if row["peer"] == peers.CACHED]
    assert ours
    assert [row["kept_least"] for row in ours] == [row["parallel"] for row in ours]


def test_a_missed_aim_is_shown(result: dict[str, Any]) -> None:
    """An aim is met or missed by the figures: with others the verdict is the other one."""
    what = "untouched, above the floor"

    def verdict() -> bool:
        return aims.find(aims.judge(result), what=what)["met"]

    where = {"shape": workloads.SMALL, "workload": "untouched"}
    floor = aims.find(result["requests"], peer=peers.FLOOR, **where)["p50"]
    row = aims.find(result["requests"], peer=peers.CACHED, **where)
    measured = row["p50"]
    row["p50"] = floor + 7
    assert verdict()
    row["p50"] = floor + 9
    assert not verdict()
    row["p50"] = measured
    assert len(aims.judge(result)) == len(result["aims"]) > 20


def test_pictures_are_drawn(path: Path) -> None:
    """Each picture is there light and dark, and is SVG; drawn again from the JSON it is the same."""
    folder = path.with_suffix("")
    first = {each.name: each.read_bytes() for each in folder.iterdir()}
    assert first.keys() == PICTURES
    for drawn in first.values():
        root = ET.fromstring(drawn)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 20
    command = [sys.executable, "-m", "benchmarks.plot", str(path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=60)
    assert {each.name: each.read_bytes() for each in folder.iterdir()} == first


def test_whoever_is_served_is_drawn(result: dict[str, Any], tmp_path: Path) -> None:
    """A full run serves more peers than the few of the smallest, and they have their bars as well."""
    row = aims.find(result["system"], peer=peers.FLOOR, worker_class=web.GTHREAD)
    served = [{**row, "peer": name} for name in peers.SERVED if name not in system.FEW]
    written = tmp_path / "result.json"
    written.write_text(json.dumps({**result, "system": result["system"] + served}))
    plot.draw(written)
    assert {each.name for each in written.with_suffix("").iterdir()} == PICTURES


def test_the_committed_result_is_a_full_one() -> None:
    """The result in the checkout is of a full run, with its pictures, and the README shows one of them."""
    newest = max(plot.RESULTS.glob("*.json"))
    assert json.loads(newest.read_text())["effort"] == "full"
    assert {each.name for each in newest.with_suffix("").iterdir()} >= PICTURES
    readme = (ROOT / "README.md").read_text()
    for theme in ("light", "dark"):
        assert f"benchmarks/results/{newest.stem}/contention-{theme}.svg" in readme
