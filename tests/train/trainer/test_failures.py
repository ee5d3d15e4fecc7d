"""What goes wrong in a fine-tuning, each as one clear line that says what to do; nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from kilotune.errors import CheckpointError, ConfigError, DivergedError, KilotuneError, ResourceError
from kilotune.train.run import Session, fit, open_session, train
from kilotune.train.running.base_model import load_config
from kilotune.train.settings.config_file import settings_from
from kilotune.train.settings.sections import ModelSettings, TrainSettings
from kilotune.train.trainer.failures import advise_on_memory, told_of_disk
from kilotune.train.trainer.from_settings import quiet
from kilotune.train.trainer.output_folder import newest
from tests.support.train_support import LENGTH, files_of_at_most, model_folder, prompts, sentence, write_jsonl

FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", prompts(16))


def settings(train_data: Path, output: Path, **parts: Any) -> TrainSettings:
    run = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "device": "cpu", **parts.pop("training", {})}
    return settings_from(
        {
            "task": parts.pop("task", "causal-lm"),
            "output": str(output),
            "model": {"base": str(model_folder("llama")), **parts.pop("model", {})},
            "adapter": parts.pop("adapter", {"method": "lora", "options": {"r": 2}}),
            "data": {"train": str(train_data), **parts.pop("data", {})},
            "training": run,
            "logging": {"progress": "quiet", "log_every": 1, "report": False},
        }
    )


def refused(chosen: TrainSettings, kind: type[KilotuneError] = ConfigError, **how: bool) -> str:
    """The one line of a training that must not run."""
    with pytest.raises(kind) as caught:
        train(chosen, **how)
    text = str(caught.value).replace(":\n  - ", ": ")  # as the command line joins a single fault to its headline
    assert "\n" not in text
    return text


# -- a loss that is no number --------------------------------------------------------------------------


def spoiled_at(session: Session, step: int, part: str) -> None:
    """From ``step`` on, the loss (or only the gradient) of the model is not a number."""
    model = session.model.get_base_model()
    calls = iter(range(1, 1000))

    def spoil(module: Any, args: Any, output: Any) -> Any:
        if module.training and next(calls) >= step:
            if part == "loss":
                output.loss = output.loss * float("nan")
            else:
                output.loss.register_hook(lambda gradient: gradient * float("inf"))
        return output

    model.register_forward_hook(spoil)


@pytest.mark.parametrize(
    ("part", "named"), [("loss", "the loss became nan"), ("gradient", "the gradients' norm became nan")]
)
def test_nan_stops_and_keeps_the_last_checkpoint_and_says_which_batch(
    part: str, named: str, data: Path, tmp_path: Path
) -> None:
    chosen = settings(data, tmp_path / "out", training={"save_every": 2})
    session = open_session(chosen)
    spoiled_at(session, 7, part)
    with pytest.raises(DivergedError) as caught:
        fit(session)
    said = str(caught.value)
    assert "\n" not in said
    assert f"{named} at step 7 (epoch 2, batch 3, rows " in said
    assert f"The last good checkpoint is kept: {tmp_path / 'out' / 'checkpoints' / 'checkpoint-6'}" in said
    assert "lower training.learning_rate" in said
    # The rows that it names are those of the batch: the sampler's order, computed again.
    order = torch.randperm(16, generator=torch.Generator().manual_seed(chosen.training.seed + 1)).tolist()
    assert f"rows {', '.join(map(str, order[8:12]))} of train" in said
    # The checkpoint is good, and nothing of the bad step is in it.
    weights = torch.cat([p.detach().reshape(-1) for _, p in session.model.adapter_parameters()])
    assert weights.isfinite().all()
    assert not (tmp_path / "out" / FILE).exists()
    found = newest(tmp_path / "out" / "checkpoints")
    assert found is not None
    assert found.name == "checkpoint-6"


def test_nan_in_one_of_several_batches_of_a_step_names_that_one(data: Path, tmp_path: Path) -> None:
    session = open_session(settings(data, tmp_path / "out", training={"batch_size": 2, "accumulation": 3}))
    spoiled_at(session, 5, "loss")  # the second step's second batch; the model is asked twice before, in eval mode
    with pytest.raises(DivergedError, match=r"at step 2 \(epoch 1, batch 5, rows \d+, \d+ of train\).*No checkpoint"):
        fit(session)


# -- memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
        ),
        MemoryError(),
    ],
)
def test_out_of_memory_says_which_settings_need_less(error: Exception, data: Path, tmp_path: Path) -> None:
    session = open_session(settings(data, tmp_path / "out"))

    def fail(*_: Any) -> None:
        raise error

    session.model.get_base_model().lm_head.register_forward_hook(fail)
    with pytest.raises(ResourceError) as caught:
        fit(session)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("out of memory while training with a batch of 4 x ")
    knobs = [
        "training.batch_size 2 with training.accumulation 2",
        "model.gradient_checkpointing true",
        "data.max_length",
    ]
    knobs += ["training.precision bfloat16", "model.dtype bfloat16", "model.quantization nf4", "a smaller model"]
    places = [said.index(knob) for knob in knobs]
    assert places == sorted(places)


def test_what_is_turned_already_is_not_advised(data: Path, tmp_path: Path) -> None:
    turned = settings(
        data,
        tmp_path / "out",
        model={"gradient_checkpointing": True, "quantization": "nf4"},
        training={"batch_size": 1, "precision": "bfloat16"},
    )
    with pytest.raises(ResourceError) as caught, advise_on_memory(turned, "while training"):
        raise MemoryError
    assert "batch_size" not in str(caught.value)
    assert "checkpointing" not in str(caught.value)
    assert "nf4" not in str(caught.value)


def test_other_errors_are_not_called_out_of_memory(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), advise_on_memory(settings(data, tmp_path / "out"), "anywhere"):
        raise RuntimeError("shapes cannot be multiplied")


# -- disk ----------------------------------------------------------------------------------------------


def sizes(checkpoint: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in checkpoint.iterdir()}


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that had all the room it wanted."""
    output = tmp_path_factory.mktemp("whole") / "out"
    train(settings(data, output, training={"save_every": 4}))
    return output


