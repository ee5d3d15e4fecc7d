"""One regular expression and many names: a program of its own, which patterns.py runs and ends.

It reads a JSON object (how, pattern, names, seconds), and gives one: ``{"found": {"3": "text of the last group"}}``,
where 3 is the place of a name, or ``{"fault": "..."}``. It imports nothing of kilotune, so it starts soon.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

MEMORY = 2**30  # bytes


def bound(seconds: float) -> None:
    """End by itself, where there is nobody any more who would end this process; and take no memory without end."""
    try:
        import resource
        import signal
    except ImportError:  # not on Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.setitimer(signal.ITIMER_REAL, seconds + 1.0)  # nobody handles it, so it ends the process in a match, too


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """What patterns.py asks for."""
    try:
        made = re.compile(asked["pattern"])
    except (re.error, OverflowError, RecursionError) as error:
        return {"fault": str(error)}
    if asked["how"] == "compile":
        return {}
    matches = map(getattr(made, asked["how"]), asked["names"])
    return {"found": {place: match.group(made.groups) for place, match in enumerate(matches) if match is not None}}


if __name__ == "__main__":
    given = json.load(sys.stdin)
    bound(given["seconds"])
    json.dump(answer(given), sys.stdout)
