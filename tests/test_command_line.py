"""The command line: what it refuses, and how the demo ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from luasession.__main__ import main

from .servers import eventually

#: ``python -m luasession`` as it is in front. What a shell starts in the background ignores Ctrl-C, and so does all
#: that this starts: the run of these tests, say.
IN_FRONT = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("luasession", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "arguments",
    [["--port", "99999"], ["--port", "0"], ["--port", "x"], ["--requests", "0"], ["--requests", "-3"]],
)
def test_wrong_numbers(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """They are named, together with what was expected."""
    with pytest.raises(SystemExit) as ended:
        main(["demo", *arguments])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"argument {arguments[0]}: must be a number from 1 to" in said
    assert repr(arguments[1]) in said


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a short path: pytest's own are too long for a socket."""
    with tempfile.TemporaryDirectory(prefix="luasession-") as name:
        yield Path(name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_the_demo_takes_its_servers_along(number: signal.Signals, short: Path) -> None:
    """Ended from outside, by its terminal or by Ctrl-C, it leaves no server, no port in use and no files."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    demo = subprocess.Popen(
        [sys.executable, "-c", IN_FRONT, "demo", "--port", str(port)],
        env={**os.environ, "TMPDIR": str(short), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def is_served() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return False
        return True

    try:
        assert eventually(is_served, 30)
        demo.send_signal(number)
        _, said = demo.communicate(timeout=60)
    finally:
        demo.kill()
        demo.wait()
    assert demo.returncode == (130 if number == signal.SIGINT else 128 + number)
    assert "Traceback" not in said
    assert eventually(lambda: not is_served(), 10)
    assert eventually(lambda: not list(short.iterdir()), 10)
