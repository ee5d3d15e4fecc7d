"""``kilotune plan`` and what all verbs share: errors, help, --version, the entry of the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

import kilotune as library
from kilotune.cli import _app, main
from kilotune.config import AdapterConfig
from kilotune.methods import METHODS
from tests.support.cli_helpers import LLAMA, as_json, error, kilotune
from tests.support.paths import ROOT


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "kilotune.cli.main", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment},
    )


# -- plan ----------------------------------------------------------------------------------------------


def test_the_four_layer_example() -> None:
    words = ("plan", "four-layer", "--rank", 16, "--method")
    lora = as_json(*words, "lora")["plans"][0]
    assert lora["parameters"]["trainable"] == 12_960
    vera = as_json(*words, "vera", "--set", "sharing=shape")
    counts = vera["plans"][0]["parameters"]
    assert vera["base"]["parameters"] == 39_970
    assert [counts[key] for key in ("trainable", "frozen_shared", "pairs", "total")] == [434, 9_120, 3, 49_524]


def test_the_tutorials_networks() -> None:
    vera = as_json("plan", "tutorial-vera", "-m", "vera", "-r", 32, "--set", "sharing=shape")
    counts = vera["plans"][0]["parameters"]
    assert vera["base"]["parameters"] == 89_118
    assert (counts["trainable"], counts["pairs"], counts["frozen_shared"]) == (542, 4, 31_552)
    assert (counts["total"], counts["total"] - counts["frozen_shared"]) == (121_212, 89_660)
    assert round(counts["percent_of_parameters"], 2) == 0.60
    lora = as_json("plan", "tutorial-lora", "-m", "lora", "-r", 4)["plans"][0]["parameters"]
    assert (lora["trainable"], lora["total"], round(lora["percent"], 2)) == (3_272, 78_110, 4.19)


def test_methods_and_ranks_are_compared_side_by_side() -> None:
    done = as_json("plan", "roberta-base", "-r", 1, "-r", 16, "-r", 256)
    found = {(p["method"], p["options"]["r"]): p["parameters"]["trainable"] for p in done["plans"]}
    assert found == {
        ("lora", 1): 36_864,
        ("lora", 16): 589_824,
        ("lora", 256): 9_437_184,
        ("vera", 1): 18_456,
        ("vera", 16): 18_816,
        ("vera", 256): 24_576,
    }
    defaults = as_json("plan", "roberta-base")["plans"]
    assert [(p["method"], p["options"]["r"]) for p in defaults] == [("lora", 8), ("vera", 256)]
    text = " ".join(kilotune("plan", "roberta-base", "-r", 1, "-r", 16).stdout.split())
    assert "lora r 1 ┃ lora r 16 ┃ vera r 1 ┃ vera r 16" in text


def test_targets_options_and_dtype(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA}))
    words = ("plan", tmp_path, "-m", "vera", "-r", 4)
    named = as_json(*words, "--targets", "q_proj, down_proj")["plans"][0]
    assert named["layers"] == 4
    by_regex = as_json(*words, "--targets-regex", r".*\.(q_proj|down_proj)")["plans"][0]
    by_set = as_json(*words, "--set", 'target_modules=["q_proj", "down_proj"]')["plans"][0]
    assert named["parameters"] == by_regex["parameters"] == by_set["parameters"]
    shown = kilotune(*words, "--targets-regex", r".*\.[qk]_proj").stdout
    assert r".*\.[qk]_proj" in shown  # brackets are no markup
    saving = as_json(*words, "--targets", "q_proj", "--set", "save_projection=true", "--set", "projection_prng_key=3")
    plain = as_json(*words, "--targets", "q_proj")
    assert saving["plans"][0]["file_bytes"] - plain["plans"][0]["file_bytes"] >= 4 * 4 * (16 + 16)
    half = as_json(*words, "--dtype", "bfloat16")
    assert half["base"]["bytes"] == 2 * half["base"]["parameters"]


def test_a_task_brings_its_head() -> None:
    done = as_json("plan", "roberta-base", "-m", "vera", "-r", 16, "--set", "task_type=SEQ_CLS")
    assert done["plans"][0]["parameters"]["trainable"] == 18_816 + (768 * 768 + 768) + (768 * 2 + 2)


def test_a_million_users_in_a_store_on_a_device_and_in_time() -> None:
    """The formulas by hand: q and v of RoBERTa-base at r 256 are 24 layers of 256 + 768 numbers in two vectors each."""
    words = ["plan", "roberta-base", "-m", "vera", "-r", "256", "--users", "1e6", "--memory", "24GiB", "--rate", "120"]
    (found,) = as_json(*words)["plans"]
    numbers, vectors = 24 * (256 + 768), 48
    assert found["scale"] == {
        "users": 1_000_000,
        "numbers": numbers,
        "store": {
            "float32": 4 * numbers * 10**6,
            "bfloat16": 2 * numbers * 10**6,
            "int8": (numbers + 4 * vectors) * 10**6,
        },
        "memory": 24 * 2**30,
        "resident": {"float32": 24 * 2**30 // (4 * numbers), "bfloat16": 24 * 2**30 // (2 * numbers)},
        "rate": 120.0,
        "hours": 10**6 / 120 / 60,
    }


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["none"], []),  # the message depends on the network; see test_plan.py
        (["four-layer", "-m", "vara"], ["unknown method 'vara'. Did you mean 'vera'?"]),
        (["four-layer", "-r", "0"], ["r: expected a whole number >= 1, got 0"]),
        (["four-layer", "-r", "x"], ["Invalid value for '--rank'"]),
        (["four-layer", "--users", "0"], ["users: expected a whole number >= 1, got 0"]),
        (["four-layer", "--users", "many"], ["--users: expected a whole number, such as 1000000 or 1e6, got 'many'"]),
        (["four-layer", "--users", "1.5"], ["--users: expected a whole number"]),
        (["four-layer", "--memory", "24GX"], ["--memory: expected a size such as 24GiB", "Did you mean"]),
        (["four-layer", "--memory", "0"], ["memory: expected a number of bytes >= 1, got 0"]),
        (["four-layer", "--rate", "0"], ["rate: expected users a minute above 0, got 0"]),
        (["four-layer", "--dtype", "float23"], ["Did you mean 'float32'?"]),
        (["four-layer", "--targets", "fc9"], ["no module is called 'fc9'", "'0' (1)"]),
        (["four-layer", "--targets", "0,,1"], ["expected a list of module names"]),
        (["four-layer", "--targets-regex", "("], ["is no regular expression"]),
        (["four-layer", "--targets", "0", "--targets-regex", "1"], ["exclude each other"]),
        (["four-layer", "--set", "r=4", "-r", "4"], ["is given by --rank as well"]),
        (["four-layer", "--set", "bias=all", "--set", "bias=all"], ["--set bias: is given 2 times"]),
        (["four-layer", "--set", "bias"], ["--set 'bias': expected KEY=VALUE"]),
        (["four-layer", "--set", "bias=most"], ["bias: expected one of"]),
        (["four-layer", "--set", "inference_mode=true"], ["has no effect on a plan"]),
        (["four-layer", "--set", "sharing=shape"], ["unknown option 'sharing'", "of vera: add --method vera"]),
        (["four-layer", "-m", "vera", "--set", "sharng=shape"], ["unknown option 'sharng'. Did you mean 'sharing'?"]),
        (["four-layer", "--revision", "main"], ["is not on the hub"]),
        (["roberta-base", "--set", "task_type=SEQ_CLS9"], ["task_type: expected one of"]),
        (["four-layer", "--verbose"], ["No such option: --verbose"]),
        ([], ["Missing argument 'MODEL'"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0] != "[" else None,
)
def test_bad_input(words: list[str], messages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def offline(*args: Any, **options: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    text = error("plan", *words)
    for message in messages:
        assert message in text


def test_several_faults_are_told_at_once() -> None:
    text = error("plan", "four-layer", "--set", "bias", "--set", "revision=x", "--set", "r=1", "-r", 2)
    assert text.count("\n  - ") == 3


# -- all verbs -----------------------------------------------------------------------------------------


def verbs() -> Any:
    return typer.main.get_command(main.app).commands  # type: ignore[attr-defined]


def test_every_verb_takes_json_and_explains_itself() -> None:
    assert {"demo", "plan", "inspect", "merge", "convert", "intrinsic-dimension", "train", "chat"} <= set(verbs())
    groups = {name: group.commands for name, group in verbs().items() if hasattr(group, "commands")}
    leaves = {(name,): command for name, command in verbs().items() if name not in groups}
    leaves |= {(name, sub): command for name, own in groups.items() for sub, command in own.items()}
    for name, command in leaves.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert "--json" in options, name
        assert command.help, name
        bare = [p.name for p in command.params if not getattr(p, "help", None) and p.name != "help"]
        assert bare == [], name
        assert kilotune(*name, "--help").exit_code == 0


def test_the_help_of_options_is_the_configs_own() -> None:
    shown = " ".join(kilotune("plan", "--help").stdout.replace("│", " ").split())
    for method in METHODS.values():
        for option in method.config_cls.option_names():
            if option in ("base_model_name_or_path", "inference_mode", "revision"):
                continue
            cls = AdapterConfig if option in AdapterConfig.option_names() else method.config_cls
            assert " ".join(cls.help_of(option).split()) in shown, option


def test_no_verb_prints_the_help_and_version_is_one_line() -> None:
    plain = kilotune()
    assert plain.exit_code == 0
    assert "inspect" in plain.stdout
    assert kilotune("--version").stdout == f"kilotune {library.__version__}\n"
    assert "No such command 'plam'" in error("plam")


@pytest.mark.heavy
def test_the_entry_is_the_one_of_pyproject() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"kilotune": "kilotune.cli.main:main"}
    done = run("plan", "four-layer", "-m", "lora", "--rank", "16", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout)["plans"][0]["parameters"]["trainable"] == 12_960


@pytest.mark.heavy
def test_a_foreseen_error_in_a_process_of_its_own() -> None:
    done = run("plan", "four-layer", "--rank", "-3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: LoraConfig: r: expected a whole number >= 1, got -3")


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("planted")

    with pytest.raises(ZeroDivisionError, match="planted"):
        _app._guarded(broken)


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (library.CheckpointError("bad file"), 2, "error: bad file\n"),
        (PermissionError(13, "Permission denied", "x"), 2, "error: [Errno 13] Permission denied: 'x'\n"),
    ],
    ids=["interrupt", "kilotune", "system"],
)
def test_exit_codes(raised: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise raised

    assert _app._guarded(fail) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", text)


def test_without_the_extra_it_is_one_line(tmp_path: Path) -> None:
    """rich alone absent; typer absent is in test_imports.py."""
    (tmp_path / "rich").mkdir()
    body = "raise ModuleNotFoundError('No module named rich', name='rich')"
    (tmp_path / "rich" / "__init__.py").write_text(body)
    done = run("--version", PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT / "src")]))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "pip install 'kilotune[cli]'" in done.stderr


def test_a_missing_part_of_our_own_is_no_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kilotune.cli._app", None)
    with pytest.raises(ImportError):
        main.main()


def test_the_reader_going_away_is_no_crash() -> None:
    command = f"{sys.executable} -m kilotune.cli.main plan --help | head -1"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert "Traceback" not in done.stderr
