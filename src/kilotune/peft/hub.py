"""A model's card, and its adapters on the hub."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError
from ..whole_file import replacing

__all__ = ["push_to_hub", "write_card"]

CARD = "README.md"
HEADING = "### Framework versions"
WORD = re.compile(r"[A-Za-z][A-Za-z-]*[A-Za-z]")


def write_card(model: Any, folder: Path) -> None:
    """Write README.md with the tags that a hub reads; what is there keeps its text and its other keys.

    Args:
        model: a PeftModel.
        folder: where its adapters are.

    """
    path = folder / CARD
    front, body = _parts(path.read_text(encoding="utf-8")) if path.exists() else ([], "")
    base = model.get_base_model()
    methods = {str(config.peft_type).lower() for config in model.peft_config.values()}
    of_base = {"transformers"} if type(base).__module__.startswith("transformers.") else set()
    of_base |= {
        f"base_model:adapter:{c.base_model_name_or_path}"
        for c in model.peft_config.values()
        if c.base_model_name_or_path
    }
    tags = sorted({*_tags(front), *(getattr(base, "model_tags", None) or ()), *methods, *of_base, "kilotune"})
    told: dict[str, Any] = {"library_name": "peft", "tags": tags}
    named = getattr(getattr(base, "config", None), "_name_or_path", None)
    if named is not None:
        told["base_model"] = named
    if any(c.task_type == "CAUSAL_LM" for c in model.peft_config.values()) and not _has(front, "pipeline_tag"):
        told["pipeline_tag"] = "text-generation"
    kept = _without(front, told)
    line = f"- kilotune {importlib.metadata.version('kilotune')}"
    if line not in body.splitlines():
        body = body.rstrip("\n")
        body = body.replace(HEADING, f"{HEADING}\n\n{line}", 1) if HEADING in body else f"{body}\n\n{HEADING}\n\n{line}"
    lines = [f"{key}: {_yaml(value)}" for key, value in told.items()]
    text = "\n".join(["---", *kept, *lines, "---", body.lstrip("\n"), ""])
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def _yaml(value: Any) -> str:
    """A value as YAML has it: plain where it is a word, else as JSON, which YAML reads too."""
    return value if isinstance(value, str) and WORD.fullmatch(value) else json.dumps(value, ensure_ascii=False)


def _parts(text: str) -> tuple[list[str], str]:
    """The lines of a card's front matter, and its text."""
    lines = text.splitlines()
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return [], text
    end = lines.index("---", 1)
    return lines[1:end], "\n".join(lines[end + 1 :])


def _entries(front: list[str]) -> list[tuple[str, list[str]]]:
    """(key, its lines) of a front matter."""
    found: list[tuple[str, list[str]]] = []
    for line in front:
        if line[:1] not in (" ", "-", "#", "") and ":" in line:
            found.append((line.partition(":")[0].strip(), [line]))
        elif found:
            found[-1][1].append(line)
    return found


def _has(front: list[str], key: str) -> bool:
    return any(name == key for name, _ in _entries(front))


def _without(front: list[str], told: dict[str, Any]) -> list[str]:
    return [line for key, lines in _entries(front) if key not in told for line in lines]


def _tags(front: list[str]) -> list[str]:
    """The tags that a card has."""
    for key, lines in _entries(front):
        if key == "tags":
            text = lines[0].partition(":")[2].strip()
            listed = text.strip("[]").split(",") if text else [line.strip().removeprefix("-") for line in lines[1:]]
            return [tag.strip().strip("\"'") for tag in listed if tag.strip()]
    return []


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapters",
    create_pr: bool = False,
) -> Any:
    """Save a model's adapters into a temporary folder, and upload that.

    Args:
        model: a PeftModel.
        repo_id: owner/name; made where it is not there.
        private, token, revision, commit_message, create_pr: as huggingface_hub has them.

    Raises:
        MissingExtraError: huggingface_hub is not installed.

    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "hub", "push_to_hub") from error
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message, create_pr=create_pr
        )
