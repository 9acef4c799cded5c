"""The README: that of the checkout, and elsewhere the one that the installed package carries."""

from __future__ import annotations

from importlib.metadata import metadata
from pathlib import Path

PATH = Path(__file__).parents[1] / "README.md"


def readme() -> str:
    """Return the text."""
    if PATH.exists():
        return PATH.read_text(encoding="utf-8")
    text = metadata("luasession").get_payload()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text
