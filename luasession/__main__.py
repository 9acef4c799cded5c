"""The command line: ``luasession demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from .errors import ConfigurationError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    parser = argparse.ArgumentParser(prog="luasession", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="three parallel requests against three kinds of session, over real HTTP",
        description="Serve one small app with Flask's cookie session, with Flask-Session and with"
        " luasession, send each the same parallel requests, and show which keys survive.",
    )
    demo.add_argument("--once", action="store_true", help="exit after the comparison; status 1 on any loss")
    port, requests = _between(1, 65_535), _between(1, 100)
    demo.add_argument("--port", type=port, default=5007, help="port to serve on (default: %(default)s)")
    demo.add_argument("--requests", type=requests, default=3, help="parallel requests (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        # Imported here, since it needs the extra luasession[demo].
        from .demo import run  # noqa: PLC0415

        return run(port=options.port, requests=options.requests, once=options.once)
    except KeyboardInterrupt:
        print()
        return 130
    except (ConfigurationError, ImportError, OSError) as error:
        print(f"luasession demo: {error}", file=sys.stderr)
        return 2


def _between(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low} to {high}, not {text!r}")
        return number

    return read


if __name__ == "__main__":
    sys.exit(main())