@pytest.mark.heavy
@pytest.mark.parametrize("file", ["rng_state.pth", "optimizer.pt", "model.safetensors"])
def test_a_full_disk_is_one_line_and_the_training_goes_on_from_the_last_checkpoint(
    file: str, data: Path, whole: Path, tmp_path: Path
) -> None:
    first = newest(whole / "checkpoints")
    assert first is not None
    limit = sizes(first)[file] - 1
    output = tmp_path / "out"
    chosen = settings(data, output, training={"save_every": 4})
    session = open_session(chosen)
    from kilotune.train.running.events import Event, Listener

    class Fills(Listener):
        """The disk fills up when the first checkpoint is written."""

        def __init__(self) -> None:
            self.full: Any = None

        def hear(self, event: Event) -> None:
            if event.kind == "save" and self.full is None:
                self.full = files_of_at_most(limit)
                self.full.__enter__()

        def close(self) -> None:
            if self.full is not None:
                self.full.__exit__(None, None, None)
                self.full = None

    with pytest.raises(ResourceError) as caught:
        fit(session, listeners=[Fills()])
    said = str(caught.value)
    assert "\n" not in said
    assert f"the checkpoint of step 8 cannot be written to {output / 'checkpoints' / 'checkpoint-8'}" in said
    assert "MB are free there" in said
    assert f"The last good checkpoint is kept: {output / 'checkpoints' / 'checkpoint-4'}" in said
    assert "--resume" in said
    assert not (output / "checkpoints" / "checkpoint-8").exists()
    train(chosen, resume=True)
    assert (output / FILE).read_bytes() == (whole / FILE).read_bytes()


