"""PEFT's example scripts on kilotune.peft; scripts/peft_own_examples.py runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

MINUTES = 20
# As the runner finds its parts, in a process of its own: without the libraries that a script takes half a minute for.
CHECKS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import peft_own_examples as runner
from peft_own import example_list, example_models, example_process, example_standins

def check(name, holds):
    if not holds:
        sys.exit(name)

here = Path(sys.argv[2])
some = runner.EXAMPLES
paths = [step.path for one in some for step in one.steps]
check("ten scripts", len({path for path in paths if path.endswith(".py")}) >= 10)
check("each is there once", len({one.name for one in some}) == len(some))
kinds = {*example_models.KINDS, "pipeline", "dora"}
check("models", {kind for one in some for _, kind in one.models} <= kinds)
models = {pair for one in some for pair in one.models}
check("a name has one model", len(dict(models)) == len(models))
check("data", {name for one in some for name in one.data} <= set(example_standins.DATA))
known = {value for value in vars(example_list).values() if isinstance(value, str)}
check("what stands in is known", {said for one in some for said in one.beside} <= known)
check("code of a notebook", example_process.code_of(here / "some.ipynb") == "a = 1\\nprint(a)\\nb = a + 1")

one = some[0]
good = {"changed": 1, "of": 2, "files": {}, "missing": []}
check("all is well", runner.fault_of(one, good) == "")
check("it raised", runner.fault_of(one, {"fault": "no"}) == "no")
check("nothing changed", "none of 2" in runner.fault_of(one, {**good, "changed": 0}))
check("not written", "out" in runner.fault_of(one, {**good, "missing": ["out"]}))
check("nothing is trained", not runner.fault_of(one._replace(trains=False), {**good, "changed": 0}))
try:
    runner.checkout(here)
except runner.FetchError as error:
    check("another folder is told", "no olora_finetuning" in str(error))
else:
    sys.exit("another folder is told")

import types
class Number:
    is_meta, requires_grad = False, True
    def __init__(self, value): self.value = value
class Model:
    def __init__(self, value): self.kept = {"a": Number(value), "b": Number(value)}
    def named_parameters(self): return self.kept.items()
    def push(self): return None
peft = types.ModuleType("peft")
peft.get_peft_model = lambda model: model
peft.PeftModel = type("PeftModel", (), {"from_pretrained": staticmethod(lambda model: model)})
trl = types.ModuleType("trl.some")
trl.get_peft_model = peft.get_peft_model
torch = types.ModuleType("torch")
torch.equal = lambda a, b: a.value == b.value
sys.modules |= {"peft": peft, "trl.some": trl, "torch": torch}
example_process.Watch.number = staticmethod(lambda p: types.SimpleNamespace(value=p.value, shape=()))
for get in ("peft.get_peft_model", "trl.get_peft_model", "peft.PeftModel.from_pretrained"):
    watch = example_process.Watch()
    watch.install()
    model = eval(get)(Model(1))
    check(f"{get}: nothing changed", watch.changed() == (0, 2))
    model.kept["a"].value = 2
    check(f"{get}: one changed", watch.changed() == (1, 2))
    merged = model.kept.pop("a")
    check(f"{get}: a merged one is known", watch.changed() == (1, 2))
"""
NOTEBOOK = [
    {"cell_type": "markdown", "source": ["# no code"]},
    {"cell_type": "code", "source": ["!pip install peft\n", "a = 1\n"]},
    {"cell_type": "code", "source": ["%%time\n", "print(a)"]},
    {"cell_type": "code", "source": ["%time b = a + 1"]},
]


def outcome(folder: Path, scripts: Path) -> str:
    """What the checks say of the runner there; nothing, where all hold."""
    (folder / "some.ipynb").write_text(json.dumps({"cells": NOTEBOOK}))
    done = subprocess.run(
        [sys.executable, "-c", CHECKS, str(scripts), str(folder)], capture_output=True, text=True, timeout=60
    )
    return (done.stderr.strip().splitlines() or ["failed"])[-1] if done.returncode else ""


def test_the_runners_own_parts(tmp_path: Path) -> None:
    assert outcome(tmp_path, ROOT / "scripts") == ""


@pytest.mark.parametrize(
    ("name", "right", "wrong", "told"),
    [
        ("peft_own_examples.py", 'if example.trains and not result["changed"]', "if False", "nothing changed"),
        ("peft_own_examples.py", 'if result["missing"]', "if False", "not written"),
        ("peft_own_examples.py", "if missing:", "if False:", "another folder is told"),
        ("peft_own/example_process.py", 'startswith(("!", "%%"))', 'startswith("%%")', "code of a notebook"),
        ("peft_own/example_process.py", "now.get(key, parameter)", "now.get(key)", "'NoneType'"),
        (
            "peft_own/example_process.py",
            "if value.requires_grad",
            "if not value.requires_grad",
            "get_peft_model: nothing",
        ),
    ],
)
def test_a_planted_fault_in_the_runner_is_told(name: str, right: str, wrong: str, told: str, tmp_path: Path) -> None:
    scripts = tmp_path / "scripts"
    for path in [ROOT / "scripts" / "peft_own_examples.py", *(ROOT / "scripts" / "peft_own").glob("*.py")]:
        copy = scripts / path.relative_to(ROOT / "scripts")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    source = (scripts / name).read_text()
    assert source.count(right) == 1, right
    (scripts / name).write_text(source.replace(right, wrong))
    assert told in outcome(tmp_path, scripts)


@pytest.mark.full
@pytest.mark.timeout(MINUTES * 60)
def test_pefts_example_scripts_run_to_their_end_on_both(tmp_path: Path) -> None:
    """On kilotune.peft and on PEFT, which write adapters with the same tensors; PEFT_CHECKOUT=... saves fetching."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import peft_own_examples as runner  # type: ignore[import-not-found, unused-ignore]
    finally:
        sys.path.pop(0)
    try:
        examples = runner.checkout(runner.fetch())
    except runner.FetchError as error:
        pytest.skip(f"PEFT's repository cannot be had here: {error}")
    seen: dict[str, Any] = {}
    for on in ("peft", "kilotune"):
        outcomes = runner.run(runner.EXAMPLES, examples, on, tmp_path / on)
        assert not [(one.name, one.fault) for one in outcomes if one.fault], on
        files = {one.name: one.result["files"] for one in outcomes}
        seen[on] = {name: {bare(folder): keys for folder, keys in found.items()} for name, found in files.items()}
    assert seen["kilotune"] == seen["peft"]


def bare(folder: str) -> str:
    """A folder whose name a script made of an enumeration's member: PEFT's say their class there."""
    return folder.replace("PeftType.", "").replace("TaskType.", "")
