"""Some lines of a training file: what file_reader.py has run in a process of its own (kilotune/bounded.py).

It is prepared with ``{"folder"}``, a saved tokenizer, and takes ``{"text", "first", "form", "longest"}``. It gives
``{"examples": [[line, raw, [[ids, labels], ...]], ...], "faults": ["line 3: ..."]}``.
"""

from __future__ import annotations

from typing import Any

held: dict[str, Any] = {}


def prepare(given: dict[str, Any]) -> None:
    """Load what is needed, and try it once: a child opens no files."""
    from kilotune.serve.learning.training_file import read_lines
    from kilotune.train.data.processors import load_tokenizer
    from kilotune.train.data.rendering import ChatTemplate

    held["read"], held["tokenizer"] = read_lines, load_tokenizer(given["folder"])
    held["chats"] = ChatTemplate(held["tokenizer"])
    held["chats"].warm()
    line = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    read({"text": line, "first": 1, "form": "supervised", "longest": 1000})


def read(asked: dict[str, Any]) -> dict[str, Any]:
    """What file_reader.py asks for."""
    examples, faults = held["read"](
        asked["text"], asked["first"], asked["form"], held["chats"], held["tokenizer"], longest=asked["longest"]
    )
    rows = [
        [one.line, one.raw, [[list(row["input_ids"]), list(row["labels"])] for row in one.rows]] for one in examples
    ]
    return {"examples": rows, "faults": faults}