def test_an_output_that_cannot_be_written_to_is_one_line(data: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("the superuser may write everywhere")
    tmp_path.chmod(0o500)
    try:
        assert "cannot be written: nobody but its owner" in refused(settings(data, tmp_path / "out"))
    finally:
        tmp_path.chmod(0o700)


def test_an_output_in_a_file_is_refused_before_anything_is_loaded(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = refused(settings(data, tmp_path / "file" / "out"))
    assert said.endswith(f"out cannot be written: {tmp_path / 'file'} is a file; take another folder")


def test_no_room_for_the_logs_or_the_report_says_how_to_go_on(data: Path, whole: Path, tmp_path: Path) -> None:
    chosen = settings(data, tmp_path / "out", training={"save_every": 4})
    chosen = chosen.replace(logging=chosen.logging.replace(report=True))
    with files_of_at_most(40_000):  # enough for all that is before the page
        said = refused(chosen, ResourceError)
    assert said.startswith("could not write the report into")
    assert f"The last good checkpoint is kept: {newest(tmp_path / 'out' / 'checkpoints')}" in said
    assert said.endswith("Make room, and go on with --resume")
    with files_of_at_most(400):
        said = refused(chosen.replace(output=str(tmp_path / "other")), ResourceError)
    assert "start it again" in said
    train(chosen, resume=True)
    assert (tmp_path / "out" / FILE).read_bytes() == (whole / FILE).read_bytes()
    assert (tmp_path / "out" / "report.html").is_file()


def test_what_is_no_lack_of_room_is_not_called_so(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    with pytest.raises(ResourceError) as caught, told_of_disk(tmp_path / "new", "it", tmp_path):
        (tmp_path / "there" / "file").write_text("")
    assert "Not a directory" in str(caught.value)
    assert str(caught.value).endswith("Mend that, and start it again")


def test_tensorboard_s_thread_says_nothing_where_the_main_thread_does(capfd: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise OSError("no room")

    kind = type("Writer", (threading.Thread,), {"__module__": "tensorboard.summary.writer.event_file_writer"})
    before = threading.excepthook
    with quiet():
        thread = kind(target=fails)
        thread.start()
        thread.join()
    assert threading.excepthook is before
    assert capfd.readouterr().err == ""


# -- folders -------------------------------------------------------------------------------------------


def test_a_folder_that_is_there_is_never_overwritten_without_force(data: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    (output / "mine.txt").write_text("not yours")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    said = refused(settings(data, output))
    assert "is there and not empty" in said
    assert "--resume goes on with it, --force starts anew" in said
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    result = train(settings(data, output, training={"max_steps": 1}), force=True)
    assert result is not None
    assert result.steps == 1
    assert (output / "mine.txt").read_text() == "not yours"
    assert [path.name for path in (output / "checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]


def test_somebody_elses_folder_is_no_training_to_go_on_with(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("x")
    assert "--resume" not in refused(settings(data, output))
    assert "there is no training in" in refused(settings(data, output), resume=True)
    assert "give one of them" in refused(settings(data, output), resume=True, force=True)
    file = tmp_path / "file"
    file.write_text("x")
    assert "is a file" in refused(settings(data, file), force=True)


def test_what_is_read_is_never_written_over(data: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_folder("llama"), base)
    said = refused(settings(data, base, model={"base": str(base)}), force=True)
    assert "is, or contains, model.base" in said
    rows = write_jsonl(tmp_path / "rows.jsonl", prompts(4))
    assert "data.train" in refused(settings(rows, tmp_path), force=True)


# -- models and adapters -------------------------------------------------------------------------------


def without_record(whole: Path, folder: Path) -> Path:
    """The two files of an adapter, as somebody would give them away."""
    folder.mkdir()
    for name in (FILE, "adapter_config.json"):
        shutil.copy(whole / name, folder / name)
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "wider"])
def test_an_adapter_of_another_base(kind: str, data: Path, whole: Path, tmp_path: Path) -> None:
    base = model_folder("gpt2") if kind == "gpt2" else wider(tmp_path / "wider")
    start = {"start": str(without_record(whole, tmp_path / "alone")), "method": "lora"}
    said = refused(settings(data, tmp_path / "out", model={"base": str(base)}, adapter=start), CheckpointError)
    assert f"adapter.start: {start['start']!r} was trained on {str(model_folder('llama'))!r}" in said
    assert f"and model.base is {str(base)!r}: " in said
    missing = "missing: transformer.h.0.attn.c_attn.lora_A.weight (2, 16) (and 43 more)"
    assert (missing if kind == "gpt2" else "(and 13 more)") in said  # all linear layers are adapted


def wider(folder: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(model_folder("llama"), folder)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, hidden_size=24)).save_pretrained(folder)
    return folder


def test_an_adapter_of_another_base_of_the_same_shapes(data: Path, whole: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_folder("llama", seed=1), other)
    start = {"start": str(whole), "method": "lora"}
    said = refused(settings(data, tmp_path / "out", model={"base": str(other)}, adapter=start), CheckpointError)
    assert f"adapter.start: {str(whole)!r} was trained on {str(model_folder('llama'))!r}" in said
    assert "its weights are others" in said


def test_an_adapter_of_the_same_base_in_another_place(data: Path, whole: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(model_folder("llama"), moved)
    start = {"start": str(whole), "method": "lora"}
    chosen = settings(data, tmp_path / "out", model={"base": str(moved)}, adapter=start, training={"max_steps": 1})
    train(chosen)
    start["start"] = str(without_record(whole, tmp_path / "alone"))  # so only the names tell
    session = open_session(settings(data, tmp_path / "out", model={"base": str(moved)}, adapter=start))
    assert any("if that is another model, the adapter means nothing" in note for note in session.notes)
    said = refused(settings(data, tmp_path / "no", adapter={"start": str(whole), "method": "vera"}))
    assert f"adapter.method is 'vera', and the adapter in {str(whole)!r} is 'lora'" in said


def test_an_adapter_where_a_model_is_wanted(data: Path, whole: Path, tmp_path: Path) -> None:
    said = refused(settings(data, tmp_path / "out", model={"base": str(whole)}))
    assert "holds an adapter, not a model" in said
    assert "adapter.start" in said


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_model_without_a_pad_token_is_padded_with_its_end_of_text(kind: str, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": sentence(i, 3 + i % 3), "label": i % 2} for i in range(8)])
    base = {"base": str(model_folder(kind, pad=False))}
    session = open_session(settings(rows, tmp_path / "out", task="text-classification", model=base))
    end = session.processor.eos_token_id
    assert session.model.config.pad_token_id == end
    fit(session)
    # A row is the same alone and beside longer ones: the padding is seen by nobody.
    items = [session.prepared.train[i] for i in range(8)]
    with torch.no_grad():
        together = session.model.eval()(**session.prepared.collate(items)).logits
        alone = torch.cat([session.model(**session.prepared.collate([item])).logits for item in items])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_model_with_nothing_to_pad_with(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_folder("gpt2", pad=False), base)
    path = base / "tokenizer_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in values.items() if name != "eos_token"}))
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": sentence(i), "label": i % 2} for i in range(8)])
    said = refused(settings(rows, tmp_path / "out", task="text-classification", model={"base": str(base)}))
    assert "neither the model nor its tokenizer has a padding token" in said


def test_a_length_that_the_model_does_not_take(data: Path, tmp_path: Path) -> None:
    said = refused(settings(data, tmp_path / "out", data={"max_length": LENGTH + 1}))
    assert "data.max_length" in said
    assert str(LENGTH) in said


def test_longer_rows_are_cut_and_counted(tmp_path: Path) -> None:
    rows = prompts(8)
    rows[3]["completion"] = " " + " ".join(sentence(i) for i in range(12))
    session = open_session(settings(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out"))
    assert any("1 of 8 rows of train" in note and "longer than 64 tokens" in note for note in session.notes)


def test_weights_of_another_architecture(data: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_folder("llama"), base)
    shutil.copy(model_folder("gpt2") / "model.safetensors", base / "model.safetensors")
    assert "do not belong to a LlamaForCausalLM" in refused(settings(data, tmp_path / "out", model={"base": str(base)}))


def test_broken_and_absent_models(data: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_folder("llama"), base)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be had" in refused(settings(data, tmp_path / "out", model={"base": str(base)}))
    (base / "config.json").unlink()
    assert "holds no config.json" in refused(settings(data, tmp_path / "out", model={"base": str(base)}))
    assert "no folder here, and no hub id" in refused(settings(data, tmp_path / "out", model={"base": "a/b/c"}))
    assert "is a file" in refused(settings(data, tmp_path / "out", model={"base": str(data)}))


def test_a_hub_id_without_a_network_says_what_to_do(data: Path, tmp_path: Path) -> None:
    said = refused(settings(data, tmp_path / "out", model={"base": "somebody/some-model"}))
    assert "cannot be had from the hub" in said
    assert "hf download somebody/some-model --local-dir FOLDER" in said
    assert "HF_HOME" in said


def test_a_hub_id_in_a_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is laid out as the hub's own library does."""
    import huggingface_hub.constants
    import transformers.utils.hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--somebody--some-model"
    shutil.copytree(model_folder("llama"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for module in (huggingface_hub.constants, transformers.utils.hub):
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, str(tmp_path))
    rows = write_jsonl(tmp_path / "rows.jsonl", prompts(8))
    chosen = settings(rows, tmp_path / "out", model={"base": "somebody/some-model"}, training={"max_steps": 1})
    assert load_config(chosen.model).model_type == "llama"
    result = train(chosen)
    assert result is not None
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somebody/some-model"


def test_a_revision_of_a_folder_has_no_meaning(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.revision.*is a folder here"):
        load_config(ModelSettings(base=str(model_folder("llama")), revision="main"))


# -- settings that fit no data ---------------------------------------------------------------------------


def test_what_needs_a_validation_split_says_so_at_once(data: Path, tmp_path: Path) -> None:
    run = {"early_stopping": 2, "best_metric": "loss", "load_best": True, "eval_every": 5}
    with pytest.raises(ConfigError) as caught:
        train(settings(data, tmp_path / "out", training=run))
    for name in run:
        assert f"training.{name}: " in str(caught.value)
    assert "data.validation_fraction" in str(caught.value)


def test_a_metric_that_the_task_does_not_give(data: Path, tmp_path: Path) -> None:
    run = {"best_metric": "perplexty", "eval_every": 1}
    said = refused(settings(data, tmp_path / "out", training=run, data={"validation_fraction": 0.25}))
    assert "there is no 'perplexty' here. Did you mean 'perplexity'? There is: loss, perplexity" in said


def test_no_gpu_where_one_is_asked_for(data: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "PyTorch sees no GPU here" in refused(settings(data, tmp_path / "out", training={"device": "cuda"}))


def test_no_output(data: Path, tmp_path: Path) -> None:
    assert "output: is missing" in refused(settings(data, tmp_path / "out").replace(output=None))


def test_no_data(data: Path, tmp_path: Path) -> None:
    chosen = settings(data, tmp_path / "out")
    assert "data.train: is missing" in refused(chosen.replace(data=chosen.data.replace(train=None)))
