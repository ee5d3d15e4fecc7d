"""Files that do not belong together, writers that are killed or race, and matrices of another base."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from kilotune import CheckpointError, LoraConfig, PeftModel, VeraConfig, get_peft_model
from kilotune.adapter_files import files
from tests.support.models import Snapshot, disk, mlp, randomize, untie
from tests.support.paths import ROOT

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
APART = "adapter_config.json and .* do not belong together"
TOGETHER_KEY = "kilotune_config_sha256"
X = torch.linspace(-1, 1, 24).view(4, 6)


def metadata_of(folder: Path) -> dict[str, str]:
    with safe_open(folder / WEIGHTS, "pt") as file:
        return file.metadata() or {}


def change_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def lora(alpha: float) -> PeftModel:
    """An adapter whose tensors and alpha both depend on ``alpha``, so that a mix gives a third output."""
    model = get_peft_model(mlp(), LoraConfig(r=2, lora_alpha=alpha, target_modules="all-linear"))
    randomize(model, seed=int(alpha))
    return model.eval()


def vera() -> PeftModel:
    model = get_peft_model(mlp(), VeraConfig(r=3, target_modules="all-linear"))
    randomize(model)
    return model.eval()


def loaded_is_one_of(folder: Path, known: Mapping[str, Tensor]) -> str | None:
    """The name in ``known`` of the output that the loaded adapter gives; None where the pair is refused as torn.

    Any other error, and any other output, fails.
    """
    try:
        y = PeftModel.from_pretrained(mlp(), folder)(X)
    except CheckpointError as error:
        if "do not belong together" not in str(error):
            raise AssertionError(f"a false alarm: {error}") from error
        return None
    names = [name for name, value in known.items() if torch.equal(value, y)]
    assert names, "a mix of two adapters was loaded"
    return names[0]


# -- a pair that belongs together ------------------------------------------------------------------


def test_the_header_ties_the_config_to_the_weights(tmp_path: Path) -> None:
    for alpha in (4, 400):
        lora(alpha).save_pretrained(tmp_path / str(alpha))
    lora(4).save_pretrained(tmp_path / "again")
    digests = {name: metadata_of(tmp_path / name)[TOGETHER_KEY] for name in ("4", "400", "again")}
    assert all(len(digest) == 64 and int(digest, 16) >= 0 for digest in digests.values())
    assert digests["4"] == digests["again"] != digests["400"]


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": 5},
        {"use_rslora": True},
        {"lora_dropout": 0.5},
        {"alpha_pattern": {"0": 7}},
        {"target_modules": ["0"]},
        {"kilotune": {"format": 1, "exclude_modules": ["2"]}},
    ],
    ids=str,
)
def test_a_config_changed_by_hand(change: dict[str, Any], tmp_path: Path) -> None:
    lora(4).save_pretrained(tmp_path)
    change_config(tmp_path, **change)
    base, files = mlp(), disk(tmp_path)
    before = Snapshot.of(base)
    with pytest.raises(CheckpointError, match=APART) as caught:
        PeftModel.from_pretrained(base, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert Snapshot.of(base) == before
    assert disk(tmp_path) == files


@pytest.mark.parametrize("key", ["vera_dropout", "d_initial"])
def test_a_vera_config_changed_by_hand(key: str, tmp_path: Path) -> None:
    vera().save_pretrained(tmp_path)
    change_config(tmp_path, **{key: 0.25})
    with pytest.raises(CheckpointError, match=APART):
        PeftModel.from_pretrained(mlp(), tmp_path)


def test_a_config_written_in_another_layout_is_the_same(tmp_path: Path) -> None:
    model = lora(4)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(dict(reversed(values.items()))))
    change_config(tmp_path, base_model_name_or_path="moved/elsewhere", inference_mode=True)  # changes no result
    assert loaded_is_one_of(tmp_path, {"saved": model(X)}) == "saved"


def torn(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A folder with the config of one save and the weights of another, and what each of them gives."""
    known = {}
    for alpha in (4, 400):
        model = lora(alpha)
        known[str(alpha)] = model(X)
        model.save_pretrained(tmp_path / str(alpha))
    shutil.copytree(tmp_path / "4", tmp_path / "mix")
    shutil.copy(tmp_path / "400" / WEIGHTS, tmp_path / "mix" / WEIGHTS)
    return tmp_path / "mix", known


