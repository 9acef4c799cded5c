"""Each guard of the scripts is one that a test would miss: taken out, a named test fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from luasession.scripts import script

from .mutations import CONTROL, FAILED, MUTATIONS, PASSED, Mutation


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What each killer came to, under each mutation."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutations"],
        cwd=root,
        # What somebody has pytest do besides is not for the runs within.
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_guard_is_there_once(mutation: Mutation) -> None:
    """The text that a mutation takes out is in the script once, so that the table cannot rot."""
    assert script(mutation.script).text.decode().count(mutation.old) == 1


def test_the_killers_pass_as_it_is(found: dict[str, Any]) -> None:
    """With all guards in their places all the killers pass."""
    assert set(found["verdicts"][""].values()) == {PASSED}, found["log"]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_guard_taken_out_is_missed(found: dict[str, Any], mutation: Mutation) -> None:
    """Without the guard one of its killers fails by an assertion, while plain sessions go on working."""
    verdicts = found["verdicts"][mutation.name]
    assert verdicts.pop(CONTROL) == PASSED
    assert FAILED in verdicts.values(), verdicts
