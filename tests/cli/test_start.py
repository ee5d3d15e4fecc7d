"""Help, wrong verbs, wrong options and wrong values answer at once: nothing large is imported for them."""

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
    "fetch smolm2": "the model's name: expected one of ['smollm2'], got 'smolm2'. Did you mean 'smollm2'?",
    "fetch": "Missing argument 'NAME'",
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
    "plan llama-3.2-1b --method verra": "unknown method 'verra'. Did you mean 'vera'? Methods: bitfit, ",
    "plan llama-3.2-1b --set rnk=3": "LoraConfig: unknown option 'rnk'. Did you mean 'r'? All: target_modules, ",
    "plan llama-3.2-1b -m vera -m dora --set use_dra=1": "VeraConfig: unknown option 'use_dra'. Did you mean ",
    "plan llama-3.2-1b --dtype float17": "dtype: expected one of ['float32', 'bfloat16', 'float16'], got 'float17'",
    "plan llama-3.2-1b --users many": "--users: expected a whole number, such as 1000000 or 1e6, got 'many'",
    "plan llama-3.2-1b --memory 4GB4": "--memory: expected a size such as 24GiB or 80GB, got '4GB4'",
    "train -m x -d y -o o --method verra": "adapter.method: expected one of lora, vera, ",
    "train -m x -d y -o o --set training.epoch=3": "there is no such setting. Did you mean 'training.epochs'?",
    "train -m x -d y -o o --set training.epochs=-3": "training.epochs: expected a number above 0, got -3",
    "train -m x -d y -o o --set adapter.d_initial=1": "an option of the method: adapter.options.d_initial",
    "train -m x -d y -o o --set adapter.options.rank=3": "adapter.options: unknown option 'rank'. Did you mean 'r'?",
    "train -m x -d y -o o --set adapter.options.rnk=3": "adapter.options: unknown option 'rnk'. Did you mean 'r'?",
    "compare nofile.yaml": "cannot read the config file nofile.yaml: No such file or directory",
    "compare examples/compare/digits.yaml --seeds 0": "seeds: expected a whole number in [1, 1000], got 0",
    "compare examples/compare/digits.yaml --set methods.verra={}": "'verra' is no method. Did you mean 'vera'?",
    "experiment cnn --seeds 0": "the experiment cannot be run: seeds is 0, and must be 1 or more",
    "intrinsic-dimension --seeds 0": "the search cannot be run: seeds is 0, and must be 1 or more",
    "intrinsic-dimension --rotation 400": "rotation is 400.0, and must be within -360 and 360 degrees",
    "generate nofolder hi --dtype f": "--dtype: expected one of auto, float32, bfloat16, float16, got 'f'",
    "chat nofolder --device tpu": "--device: expected one of auto, cpu, cuda, got 'tpu'",
    "export nofolder --to gguf --out x --dtype f": "--dtype: expected one of ['float32', 'bfloat16', 'float16'], got",
    "generate ./nofolder hi": "'./nofolder' is no folder here, and no hub id (owner/name)",
    "chat /no/such/folder": "'/no/such/folder' is no folder here, and no hub id",
    "generate tests/nofolder hi": "'tests/nofolder' is no folder in tests",
    "generate tests hi": "tests holds no adapter_config.json",
    "evaluate ./nofolder a.jsonl": "'./nofolder' is no folder here, and no hub id (owner/name)",
    "export ./nofolder --to lora --out o": "'./nofolder' is no folder here, and no hub id (owner/name)",
    "merge ./nofolder --out o": "'./nofolder' is no folder here, and no hub id (owner/name)",
    "convert ./nofolder o --to lora": "'./nofolder' is no folder here, and no hub id (owner/name)",
    "inspect ./nofolder": "'./nofolder' is no folder here, and no hub id (owner/name)",
    "plan /no/such/folder": "'/no/such/folder' is no file, folder, built-in model or hub id (owner/name)",
    "plan ./model/": "'./model/' is no file, folder, built-in model or hub id (owner/name)",
    "plan tests": "tests holds no config.json",
    "plan nofile.json": ". holds no nofile.json",
    "train -m ./nomodel -d y -o o": "model.base: './nomodel' is no folder here, and no hub id (owner/name)",
    "train -m tests -d y -o o": "model.base: 'tests' holds no config.json, so it is no model's folder",
    "train -m x -d nofile.jsonl -o o": "nofile.jsonl: there is no such file or folder.",
    "fleet train -m ./nomodel -d y -o o": "model.base: './nomodel' is no folder here",
    "serve -m ./nomodel -s sqlite:///a.db": "model.base: './nomodel' is no folder here",
    "store ls nourl": "'nourl' is neither a folder that is there nor the URL of a store",
    "store ls sqlit:///a.db": "no store of the kind 'sqlit'. Did you mean 'sqlite'?",
}
OFFERED = {
    "": "serve",
    "fetch": "smollm2",
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
        [sys.executable, "-c", RUN, *words], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200
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


# The process that a user starts, and then what it has imported.
PROCESS = """
import json, runpy, sys

large, sys.argv = set(json.loads(sys.argv[1])), ["kilotune", *sys.argv[2:]]
try:
    runpy.run_module("kilotune.cli.main", run_name="__main__")
finally:
    print(sorted(large & {*sys.modules}))
"""


def process(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, "-c", script, *words], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200
    )


@pytest.mark.parametrize("line", ["plan llama-3.2-1b --set rnk=3", "train -m x -d y -o o --method verra"])
def test_a_process_that_ends_with_a_wrong_value_has_imported_nothing_large(line: str) -> None:
    done = process(PROCESS, json.dumps(LARGE), *line.split())
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert done.stderr.startswith("error: ")
    assert WRONG[line] in done.stderr


# As if known_names.json were older than a method, a preset and an option; then a method that a program brings.
OLDER = """
import sys
from kilotune import known_names

del known_names.METHOD_OPTIONS["bitfit"], known_names.METHOD_OPTIONS["vera"]["d_initial"]
from kilotune.cli.plan import _check_options, _method
from kilotune.config import check_listed_options
from kilotune.errors import ConfigError
from kilotune.train.settings.config_file import _unknown
from kilotune.train.settings.sections import AdapterSettings, adapter_names

def refused(wrong, *words):
    try:
        wrong(*words)
    except ConfigError as error:
        return str(error)

assert "bitfit" not in adapter_names("verra")
assert "unknown option 'rnk'" in refused(check_listed_options, "vera", ["rnk"])
assert "torch" not in sys.modules
check_listed_options("vera", ["d_initial"])
_check_options("dvora", ["d_initial"])
assert "torch" not in sys.modules
assert _method("BitFit") == "bitfit"
assert "torch" in sys.modules
"""
ADDED = """
from kilotune.methods import METHODS
from kilotune.train.settings.sections import AdapterSettings

METHODS["mine"] = METHODS["vera"]
AdapterSettings(method="mine", options={"r": 3})
"""


@pytest.mark.full
def test_what_came_since_the_list_was_written_is_taken() -> None:
    whole = "AdapterSettings(method='bitfit'); AdapterSettings(options={'d_initial': 0.2})\n"
    whole += "assert 'It is an option of the method' in _unknown(AdapterSettings, 'd_initial')\n"
    for script in (OLDER + whole, ADDED):
        done = process(script)
        assert done.returncode == 0, done.stderr