def test_a_pair_torn_apart(tmp_path: Path) -> None:
    mix, known = torn(tmp_path)
    assert loaded_is_one_of(tmp_path / "4", known) == "4"
    assert loaded_is_one_of(tmp_path / "400", known) == "400"
    with pytest.raises(CheckpointError, match=APART):
        PeftModel.from_pretrained(mlp(), mix)
    model = lora(4)
    with pytest.raises(CheckpointError, match=APART):
        model.load_adapter(mix, "mix")
    assert list(model.peft_config) == ["default"]


def test_planted_pair_that_nothing_ties_together(tmp_path: Path) -> None:
    """Without the checksum the mix is loaded, and ``loaded_is_one_of`` tells."""
    mix, known = torn(tmp_path)
    untie(mix)
    with pytest.raises(AssertionError, match="a mix of two adapters was loaded"):
        loaded_is_one_of(mix, known)


def test_files_of_peft_have_no_such_key_and_load(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"], init_lora_weights=False)
    model = peft.get_peft_model(mlp(), config).eval()
    model.save_pretrained(tmp_path)
    assert TOGETHER_KEY not in metadata_of(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(mlp(), tmp_path)(X), model(X))
    change_config(tmp_path, lora_alpha=8)  # not ours to tell
    assert not torch.allclose(PeftModel.from_pretrained(mlp(), tmp_path)(X), model(X))


# -- killed, and racing ----------------------------------------------------------------------------

# One process that forks a writer for each moment: importing torch once is enough.
KILLED = """
    import os, shutil, sys
    from pathlib import Path
    sys.path.insert(0, {here!r})
    from tests.adapter_files.test_killed_writers_and_mixed_files import lora

    home = Path({home!r})
    new = lora(400)
    for moment in range(12):
        shutil.copytree(home / "old", home / str(moment))
        child = os.fork()
        if child == 0:
            seen = 0
            def counting(real):
                def call(*args, **options):
                    global seen
                    if seen == moment:
                        os._exit(9)
                    seen += 1
                    return real(*args, **options)
                return call
            os.replace, os.rename, os.fsync = map(counting, (os.replace, os.rename, os.fsync))
            new.save_pretrained(home / str(moment))
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(moment, code, flush=True)
        if code == 0:
            break
"""


@pytest.mark.heavy
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_writer_that_is_killed_leaves_no_mix(tmp_path: Path) -> None:
    old, new = lora(4), lora(400)
    known = {"old": old(X), "new": new(X)}
    old.save_pretrained(tmp_path / "old")
    script = textwrap.dedent(KILLED).format(here=str(ROOT), home=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=_env())
    assert done.returncode == 0, done.stderr
    codes = [line.split()[1] for line in done.stdout.splitlines()]
    assert codes[-1] == "0", "the last writer should have come to its end"
    assert codes.count("9") >= 2, "no writer was killed between the two files"
    found = [loaded_is_one_of(tmp_path / str(moment), known) for moment in range(len(codes))]
    assert found[0] == "old"
    assert found[-1] == "new"
    assert None in found, "the moment between the two renames was not met"
    for moment in range(len(codes)):  # and what is left behind stands in nobody's way
        new.save_pretrained(tmp_path / str(moment))
        assert loaded_is_one_of(tmp_path / str(moment), known) == "new"


def _env() -> dict[str, str]:
    source = str(ROOT / "src")
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def test_writers_and_a_reader_in_one_folder(tmp_path: Path) -> None:
    writers = {"lora": lora(4), "other": lora(400), "vera": vera()}
    known = {name: model(X) for name, model in writers.items()}
    writers["lora"].save_pretrained(tmp_path)
    stop, saved, failures = threading.Event(), dict.fromkeys(writers, 0), []

    def write(name: str) -> None:
        while not stop.is_set():
            try:
                writers[name].save_pretrained(tmp_path)
            except Exception as error:
                failures.append(error)
                return
            saved[name] += 1

    threads = [threading.Thread(target=write, args=(name,)) for name in writers]
    for thread in threads:
        thread.start()
    found: list[str | None] = []
    end = time.monotonic() + 60  # a bound only: it takes a second
    try:
        while (len(found) < 100 or min(saved.values()) < 3) and time.monotonic() < end and not failures:
            found.append(loaded_is_one_of(tmp_path, known))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert len(found) >= 100
    assert min(saved.values()) >= 3, f"the writers did not run beside the reader: {saved}"
    assert any(found), "nothing could be loaded at all"
    writers["vera"].save_pretrained(tmp_path)
    assert loaded_is_one_of(tmp_path, known) == "vera"
    assert sorted(disk(tmp_path)) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize(("step", "found"), [("read_weights", None), ("_check_header", "old")])
def test_files_replaced_while_they_are_read(
    step: str, found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the config and the weights the pair is torn; within the weights the file that was opened counts."""
    old, new = lora(4), vera()
    known = {"old": old(X), "new": new(X)}
    old.save_pretrained(tmp_path)
    real = getattr(files, step)

    def interrupted(*args: Any) -> Any:
        if step == "read_weights":
            new.save_pretrained(tmp_path)
        result = real(*args)
        new.save_pretrained(tmp_path)
        return result

    monkeypatch.setattr(files, step, interrupted)
    assert loaded_is_one_of(tmp_path, known) == found
    monkeypatch.undo()
    assert loaded_is_one_of(tmp_path, known) == "new"


def test_a_folder_that_another_writer_makes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As all ranks of a training do at once: the folder was not there when they looked, and then it is."""
    first, second, real = lora(4), lora(400), os.rename
    waiting = [second]

    def late(source: Any, target: Any) -> None:
        if waiting:
            waiting.pop().save_pretrained(tmp_path / "new")
        real(source, target)

    monkeypatch.setattr(os, "rename", late)
    first.save_pretrained(tmp_path / "new")
    assert not waiting
    assert loaded_is_one_of(tmp_path / "new", {"first": first(X)}) == "first"
    assert sorted(disk(tmp_path)) == ["new", f"new/{CONFIG}", f"new/{WEIGHTS}"]


def test_planted_reading_that_opens_the_weights_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = lora(4), lora(400)
    old.save_pretrained(tmp_path)

    def twice(path: Path) -> Any:
        expected = metadata_of(path.parent)["kilotune_sha256"]
        new.save_pretrained(tmp_path)
        tensors = load_file(path)
        if files.tensors_checksum(tensors) != expected:
            raise CheckpointError(f"{path} is damaged")
        return tensors, metadata_of(path.parent)

    monkeypatch.setattr(files, "read_weights", twice)
    with pytest.raises(AssertionError, match="a false alarm: .* is damaged"):
        loaded_is_one_of(tmp_path, {"old": old(X), "new": new(X)})


# -- VeRA's matrices in files ----------------------------------------------------------------------


def stored(tmp_path: Path, base: nn.Module) -> Path:
    model = get_peft_model(base, VeraConfig(r=3, target_modules="all-linear", save_projection=True))
    randomize(model)
    model.save_pretrained(tmp_path)
    return tmp_path


def test_matrices_in_a_file_whose_config_says_there_are_none(tmp_path: Path) -> None:
    stored(tmp_path, mlp())
    change_config(tmp_path, save_projection=False)
    untie(tmp_path)
    base = mlp()
    before = Snapshot.of(base)
    with pytest.raises(CheckpointError, match="vera_A.*vera_B.*save_projection"):
        PeftModel.from_pretrained(base, tmp_path)
    assert Snapshot.of(base) == before


def wide(inn: int = 6, out: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(inn, 5), nn.Tanh(), nn.Linear(5, out))


@pytest.mark.filterwarnings("ignore::kilotune.OtherBaseWarning")  # the error says more
@pytest.mark.parametrize("inn", [4, 7, 60])
def test_stored_matrices_of_another_base(inn: int, tmp_path: Path) -> None:
    """All trained tensors fit, and with 4 inputs the matrices would too: the largest extents tell the bases apart."""
    stored(tmp_path, wide(6))
    base = wide(inn)
    before = Snapshot.of(base)
    with pytest.raises(CheckpointError) as caught:
        PeftModel.from_pretrained(base, tmp_path)
    text = str(caught.value)
    largest = max(inn, 5)
    assert "rank 3, in 6, out 5" in text
    assert f"rank 3, in {largest}, out 5" in text
    assert Snapshot.of(base) == before
    PeftModel.from_pretrained(wide(6), tmp_path)


def test_every_misfit_is_listed(tmp_path: Path) -> None:
    def deep(out: int) -> nn.Sequential:
        return nn.Sequential(*[nn.Linear(4, out) for _ in range(30)])

    get_peft_model(deep(5), VeraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        PeftModel.from_pretrained(deep(6), tmp_path)
    text = str(caught.value)
    lines = [f"shape of {i}.vera_lambda_b: the model expects (6,), the file has (5,)" for i in range(30)]
    assert [line for line in lines if line not in text] == []
    assert text.count("\n  - ") == 30
    with pytest.raises(CheckpointError) as caught:
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 5)), tmp_path)
    assert str(caught.value).count("\n  - unexpected: ") == 2 * 29


