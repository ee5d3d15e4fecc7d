"""known_names.json says what the methods' configs and built-in models say; scripts/known_names.py writes it."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from kilotune import METHODS, ConfigError, config, get_config, known_names
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


@pytest.mark.parametrize("name", [*METHODS, *PRESETS])
def test_an_unknown_option_is_refused_as_the_methods_config_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    get_config(name)  # without options none is wrong, which settings rely on
    monkeypatch.setattr(config, "may_be_option", lambda option: False)
    wrong = ["rnk", "rank", "layer"]
    with pytest.raises(ConfigError) as by_list:
        config.check_listed_options(name, ["target_modules", *wrong])
    with pytest.raises(ConfigError) as by_config:
        get_config(name, target_modules="all-linear", **dict.fromkeys(wrong, 1))
    assert str(by_list.value) == str(by_config.value)


def test_what_is_not_listed_may_be_new_where_it_stands_in_the_methods_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert known_names.may_be_method("mine")  # these tests have imported the methods, to which they may have added
    assert known_names.may_be_option("mine")
    monkeypatch.setattr(known_names, "methods_are_loaded", lambda: False)
    assert [name for name in (*METHODS, *PRESETS) if not known_names.may_be_method(name)] == []
    own = {option for options in METHOD_OPTIONS.values() for option in options}
    assert [option for option in own if not known_names.may_be_option(option)] == []
    assert [name for name in ("verra", "lora(") if known_names.may_be_method(name)] == []
    assert [option for option in ("rnk", "rank", "seed", "r(", "") if known_names.may_be_option(option)] == []
    monkeypatch.setattr(known_names, "_code", lambda: "")  # installed without its sources
    assert known_names.may_be_method("verra")
