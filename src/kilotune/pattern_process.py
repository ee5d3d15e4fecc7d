"""One regular expression and many names: what patterns.py has run in a process of its own (bounded.py).

It takes ``{"how", "pattern", "names"}``, and gives ``{"found": {"3": "text of the last group"}}``, where 3 is the place
of a name, or ``{"fault": "..."}``. It imports nothing of kilotune, so it is loaded soon.
"""

from __future__ import annotations

import re
from typing import Any


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
