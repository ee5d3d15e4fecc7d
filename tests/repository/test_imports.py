"""`import kilotune` needs torch, numpy and safetensors, and nothing else, broken or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kilotune
from tests.support.paths import ROOT

PACKAGE = ROOT / "src" / "kilotune"
OPTIONAL = (
    "accelerate",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "peft",
    "rich",
    "sklearn",
    "transformers",
    "typer",
)
# Parts that need an extra by their nature; each says so in one line when it is absent.
NEED_AN_EXTRA = ("kilotune.cli", "kilotune.experiments", "kilotune.vllm.native")
NEED_AN_EXTRA += ("kilotune.train.trainer.adapter_trainer", "kilotune.train.trainer.reference_trainer")
NEED_AN_EXTRA += ("kilotune.serve.http",)

# What users do first, on the plain path; run where every optional package is absent or broken.
PLAIN_PATH = """
import tempfile, torch
from kilotune import LoraConfig, PeftModel, VeraConfig, get_peft_model

def base():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))

model = get_peft_model(base(), VeraConfig(r=4, target_modules="all-linear"))
model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
model(torch.ones(2, 6)).sum().backward()
optimizer.step()
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(base(), folder)
    assert torch.equal(again(torch.ones(2, 6)), model(torch.ones(2, 6)))
merged = model.merge_and_unload()
assert type(merged[0]) is torch.nn.Linear
"""


def run(code: str, *first: Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter, with ``first`` before the library on its path."""
    path = os.pathsep.join(str(p) for p in (*first, PACKAGE.parent))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "error"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=cwd, timeout=240
    )


def fakes(folder: Path, body: str) -> Path:
    """A folder of packages with the optional packages' names that do ``body`` when they are imported."""
    for name in OPTIONAL:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(body)
    return folder


def modules() -> list[str]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        words = ["kilotune", *path.relative_to(PACKAGE).with_suffix("").parts]
        found.append(".".join(words[:-1] if words[-1] == "__init__" else words))
    return found


def test_import_kilotune_imports_nothing_optional() -> None:
    done = run(f"import sys, kilotune; print([n for n in {OPTIONAL!r} if n in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_importing_a_broken_package_would_be_noticed(tmp_path: Path) -> None:
    done = run("import rich", fakes(tmp_path, "raise RuntimeError('broken on purpose')"))
    assert "broken on purpose" in done.stderr


@pytest.mark.heavy
@pytest.mark.parametrize(
    "body",
    ["raise ModuleNotFoundError('not installed', name=__name__)", "raise RuntimeError('broken on purpose')"],
    ids=["absent", "broken"],
)
def test_the_plain_path_does_not_mind_the_optional_packages(tmp_path: Path, body: str) -> None:
    done = run(PLAIN_PATH, fakes(tmp_path, body))
    assert done.returncode == 0, done.stderr


@pytest.mark.heavy
def test_every_module_of_the_core_imports_without_extras(tmp_path: Path) -> None:
    core = [name for name in modules() if not name.startswith(NEED_AN_EXTRA)]
    assert "kilotune.model.peft_model" in core
    code = f"import importlib\nfor name in {core!r}: importlib.import_module(name)"
    done = run(code, fakes(tmp_path, "raise RuntimeError('broken on purpose')"))
    assert done.returncode == 0, done.stderr


def test_the_command_line_without_its_extra_is_one_line(tmp_path: Path) -> None:
    folder = fakes(tmp_path, "raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)")
    done = run("import sys; from kilotune.cli.main import main; sys.exit(main())", folder)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert "kilotune[cli]" in lines[0]


def test_all_is_sorted_and_real() -> None:
    # Constants, then classes, then functions, as ruff sorts every __all__ of the project (RUF022).
    def rank(name: str) -> tuple[int, str]:
        return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)

    assert list(kilotune.__all__) == sorted(kilotune.__all__, key=rank)
    assert len(set(kilotune.__all__)) == len(kilotune.__all__)
    assert [name for name in kilotune.__all__ if not hasattr(kilotune, name)] == []
