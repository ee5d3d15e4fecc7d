"""What README and the docs tell people to type is run: Python as it stands, commands by name and option."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.paths import ROOT

# CONTRIBUTING.md has a test of its own; docs/readme.md and its like include the pages of the root.
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_COMMANDS = [*PAGES, ROOT / "CONTRIBUTING.md"]
LONG = {"demo", "intrinsic-dimension", "init", "train", "chat", "generate", "evaluate", "export", "compare", "store"}
LONG |= {"experiment", "fleet", "doctor", "serve", "keys", "fetch"}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of ``languages``."""
    text = page.read_text(encoding="utf-8")
    return [body for language, body in FENCE.findall(text) if language in languages]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each shell line, comments left out."""
    for block in blocks(page, "bash", "sh", "shell"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                yield words


# Pages whose Python takes the reader's own model and data by name: their imports are run here. The first two are run
# whole by tests of their own (tests/fleet/store/test_contract.py, tests/train/finished/test_using_docs.py).
FRAGMENTS = {"deploy.md", "serve.md", "store.md", "using.md", "fleet.md", "engines.md"}


# vLLM has an environment of its own, and tests/vllm_plugin runs what its page says; teach.md talks to a service, which
# tests/serve/http/test_teaching_page.py starts.
ELSEWHERE = {"vllm.md", "teach.md"}


def python_pages() -> list[Path]:
    return [page for page in PAGES if blocks(page, "python") and page.name not in FRAGMENTS | ELSEWHERE]


@pytest.mark.parametrize("name", sorted(FRAGMENTS))
def test_what_fragments_import_is_there(name: str) -> None:
    found = 0
    for number, block in enumerate(blocks(ROOT / "docs" / name, "python")):
        tree = ast.parse(block, f"{name}, python block {number}")
        imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        exec(compile(ast.Module(imports, []), f"{name}, python block {number}", "exec"), {})
        found += len(imports)
    assert found


@pytest.fixture
def peft_folder(tmp_path: Path) -> Path:
    """``from-peft``: a folder that PEFT itself wrote, for a model of README's shape."""
    import peft

    base = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
    config = peft.VeraConfig(r=4, target_modules=["0", "2"])
    peft.get_peft_model(base, config).save_pretrained(str(tmp_path / "from-peft"))
    return tmp_path / "from-peft"


@pytest.mark.heavy
@pytest.mark.parametrize("page", python_pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_python_of_the_page_runs(
    page: Path, peft_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, python block {number}", "exec"), names)
    if page == ROOT / "README.md":
        assert {p.name for p in Path("my-adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
        run_the_verbs(page)


def run_the_verbs(page: Path) -> None:
    """Run the page's ``kilotune`` commands on what its Python left; those that train have tests of their own."""
    from typer.testing import CliRunner

    from kilotune.cli.main import app

    verbs = [words[1:] for words in commands(page) if words[0] == "kilotune" and words[1] not in LONG]
    assert {words[0] for words in verbs} == {"plan", "inspect", "merge", "convert"}
    for words in verbs:
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"{words}: {done.output}"


def test_the_own_model_of_readme_is_ten_lines() -> None:
    first = blocks(ROOT / "README.md", "python")[0]
    lines = [line for line in first.splitlines() if line.strip() and not line.endswith("# yours")]
    ours = [line for line in lines if not line.startswith(("import", "from")) and "# yours" not in line]
    assert len(ours) <= 10
    assert sum("save_pretrained" in line for line in ours) == 1


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE))


def parser(words: list[str]) -> Any:
    """The click command of ``kilotune <verb>``, looked up without running it."""
    import typer.main

    from kilotune.cli.main import app

    group = typer.main.get_command(app)
    assert hasattr(group, "commands"), "kilotune has verbs"
    assert words[1] in group.commands, f"kilotune has no verb {words[1]!r}: {sorted(group.commands)}"
    command = group.commands[words[1]]
    verbs = getattr(command, "commands", {})  # kilotune store put
    return verbs[words[2]] if len(words) > 2 and words[2] in verbs else command


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_commands_of_the_page_exist(page: Path) -> None:
    for words in commands(page):
        if words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word]
            assert set(targets) <= make_targets(), words
        elif words[0] == "kilotune":
            command = parser(words)
            known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
            used = {word.split("=")[0] for word in words if word.startswith("-")}
            assert used <= known, f"{words}: unknown {sorted(used - known)}"
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), words
        elif words[0] == "python":
            assert (ROOT / words[1]).exists(), words
        else:
            known = {"pip", "git", "cd", "curl", "torchrun", "accelerate"}
            assert words[0] in known, f"nothing checks this command: {words}"


def test_readme_names_every_verb() -> None:
    import typer.main

    from kilotune.cli.main import app

    named = {words[1] for words in commands(ROOT / "README.md") if words[0] == "kilotune"}
    assert named == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", [*WITH_COMMANDS, ROOT / "ARCHITECTURE.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_first_screen_of_readme_has_the_two_commands() -> None:
    screen = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:24]
    assert {"make demo", "make test"} <= {line.split("  ")[0].strip() for line in screen}
