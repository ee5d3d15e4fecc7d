"""The entry of the command line. Importing it needs no extra; running it, or asking for ``app``, does.

====  ======================================================================
code  meaning
====  ======================================================================
0     done
1     done, and the answer is no (a checksum does not match, a check failed)
2     an error: one line on stderr, nothing on stdout
130   interrupted
====  ======================================================================
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError

if TYPE_CHECKING:
    from typer import Typer

    app: Typer

__all__ = ["app", "main"]

ERROR = 2


def __getattr__(name: str) -> Any:
    if name == "app":
        from ._app import app

        return app
    raise AttributeError(name)


def main() -> None:
    """Run the command line (the ``kilotune`` command) on ``sys.argv``; ends the process."""
    try:
        from ._app import app
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "kilotune":
            raise
        missing = MissingExtraError((error.name or "typer").partition(".")[0], "cli", "the command line")
        print(f"error: {missing}", file=sys.stderr)
        sys.exit(ERROR)
    app()


if __name__ == "__main__":
    main()
