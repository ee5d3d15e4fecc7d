"""Settings of a fine-tuning: checked when built, every fault at once, and the same after a way through a file."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilotune.errors import ConfigError
from kilotune.methods import METHODS, PRESETS
from kilotune.train.settings.config_file import load_settings, merged, settings_from, settings_text, starting_text
from kilotune.train.settings.rates import rate_for, usual
from kilotune.train.settings.sections import (
    METHOD_NAMES,
    SECTIONS,
    TASK_NAMES,
    AdapterSettings,
    DataSettings,
    ModelSettings,
    TrainingSettings,
    TrainSettings,
)

LEAST: dict[str, Any] = {"model": {"base": "some/model"}}


def faults(values: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        settings_from(values, "config.yaml")
    headline, *lines = str(caught.value).split("\n  - ")
    assert headline == "config.yaml:"
    return lines


# -- faults --------------------------------------------------------------------------------------------


def test_all_faults_of_all_sections_are_reported_at_once() -> None:
    found = faults(
        {
            "taks": "causal-lm",
            "model": {"base": "m", "dtype": "float23"},
            "adapter": {"method": "lroa"},
            "data": {"columns": {"promt": "q"}, "max_length": 1},
            "training": {"batch_size": 0, "epochs": "three", "seed": True},
            "logging": {"csv": "yes"},
        }
    )
    for start, hint in (
        ("taks: there is no such setting", "Did you mean 'task'?"),
        ("model.dtype: expected one of auto, float32, bfloat16, float16, got 'float23'", "Did you mean 'float32'?"),
        ("adapter.method: expected one of lora, vera", "Did you mean 'lora'?"),
        ("data.columns: there is no role 'promt'", "Did you mean 'prompt'?"),
        ("data.max_length: expected a whole number >= 2, got 1", ""),
        ("training.batch_size: expected a whole number >= 1, got 0", ""),
        ("training.epochs: expected a number above 0, got 'three'", ""),
        ("training.seed: expected a whole number >= 0, got True", ""),
        ("logging.csv: expected true or false, got 'yes'", ""),
    ):
        assert [line for line in found if line.startswith(start) and hint in line], (start, found)
    assert len(found) == 9


@pytest.mark.parametrize(
    ("place", "key", "answer"),
    [
        ("", "learning_rate", "Did you mean 'training.learning_rate'?"),
        ("training", "lr", "Did you mean 'training.learning_rate'?"),
        ("training", "learning_rat", "Did you mean 'training.learning_rate'?"),
        ("model", "base_model", "Did you mean 'model.base'?"),
        ("training", "gradient_checkpointing", "Did you mean 'model.gradient_checkpointing'?"),
        ("adapter", "r", "It is an option of the method: adapter.options.r"),
        ("adapter", "rank", "It is an option of the method: adapter.options.r"),
        ("logging", "xyz", "All: progress, log_every, csv, tensorboard, report"),
    ],
)
def test_a_key_in_the_wrong_place_says_the_right_one(place: str, key: str, answer: str) -> None:
    values = {place: {key: 1}} if place else {key: 1}
    line = next(line for line in faults({**LEAST, **values}) if key in line)
    assert line.startswith(f"{place}.{key}: " if place else f"{key}: ")
    assert answer in line


def test_a_missing_model_is_said() -> None:
    assert faults({}) == ["model.base: is missing: a folder, or a hub id such as 'org/name'"]
    with pytest.raises(ConfigError, match="model: expected ModelSettings, got None"):
        TrainSettings()


def test_the_methods_own_options_are_checked_at_once() -> None:
    adapter = {"method": "vera", "options": {"rank": 3, "d_initial": "much"}}
    assert any(
        "adapter.options: unknown option 'rank'. Did you mean 'r'?" in line
        for line in faults({**LEAST, "adapter": adapter})
    )
    adapter = {"method": "dora", "options": {"use_dora": False}}
    assert any("'dora' stands for use_dora=True" in line for line in faults({**LEAST, "adapter": adapter}))
    assert faults({**LEAST, "adapter": {"method": "full", "options": {"r": 2}}}) == [
        "adapter.options: method 'full' is no adapter, so it has none"
    ]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"data": {"validation": "v.csv", "validation_fraction": 0.1}},
            "data.validation_fraction: has no effect beside",
        ),
        ({"data": {"validation_fraction": 0.5, "test_fraction": 0.5}}, "leave nothing to train on"),
        ({"data": {"train": []}}, "data.train: expected a path or a list of paths, got []"),
        ({"data": {"splits": {"dev": "x"}}}, "data.splits: there is no split 'dev' here"),
        ({"training": {"warmup": 1.5}}, "training.warmup: expected a part of the steps below 1, or a whole number"),
        ({"training": {"eval_every": "epochs"}}, "training.eval_every: expected a number of steps or 'epoch'"),
        ({"training": {"eval_every": None, "early_stopping": 2}}, "training.early_stopping: has no effect with"),
        ({"training": {"epochs": 0}}, "training.epochs: expected a number above 0, got 0"),
        ({"training": {"learning_rate": math.inf}}, "training.learning_rate: expected a number"),
        ({"adapter": {"method": "full"}, "model": {"base": "m", "quantization": "nf4"}}, "cannot be trained by 'full'"),
        (
            {"adapter": {"method": "head"}, "training": {"head_learning_rate": 1e-3}},
            "has no effect with adapter.method",
        ),
        ({"task": "seq2seq", "data": {"packing": True}}, "data.packing: is for the task causal-lm only"),
        ({"task": "image-classification", "data": {"max_length": 5}}, "pictures have no tokens"),
        ({"data": {"format": "images"}}, "does not fit the task causal-lm"),
        ({"adapter": {"start": "a", "options": {"r": 2}}}, "brings its own options"),
        ({"training": []}, "training: expected settings with values, got []"),
    ],
)
def test_what_does_not_go_together(values: dict[str, Any], line: str) -> None:
    found = faults({**LEAST, **values})
    assert len(found) == 1, found
    assert line in found[0]


def test_sections_are_frozen_and_take_names_only() -> None:
    with pytest.raises(AttributeError):
        ModelSettings(base="m").base = "n"  # type: ignore[misc]
    with pytest.raises(TypeError):
        AdapterSettings(options={"r": 2}).options["r"] = 3  # type: ignore[index]
    with pytest.raises(ConfigError, match="by name, not by position"):
        DataSettings("train.jsonl")  # type: ignore[misc]
    with pytest.raises(ConfigError, match="training.epoch: there is no such setting. Did you mean 'epochs'"):
        TrainingSettings(epoch=3)  # type: ignore[call-arg]


@given(
    st.dictionaries(
        st.sampled_from(["task", "output", *SECTIONS, "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from([name for section in SECTIONS.values() for name in section.names()]),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=8,
        ),
    )
)
def test_whatever_stands_there_is_settings_or_one_error(values: dict[str, Any]) -> None:
    try:
        made = settings_from(values)
    except ConfigError:
        return
    assert settings_from(made.to_dict()) == made


# -- files ---------------------------------------------------------------------------------------------


def test_there_and_back(tmp_path: Path) -> None:
    made = settings_from(
        {
            "output": "out",
            "model": {"base": "ünder/müdel", "dtype": "bfloat16"},
            "adapter": {
                "method": "lora",
                "options": {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 2.5},
            },
            "data": {"train": ["a.jsonl", "b.jsonl"], "columns": {"prompt": "question: yes?"}},
            "training": {"learning_rate": 1e-5, "eval_every": 20, "early_stopping": 3},
        }
    )
    path = tmp_path / "config.yaml"
    path.write_text(settings_text(made), encoding="utf-8")
    assert load_settings(path) == made
    assert pickle.loads(pickle.dumps(made)) == made  # noqa: S301  # our own bytes: worker processes get them
    assert copy.deepcopy(made) == made
    assert made.replace(output="other").model is made.model


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-3", "+1e-3", ".1e-2"])
def test_numbers_as_everybody_writes_them(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"model: {{base: m}}\ntraining:\n  learning_rate: {text}\n")
    assert load_settings(path).training.learning_rate == 1e-3
    assert settings_from(merged(LEAST, [f"training.learning_rate={text}"])).training.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {base: m}\ntraining:\n  epochs: 1\n  epochs: 2\n", ":4: no valid YAML: the key 'epochs' stands twice"),
        ("model: {base: m\ntask: x\n", ":2: no valid YAML"),
        ("- a\n- b\n", "expected settings with values (key: value), got list"),
        ("model: !!python/object/apply:os.system ['true']\n", ":1: no valid YAML: could not determine a constructor"),
        ("? [a, b]\n: 1\n", ":1: no valid YAML: a key has to be a plain word"),
        ("a: 2020-99-99\n", "no valid YAML"),
        ("\x00", "no valid YAML"),
    ],
)
def test_a_broken_file_says_where(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    assert str(caught.value).startswith(f"{path}")
    assert said in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config file .*: No such file"):
        load_settings(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("task: \xff".encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot read the config file"):
        load_settings(tmp_path / "latin.yaml")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfmodel: {base: m}\n")
    assert load_settings(tmp_path / "bom.yaml").model.base == "m"


def test_overrides() -> None:
    values = merged(
        LEAST, ["training.epochs=5", "adapter.options.target_modules=[a, b]", "data.validation=null", "task=seq2seq"]
    )
    made = settings_from({**values, "adapter": {**values["adapter"], "method": "lora"}})
    assert (made.training.epochs, made.task, made.data.validation) == (5, "seq2seq", None)
    assert made.adapter.options["target_modules"] == ("a", "b")
    assert LEAST == {"model": {"base": "some/model"}}, "the values themselves stay as they are"
    for override in ("training.epochs", "=3", " =3"):
        with pytest.raises(ConfigError, match="expected KEY=VALUE"):
            merged(LEAST, [override])
    with pytest.raises(ConfigError, match="model.base.x: model.base is 'some/model', and has no settings inside"):
        merged(LEAST, ["model.base.x=1"])
    with pytest.raises(ConfigError, match=r"--set a=\[: no valid YAML|--set a=\[:1: no valid YAML"):
        merged(LEAST, ["a=["])


@pytest.mark.parametrize("task", TASK_NAMES)
def test_the_commented_file_has_every_setting_with_its_help_and_says_the_same(task: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    values = {"task": task, "output": "out", "model": {"base": "m"}, "adapter": {"method": "lora", "options": {"r": 2}}}
    text = starting_text(values)
    path.write_text(text, encoding="utf-8")
    assert load_settings(path) == settings_from(values)
    words = " ".join(text.replace("#", " ").split())
    for section in (TrainSettings, *SECTIONS.values()):
        for name in section.names():
            assert f"{name}:" in text
            assert " ".join(section.help_of(name).split()) in words
    assert max(map(len, text.splitlines())) <= 120


# -- what else must hold ---------------------------------------------------------------------------------


def test_the_names_are_those_of_the_library() -> None:
    from kilotune.train.tasks import TASKS

    assert set(TASKS) == set(TASK_NAMES)
    assert set(METHOD_NAMES) == {*METHODS, *PRESETS, "full", "head"}


def test_every_method_has_a_rate_that_falls_with_the_steps() -> None:
    assert {*METHODS, "full", "head"} <= set(METHOD_NAMES)
    for name in METHOD_NAMES:
        rates = [rate_for(name, steps) for steps in (1, 20, 100, 1_000, 10_000, 10**9)]
        assert all(1e-6 < rate < 2 for rate in rates)
        assert rates == sorted(rates, reverse=True)
        assert rates[0] == rates[1]
        assert rates[-1] == rates[-2]
        assert rates[2] == pytest.approx(usual(name)[0], rel=0.01)
    assert rate_for("dvora", 300) == rate_for("vera", 300)


def test_paths_may_be_paths(tmp_path: Path) -> None:
    made = TrainSettings(
        output=tmp_path / "out",  # type: ignore[arg-type]
        model=ModelSettings(base=tmp_path),  # type: ignore[arg-type]
        data=DataSettings(train=[tmp_path / "a"]),  # type: ignore[list-item]
    )
    assert (made.output, made.model.base, made.data.train) == (
        str(tmp_path / "out"),
        str(tmp_path),
        (str(tmp_path / "a"),),
    )
