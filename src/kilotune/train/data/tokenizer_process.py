"""What a tokenizer.json says, in parts: what own_tokenizer.py has run in a process of its own (kilotune/bounded.py)."""

from __future__ import annotations

import hashlib
import json
from typing import Any

IDLE = ("version", "truncation", "padding")  # of no effect on the tokens of a text here
NOTHING: tuple[Any, ...] = (None, False, "", [], {})


def parts(asked: dict[str, str]) -> dict[str, Any]:
    """``{"text"}`` -> ``{"sums": part -> SHA-256, "added": token -> number}``, or ``{"fault"}``.

    Files that differ only in how they are written down are the same.
    """
    try:
        found = json.loads(asked["text"])
        model = dict(found.pop("model"))
        if "merges" in model:  # older libraries write a pair as one text
            model["merges"] = [one.split(" ", 1) if isinstance(one, str) else one for one in model["merges"]]
        added = {one["content"]: one["id"] for one in found.pop("added_tokens", ())}
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        return {"fault": f"{type(error).__name__}: {error}"[:300]}
    named = {key: value for key, value in found.items() if key not in IDLE}
    named |= {f"model.{key}": value for key, value in model.items()}
    return {"sums": {key: _sum(value) for key, value in named.items() if value not in NOTHING}, "added": added}


def _sum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
