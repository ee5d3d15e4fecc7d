"""known_names.json says what the methods' configs and built-in models say; scripts/known_names.py writes it."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from kilotune import METHODS
from kilotune.known_names import DTYPE_NAMES, METHOD_OPTIONS, MODEL_NAMES, PRESET_NAMES
from kilotune.methods import PRESETS
from kilotune.plan import BUILT_IN, DTYPES
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("known_names_script", ROOT / "scripts" / "known_names.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_is_what_the_script_writes(script: ModuleType) -> None:
    assert script.FILE.read_text(encoding="utf-8") == script.text(), "run: python scripts/known_names.py"


def test_the_names_are_those_of_the_methods_presets_models_and_dtypes() -> None:
    assert [*METHOD_OPTIONS] == [*METHODS]
    assert tuple(PRESETS) == PRESET_NAMES
    assert set(BUILT_IN) < set(MODEL_NAMES)
    assert tuple(DTYPES) == DTYPE_NAMES
    assert METHOD_OPTIONS["vera"]["r"] == METHODS["vera"].config_cls.help_of("r")
