"""PEFT's example scripts, each in a process of its own, forked when the libraries are imported.

    python -m peft_own.example_process kilotune|peft EXAMPLES FOLDER NUMBER ...

For each number, of the list, FOLDER/<number> is the current folder of the script, FOLDER/<number>.txt what it says, and
FOLDER/<number>.json what became of it: {"fault": ...} or what ``look`` gives.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import shlex
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from peft_own import example_list, example_standins
from peft_own.example_list import EXAMPLES, Example

SECONDS = 300  # for one example


def code_of(notebook: Path) -> str:
    """The code cells of a notebook, without the notebook's own commands."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    whole = [line for cell in cells if cell["cell_type"] == "code" for line in "".join(cell["source"]).splitlines()]
    return "\n".join(line.removeprefix("%time ") for line in whole if not line.startswith(("!", "%%")))


class Watch:
    """Notes each model that an adapter is put into, with the numbers that its parameters start from."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, dict[str, tuple[Any, Any]]]] = []

    def install(self) -> None:
        """Watch ``get_peft_model``, by which name modules have it, and ``PeftModel.from_pretrained``."""
        import peft

        made = peft.get_peft_model
        noting = self.watched(made)
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] in ("peft", "trl") and vars(module).get("get_peft_model") is made:
                vars(module)["get_peft_model"] = noting
        peft.get_peft_model = noting
        peft.PeftModel.from_pretrained = self.watched(peft.PeftModel.from_pretrained)

    def watched(self, original: Any) -> Any:
        """The function that also notes what it gives."""

        def noting(*args: Any, **kwargs: Any) -> Any:
            model = original(*args, **kwargs)
            named = {key: value for key, value in model.named_parameters() if value.requires_grad}
            self.seen.append((model, {key: (value, self.number(value)) for key, value in named.items()}))
            return model

        return noting

    @staticmethod
    def number(parameter: Any) -> Any:
        """What a parameter starts from; one that has no numbers yet counts as zeros."""
        import torch

        return torch.zeros(parameter.shape) if parameter.is_meta else parameter.detach().float().cpu().clone()

    def changed(self) -> tuple[int, int]:
        """(how many parameters that were to be trained changed, of how many), over all models."""
        import torch

        of = moved = 0
        for model, start in self.seen:
            now = dict(model.named_parameters())
            for key, (parameter, before) in start.items():
                after = self.number(now.get(key, parameter))  # one that was merged away is still known
                of, moved = of + 1, moved + (after.shape != before.shape or not torch.equal(before, after))
        return moved, of


def prepare(example: Example) -> Watch:
    """What stands in for the rest."""
    beside = example.beside
    example_standins.data(example.data)
    example_standins.training_arguments(example_list.HALF in beside)
    if example_list.CPU in beside:
        example_standins.accelerator()
    if example_list.SCORE in beside:
        example_standins.evaluate()
    if example_list.HUB in beside:
        example_standins.hub(Path(os.environ["HF_HOME"]))
    if example_list.PICTURES in beside:
        example_standins.pictures(Path("pictures"))
    watch = Watch()
    watch.install()
    return watch


def run(examples: Path, example: Example) -> None:
    """The steps, each as the interpreter would run it by its path."""
    for step in example.steps:
        path = examples / step.path
        sys.argv = [str(path), *shlex.split(step.arguments)]
        sys.path.insert(0, str(path.parent))
        if path.suffix == ".ipynb":
            exec(compile(code_of(path), str(path), "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(str(path), run_name="__main__")
        sys.path.pop(0)


def look(example: Example, watch: Watch) -> dict[str, Any]:
    """What there is at the end: parameters that changed, and the tensors of each adapter that was saved."""
    from safetensors.torch import load_file

    moved, of = watch.changed()
    files: dict[str, dict[str, list[int]]] = {}
    for pattern in example.saved:
        for folder in sorted(Path().glob(pattern)):
            tensors = load_file(folder / "adapter_model.safetensors")
            if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
                raise AssertionError(f"{folder}: numbers that are not finite")
            files[str(folder)] = {key: list(tensor.shape) for key, tensor in sorted(tensors.items())}
    missing = [pattern for pattern in example.saved if not list(Path().glob(pattern))]
    missing += [name for name in example.also if not Path(name).is_file()]
    return {"changed": moved, "of": of, "files": files, "missing": missing}


def alone(examples: Path, example: Example, folder: Path) -> None:
    """One example, in this process, which has nothing else to do."""
    folder.mkdir()
    os.chdir(folder)
    said = os.open(f"{folder}.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    signal.alarm(SECONDS)
    try:
        watch = prepare(example)
        run(examples, example)
        result = look(example, watch)
    except BaseException:  # SystemExit of a script, too
        result = {"fault": traceback.format_exc()[-6000:]}
    Path(f"{folder}.json").write_text(json.dumps(result), encoding="utf-8")
    sys.stdout.flush()


def main(on: str, examples: str, folder: str, *numbers: str) -> None:
    """Run those."""
    if on == "kilotune":
        import kilotune.peft

        kilotune.peft.install()
    for library in ("datasets", "accelerate", "transformers.trainer", "trl.trainer.sft_trainer", "diffusers", "peft"):
        importlib.import_module(library)
    for number in numbers:
        child = os.fork()
        if child == 0:
            try:
                alone(Path(examples), EXAMPLES[int(number)], Path(folder).resolve() / number)
            finally:
                os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
