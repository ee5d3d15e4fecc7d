"""docs/using.md: what it tells people to type is run, on a tiny model."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kilotune import get_config, get_peft_model
from kilotune.cli.main import app
from kilotune.errors import KilotuneError
from kilotune.methods import METHODS
from kilotune.train.finished.gguf_lora import FAMILIES, gguf_lora
from kilotune.train.finished.lora_export import export_lora
from kilotune.train.run import train
from kilotune.train.settings.config_file import settings_from
from tests.support.cli_helpers import llama, shake
from tests.support.paths import ROOT
from tests.support.train_support import model_folder, prompts, write_jsonl

PAGE = ROOT / "docs" / "using.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page supposes: ``path/to/model``, ``fine-tuned`` and ``test.jsonl``."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder("llama"), "path/to/model")
    data = write_jsonl(Path("train.jsonl"), prompts(8))
    write_jsonl(Path("test.jsonl"), prompts(11)[8:])
    values = {
        "output": "fine-tuned",
        "model": {"base": "path/to/model"},
        "data": {"train": str(data)},
        "training": {"max_steps": 2, "eval_every": None, "device": "cpu"},
        "logging": {"progress": "quiet", "report": False},
    }
    train(settings_from(values))
    return tmp_path


@pytest.mark.heavy
def test_the_page_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verbs = []
    names: dict[str, Any] = {"__name__": "__main__"}
    for language, body in FENCE.findall(PAGE.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(body, str(PAGE), "exec"), names)
        for line in body.splitlines() if language == "bash" else ():
            words = shlex.split(line)
            if words[0] != "kilotune":
                assert words[:2] == ["pip", "install"], line
                continue
            verbs.append(words[1])
            said = "the cat\n" if words[1] == "chat" else None
            done = CliRunner().invoke(app, words[1:], input=said, catch_exceptions=False)
            assert done.exit_code == 0, (line, done.stderr)
            assert done.stdout.strip(), line
    assert set(verbs) == {"generate", "chat", "evaluate", "export"}
    assert "tokens, because of" in capsys.readouterr().out
    assert Path("fine-tuned.gguf").stat().st_size > 0


def possible(work: Any) -> str:
    try:
        work()
    except KilotuneError:
        return "no"
    return "yes"


def test_the_table_of_methods_is_true() -> None:
    text = PAGE.read_text(encoding="utf-8")
    named = {
        "LoRA": ("lora", {}),
        "LoRA-FA": ("lora_fa", {}),
        "VeRA": ("vera", {}),
        "LoRA-XS": ("loraxs", {"r": 2}),
        "TinyLoRA": ("tinylora", {}),
        "Uni-LoRA": ("unilora", {}),
        "VB-LoRA": ("vblora", {"vector_length": 2}),
        "MiSS": ("miss", METHODS["miss"].example),
        "RandLoRA": ("randlora", METHODS["randlora"].example),
        "DoRA": ("dora", {}),
        "DVoRA": ("dvora", {}),
        "IA3": ("ia3", {}),
        "BitFit": ("bitfit", {"target_modules": ["q_proj"]}),
        "C3A": ("c3a", METHODS["c3a"].example),
        "FourierFT": ("fourierft", METHODS["fourierft"].example),
        "WaveFT": ("waveft", METHODS["waveft"].example),
        "intrinsic dimension": ("intrinsic", {"d": 10, "target_modules": ["q_proj"]}),
        "bottleneck adapters": ("bottleneck", {}),
    }
    table = text.split("Not everything is a LoRA:")[1].split("###")[0]
    seen = []
    for names, *said in re.findall(r"^\| ([^|`]+?) \| (yes|no) \| (yes|no) \| (yes|no) \|$", table, re.MULTILINE):
        for name in names.split(", "):
            method, options = named[name]
            adapted = shake(get_peft_model(llama(attention_bias=True), get_config(method, **options)))
            work = (lambda a=adapted: export_lora(a), lambda a=adapted: gguf_lora(a))
            found = [possible(w) for w in work]
            assert [possible(lambda a=adapted: a.merge_and_unload()), *found] == said, name
            seen.append(name)
    assert seen == list(named)


def test_all_architectures_are_named() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(FAMILIES) == 12
    for name in ("Llama", "Mistral", "GPT-2", "GPT-BigCode", "GPT-NeoX", "Gemma (1 to 3)", "Phi-3", "Qwen 2 and 3"):
        assert name in text
