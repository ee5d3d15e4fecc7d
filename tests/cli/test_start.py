"""Help, wrong verbs and wrong options answer at once: nothing large is imported for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kilotune.cli._app import VERBS
from tests.support.paths import ROOT

LARGE = (
    "accelerate",
    "datasets",
    "fastapi",
    "huggingface_hub",
    "matplotlib",
    "numpy",
    "pandas",
    "pyarrow",
    "safetensors",
    "sklearn",
    "torch",
    "transformers",
)
WRONG = {
    "trian": "No such command 'trian'. Did you mean 'train'?",
    "store putt": "No such command 'putt'. Did you mean 'put'?",
    "--nope": "No such option: --nope",
    "train --nope": "No such option: --nope",
    "train --epochs many": "Invalid value for '--epochs'",
    "train": "give a config file (kilotune init writes one), or --model (model.base), --data (data.train)",
    "plan": "Missing argument 'MODEL'",
    "convert a b --to x": "Invalid value for '--to'",
    "convert a b --to peft --rank 3": "--rank is for --to lora; --to peft keeps the rank",
    "merge a --out b --dtype float17": "--dtype: expected one of ['float32', 'bfloat16', 'float16'], got 'float17'",
    "serve -m a -s b --set slot=3": "there is no such setting",
    "fleet train -m a -d b": "give --output FOLDER or --store URL, one of them",
}
OFFERED = {
    "": "serve",
    "plan": "llama-3.2-1b",
    "plan --method": "vera",
    "train --method": "head",
    "train --task": "seq2seq",
    "train --set": "training.warmup=",
}
# Runs every line in one process, in which the import of a name of sys.argv[1] is a RuntimeError: nobody catches that
# one, as some catch an ImportError.
RUN = """
import contextlib, io, json, os, sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in large:
            raise RuntimeError(f"{name} was imported")

large, wrong, offered = map(json.loads, sys.argv[1:])
sys.meta_path.insert(0, Refusing())
from kilotune.cli.main import app
from typer.main import get_command

whole = get_command(app)

def run(words):
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            whole.main(words, prog_name="kilotune")
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()

def pages(command, words):
    yield [*words, "--help"]
    for name, inner in getattr(command, "commands", {}).items():
        yield from pages(inner, [*words, name])

answers = {" ".join(words): run(words) for words in pages(whole, [])}
answers |= {line: run(line.split()) for line in ("--version", *wrong)}
os.environ["_KILOTUNE_COMPLETE"] = "complete_bash"
for line in offered:
    words = ["kilotune", *line.split(), ""]
    os.environ |= {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    answers[f"complete {line}"] = run([])
print(json.dumps(answers))
"""


def answers(*refused: str) -> dict[str, tuple[int, str, str]]:
    """(exit code, stdout, stderr) by line, without the imports that are refused."""
    words = [json.dumps(refused), json.dumps([*WRONG]), json.dumps([*OFFERED])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words], env=environment, capture_output=True, text=True, timeout=200
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return {line: tuple(answer) for line, answer in json.loads(done.stdout).items()}


def test_help_and_wrong_words_and_completion_import_nothing_large() -> None:
    found = answers(*LARGE)
    pages = {line.removesuffix("--help").strip(): found[line] for line in found if line.endswith("--help")}
    assert {line.partition(" ")[0] for line in pages} == {"", *VERBS}
    assert {"store put", "keys add", "fleet train"} <= set(pages)
    for line, (code, out, err) in pages.items():
        assert (code, err) == (0, ""), line
        assert f"Usage: kilotune {line}".rstrip() in out
    for line, text in WRONG.items():
        code, out, err = found[line]
        assert (code, out) == (2, ""), line
        assert text in err
    for line, word in OFFERED.items():
        assert word in found[f"complete {line}"][1].split(), line
    assert found["--version"][0] == 0


def test_an_import_would_be_noticed() -> None:
    with pytest.raises(RuntimeError, match=r"rich\.console was imported|rich was imported"):
        answers("rich")