def test_a_second_adapter_with_a_head_of_its_own_is_loaded(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    model = get_peft_model(mlp(), config).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    y = model(X)
    randomize(model, seed=2)
    model.load_adapter(tmp_path, "second")
    assert not torch.equal(model(X), y)
    model.set_adapter("second")
    assert torch.equal(model(X), y)


# -- under another default device ------------------------------------------------------------------

PROJECTIONS = [(generator, save) for generator in ("portable", "peft") for save in (False, True)]


@pytest.mark.parametrize(("generator", "save"), PROJECTIONS)
def test_meta_as_the_default_device_changes_nothing(generator: str, save: bool, tmp_path: Path) -> None:
    config = VeraConfig(r=3, target_modules="all-linear", generator=generator, save_projection=save, bias="all")

    def made(inside: torch.device, name: str) -> PeftModel:
        model = get_peft_model(mlp(), LoraConfig(r=1, target_modules=["0"]), "first").eval()
        with inside:
            model.add_adapter("second", config)
            model.set_adapter("second")
        randomize(model, "second")
        with inside:
            model.save_pretrained(tmp_path / name, selected_adapters=["second"])
        return model

    plain, meta = made(torch.device("cpu"), "cpu"), made(torch.device("meta"), "meta")
    assert {p.device.type for p in meta.parameters()} == {"cpu"}
    assert torch.equal(meta(X), plain(X))
    assert disk(tmp_path / "meta") == disk(tmp_path / "cpu")
    base = mlp()
    with torch.device("meta"):
        again = PeftModel.from_pretrained(base, tmp_path / "meta" / "second")
    torch.testing.assert_close(again(X), plain(X), rtol=1e-5, atol=1e-5)


# -- folders -----------------------------------------------------------------------------------------


def test_a_mistyped_folder_is_not_asked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "adapters").mkdir()
    monkeypatch.chdir(tmp_path)
    asked: list[Any] = []
    monkeypatch.setattr(hub, "hf_hub_download", lambda *args, **options: asked.append(args) or str(tmp_path / CONFIG))
    with pytest.raises(CheckpointError, match="'adapters/nothere' is no folder in adapters"):
        PeftModel.from_pretrained(mlp(), "adapters/nothere")
    assert asked == []
    with pytest.raises(CheckpointError):  # the trap works: an id whose owner is no folder here does get there
        PeftModel.from_pretrained(mlp(), "owner/nothere")
    assert asked
