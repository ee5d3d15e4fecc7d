"""The alias by which PEFT's tests get kilotune.peft: on made-up packages, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

ALIAS = ROOT / "scripts" / "peft_own" / "alias.py"
# PEFT's sources are read, never run.
SOURCES = {
    "__init__.py": "raise RuntimeError\nfrom .tuners.loha import LoHaConfig\nfrom .tuners.lora import LoraConfig\n"
    "if True:\n    class PeftWarning(UserWarning): ...\n",
    "import_utils.py": "def is_nothing_available(): ...\n",
    "tuners/__init__.py": "",
    "tuners/lora/__init__.py": "from .layer import Linear, GPTQLinear\n",
    "tuners/lora/layer.py": "class Linear: ...\nLIMIT: int = 3\n",
    "tuners/loha.py": "class LoHaConfig: ...\nclass LoHaLayer: ...\n",
}
OURS = {
    "__init__.py": "",
    "like/__init__.py": "from .tuners.lora import LoraConfig\n"
    "def __getattr__(name):\n    raise ImportError(f'{name} is left out')\n",
    "like/tuners/__init__.py": "",
    "like/tuners/lora/__init__.py": "class LoraConfig: ...\n",
    "like/tuners/lora/layer.py": "class Linear: ...\ndef size():\n    return LIMIT\nLIMIT = 3\n",
    "like/broken.py": "import no_such_library\n",
}
INSTALLED = {"__init__.py": "raise RuntimeError('the peft that is installed')\n"}
CHECKS = """
import sys
from pathlib import Path
from unittest import mock
import alias
finder = alias.install(Path(sys.argv[1]) / "peft", "ours.like")
import peft, peft.tuners.lora.layer as layer, ours.like, ours.like.tuners.lora.layer as real
from peft import LoHaConfig, LoraConfig, PeftWarning
from peft.tuners import loha, lora
from peft.import_utils import is_nothing_available

def fails(error, action, name=None):
    try:
        action()
    except error as caught:
        return type(caught) is error and (name is None or caught.name == name)
    return False

def check(name, holds):
    if not holds:
        sys.exit(name)

check("ours is given", LoraConfig is ours.like.LoraConfig and layer.Linear is real.Linear)
check("a missing name is a stub", isinstance(LoHaConfig, type) and LoHaConfig.__name__ == "LoHaConfig")
check("one stub a name", loha.LoHaConfig is LoHaConfig)
check("a stub is no class of ours", not issubclass(LoraConfig, LoHaConfig) and not isinstance(3, LoHaConfig))
check("a stub raises when it is called", fails(alias.LeftOut, lambda: LoHaConfig(r=3)))
with alias.inert_stubs():
    LoHaConfig(r=3)
check("a stub raises after collecting", fails(alias.LeftOut, lambda: LoHaConfig(r=3)))
check("a warning is one", issubclass(PeftWarning, Warning))
check("a library is not there", is_nothing_available() is False)
check("what PEFT lacks is not there", fails(AttributeError, lambda: peft.NoSuchName))
check("nor is such a module", fails(ModuleNotFoundError, lambda: __import__("peft.no_such_module")))
check("a fault of ours is told", fails(ModuleNotFoundError, lambda: __import__("peft.broken"), "no_such_library"))
check("submodules are fronts", lora is sys.modules["peft.tuners.lora"] and lora.layer is layer)
check("a missing name in a submodule", isinstance(lora.GPTQLinear, type))
check("fronts stay out of ours", ours.like.tuners is sys.modules["ours.like.tuners"])
with mock.patch("peft.tuners.lora.layer.LIMIT", 5):
    check("a patch reaches ours", real.size() == 5)
check("a patch is taken back", real.size() == 3 and layer.LIMIT == 3)
layer.LIMIT = 4
check("setting reaches ours", real.LIMIT == 4)
check("too late", fails(ImportError, lambda: alias.install(Path(sys.argv[1]) / "peft", "ours.like")))
"""


def outcome(folder: Path, alias: str) -> str:
    """What the checks say of an alias; nothing, where all hold."""
    trees = {
        "sources/peft": SOURCES,
        "path/ours": OURS,
        "path/peft": INSTALLED,
        "path": {"alias.py": alias, "checks.py": CHECKS},
    }
    for top, files in trees.items():
        for name, text in files.items():
            path = folder / top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    command = [sys.executable, "-S", str(folder / "path" / "checks.py"), str(folder / "sources")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return (done.stderr.strip().splitlines() or ["failed"])[-1] if done.returncode else ""


def test_the_alias_gives_ours_and_stubs(tmp_path: Path) -> None:
    assert outcome(tmp_path, ALIAS.read_text()) == ""


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        ("sys.meta_path.insert(0, finder)", "sys.meta_path.append(finder)", "the peft that is installed"),
        ("except (AttributeError, ImportError):", "except AttributeError:", "left out"),
        ("@functools.cache\ndef stub", "def stub", "one stub a name"),
        ("_Stub.inert = False\n\n", "pass\n\n", "a stub raises after collecting"),
        ("Warning if", "object if", "a warning is one"),
        ("return not_here if", "return stub(name) if", "is_nothing_available is left out"),
        ("if name in names and", "if", "is left out"),
        (
            "    return importlib.import_module(target) if found else None",
            "    try:\n        return importlib.import_module(target)\n    except ImportError:\n        return None",
            "a fault of ours is told",
        ),
        ("isinstance(value, Front) or", "", "fronts stay out of ours"),
        ("return {} if real is None else vars(real)", "return {}", "'LIMIT' is not defined"),
        ("setattr(real, name, value)", "super().__setattr__(name, value)", "a patch reaches ours"),
        ("if there:", "if False:", "too late"),
    ],
)
def test_a_planted_fault_in_the_alias_is_told(right: str, wrong: str, told: str, tmp_path: Path) -> None:
    source = ALIAS.read_text()
    assert source.count(right) == 1, right
    assert told in outcome(tmp_path, source.replace(right, wrong))
