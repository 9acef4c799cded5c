"""Web servers: the peers under gunicorn, each on a unix socket of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from flask import Flask

from .peers import make_app
from .population import TEN

_ROOT = Path(__file__).parents[1]
#: The worker classes, by gunicorn's names.
GTHREAD, GEVENT = "gthread", "gevent"
PROCESSES, THREADS = 2, 4
#: Where the worker that answers says which it is.
WORKER = "/worker"
_PATIENCE = 30.0
_OPTIONS = {
    GTHREAD: ("--threads", str(THREADS), "--preload"),
    # No preload: gevent patches the standard library in the worker, and what was made before it, in the
    # process that forks, clients and their locks too, would be the unpatched kind.
    GEVENT: (),
}


@dataclass(frozen=True, slots=True)
class Serving:
    """A peer, and what serves it."""

    peer: str
    worker_class: str
    processes: int


def serve(name: str, redis_socket: str) -> Flask:
    """Make the app of a peer, for gunicorn."""
    app = make_app(name, redis_socket, TEN)
    app.add_url_rule(WORKER, "worker", lambda: str(os.getpid()))
    return app


class Gunicorns:
    """Web servers that run for a block, each on a unix socket in one folder."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for process in self._processes:
            # With its workers: nobody is served any more, and to end in peace takes seconds.
            os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait(_PATIENCE)

    def start(self, serving: Serving, redis_socket: str) -> tuple[int, str]:
        """Serve a peer; return the process id and the socket, which soon answers."""
        path = f"{self._folder}/{len(self._processes)}.sock"
        app = f"benchmarks.web:serve({serving.peer!r}, {redis_socket!r})"
        command = [sys.executable, "-m", "gunicorn", app, "--bind", f"unix:{path}"]
        command += ["--worker-class", serving.worker_class, "--workers", str(serving.processes)]
        command += [*_OPTIONS[serving.worker_class], "--keep-alive", "60", "--log-level", "error"]
        # gunicorn keeps a socket for its own control; it goes with the rest.
        environment = {**os.environ, "XDG_RUNTIME_DIR": self._folder}
        self._processes.append(subprocess.Popen(command, cwd=_ROOT, env=environment, start_new_session=True))
        return self._processes[-1].pid, path


def cpu_of_workers(pid: int) -> float | None:
    """Return the CPU seconds of a web server's workers so far, None where the system does not tell."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ticks = 0
        for child in children:
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    except OSError:
        return None
    return ticks / os.sysconf("SC_CLK_TCK")
