"""``kilotune merge``: the folder it writes is the adapted model, for transformers alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertModel,
)

from kilotune import LoraConfig, PeftModel, VeraConfig, get_peft_model
from kilotune.adapter_files.files import WEIGHTS_NAME
from kilotune.cli import _adapter
from kilotune.cli import merge as verb
from tests.support.cli_helpers import (
    as_json,
    bert,
    distance,
    error,
    gpt2,
    kilotune,
    llama,
    logits,
    roberta,
    saved,
    shake,
)

CLOSE = 2e-6


def adapter(model: Any, config: Any, folder: Path, size: float = 0.3) -> torch.Tensor:
    """Write a trained-like adapter; returns what the adapted model puts out."""
    adapted = shake(get_peft_model(model, config), size)
    adapted.save_pretrained(folder)
    return logits(adapted)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("make", "auto", "config"),
    [
        (llama, AutoModelForCausalLM, VeraConfig(r=8, task_type="CAUSAL_LM")),
        (llama, AutoModelForCausalLM, LoraConfig(r=4, target_modules="all-linear")),
        (gpt2, AutoModelForCausalLM, VeraConfig(r=8, sharing="shape", target_modules=["c_attn", "c_fc"])),
        (gpt2, AutoModelForCausalLM, LoraConfig(r=4, bias="lora_only")),
        (bert, AutoModelForMaskedLM, VeraConfig(r=8, bias="all")),
    ],
    ids=["llama-vera", "llama-lora", "gpt2-vera", "gpt2-lora-bias", "bert-vera-bias"],
)
def test_the_folder_is_the_adapted_model(tmp_path: Path, make: Any, auto: Any, config: Any) -> None:
    saved(make(), tmp_path / "base")
    want = adapter(make(), config, tmp_path / "adapter")
    assert distance(want, logits(make())) > 0.01
    before = tree(tmp_path / "base"), tree(tmp_path / "adapter")
    done = as_json("merge", tmp_path / "adapter", "--base", tmp_path / "base", "--out", tmp_path / "out")
    got = auto.from_pretrained(tmp_path / "out").eval()
    assert type(got) is type(make())
    assert distance(want, logits(got)) < CLOSE
    assert done["verified"] is True
    assert done["untied"] is (make is bert)  # whose output bias is tied too, and trained here
    assert done["files"].keys() == {path.name for path in (tmp_path / "out").iterdir()}
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".safetensors"}
    assert before == (tree(tmp_path / "base"), tree(tmp_path / "adapter"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


@pytest.mark.parametrize("make", [gpt2, bert], ids=["gpt2", "bert"])
def test_an_adapted_output_layer_that_was_tied(tmp_path: Path, make: Any) -> None:
    """The output layer shares its weight with the embedding; merged, they are two, and stay so when loaded."""
    head = "lm_head" if make is gpt2 else "cls.predictions.decoder"
    saved(make(), tmp_path / "base")
    want = adapter(make(), LoraConfig(r=4, target_modules=[head]), tmp_path / "adapter", 1.0)
    assert distance(want, logits(make())) > 0.1
    done = as_json("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out")
    assert done["untied"] is True
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    auto = AutoModelForCausalLM if make is gpt2 else AutoModelForMaskedLM
    got = auto.from_pretrained(tmp_path / "out").eval()
    assert distance(want, logits(got)) < CLOSE
    inputs, plain = got.get_input_embeddings().weight, make().get_input_embeddings().weight
    assert torch.equal(inputs, plain)  # the embedding keeps the base's values


@pytest.mark.parametrize("fault", ["changed", "missing"])
def test_files_that_are_not_the_model_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """A planted fault: one weight is other than it was when its file was written; nothing is kept then."""
    saved(llama(), tmp_path / "base")
    adapter(llama(), VeraConfig(r=4), tmp_path / "adapter")
    key = "model.layers.1.mlp.up_proj.weight"

    def damage(file: Any, source: str, revision: str | None, folder: Path) -> list[str]:
        held = load_file(folder / "model.safetensors")
        held.pop(key) if fault == "missing" else held[key].view(-1)[5].add_(1e-6)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        return []

    monkeypatch.setattr(verb, "_copy_beside", damage)
    words = ("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out")
    text = error(*words)
    assert "did not come back from its files" in text
    assert f"{key}: differs after loading" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    assert kilotune(*words, "--no-verify").exit_code == 0


@pytest.mark.parametrize("make", [roberta, bert], ids=["roberta", "bert"])
def test_a_classifier_that_the_adapter_brings(tmp_path: Path, make: Any) -> None:
    """The base is a language model; the adapter's task and its head make a classifier of 3 labels of it."""
    saved(make(), tmp_path / "base")
    torch.manual_seed(9)
    labelled = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3).eval()
    want = adapter(labelled, VeraConfig(r=8, task_type="SEQ_CLS"), tmp_path / "adapter")
    assert want.shape[-1] == 3
    if make is bert:  # its pooler is in no language model and in no adapter: never random weights
        text = error("merge", tmp_path / "adapter", "--base", tmp_path / "base", "--out", tmp_path / "out")
        assert "lacks weights that the adapter does not bring" in text
        assert "bert.pooler.dense.weight: not in the base's files" in text
        assert not (tmp_path / "out").exists()
        return
    done = as_json("merge", tmp_path / "adapter", "--base", tmp_path / "base", "--out", tmp_path / "out")
    assert done["architecture"] == "RobertaForSequenceClassification"
    got = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert distance(want, logits(got)) < CLOSE


def test_an_adapter_of_the_headless_model(tmp_path: Path) -> None:
    saved(BertModel(bert().config), tmp_path / "base")
    model = BertModel.from_pretrained(tmp_path / "base").eval()
    shake(get_peft_model(model, VeraConfig(r=4))).save_pretrained(tmp_path / "adapter")
    done = as_json("merge", tmp_path / "adapter", "--base", tmp_path / "base", "--out", tmp_path / "out")
    assert done["architecture"] == "BertModel"


def test_dtype_is_as_stored_or_as_asked(tmp_path: Path) -> None:
    saved(llama().bfloat16(), tmp_path / "base")
    adapter(llama(), VeraConfig(r=8), tmp_path / "adapter")
    words = ("merge", tmp_path / "adapter", "--base", tmp_path / "base", "--out")
    assert as_json(*words, tmp_path / "a")["dtype"] == "bfloat16"
    assert as_json(*words, tmp_path / "b", "--dtype", "float32")["dtype"] == "float32"
    held = load_file(tmp_path / "b" / "model.safetensors")
    assert {value.dtype for value in held.values()} == {torch.float32}
    wide = llama().bfloat16().float()
    want = logits(PeftModel.from_pretrained(wide, tmp_path / "adapter"))
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert distance(want, logits(got)) < CLOSE


def test_what_16_bits_round_away_is_told(tmp_path: Path) -> None:
    saved(llama().bfloat16(), tmp_path / "base")
    adapter(llama(), VeraConfig(r=8), tmp_path / "adapter", 1e-3)
    words = ("merge", tmp_path / "adapter", "--base", tmp_path / "base", "--out", tmp_path / "out")
    result = kilotune(*words)
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: merging rounded ")
    assert len(as_json(*words, "--force")["warnings"]) == 1


def test_tokenizer_files_come_along(tmp_path: Path) -> None:
    saved(llama(), tmp_path / "base")
    adapter(llama(), VeraConfig(r=4), tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "spm.model", "evil.py", "pytorch_model.bin"):
        (tmp_path / "base" / name).write_text(f"base {name}")
    words = ("merge", tmp_path / "adapter", "--base", tmp_path / "base", "--out", tmp_path / "out")
    assert as_json(*words)["copied"] == ["spm.model", "tokenizer.json", "tokenizer_config.json"]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "base tokenizer.json"
    assert not (tmp_path / "out" / "evil.py").exists()
    # a chat template is no tokenizer, and comes with the base's
    (tmp_path / "adapter" / "chat_template.jinja").write_text("adapter's")
    copied = ["chat_template.jinja", "spm.model", "tokenizer.json", "tokenizer_config.json"]
    assert as_json(*words, "--force")["copied"] == copied
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "adapter's"
    (tmp_path / "adapter" / "chat_template.jinja").unlink()
    # a tokenizer that was saved with the adapter is the one it was trained with, and goes alone
    (tmp_path / "adapter" / "tokenizer.json").write_text("adapter")
    assert as_json(*words, "--force")["copied"] == ["tokenizer.json"]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "adapter"
    assert not (tmp_path / "out" / "spm.model").exists()


def test_the_base_that_an_adapter_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id is taken; a local path in somebody's adapter is never opened by itself."""
    base = saved(llama(), tmp_path / "base")
    config = VeraConfig(r=4)
    shake(get_peft_model(llama(), config)).save_pretrained(tmp_path / "nameless")
    assert "does not say what its base is" in error("merge", tmp_path / "nameless", "-o", tmp_path / "out")
    shake(get_peft_model(llama(), config.replace(base_model_name_or_path=str(base)))).save_pretrained(tmp_path / "a")
    text = error("merge", tmp_path / "a", "-o", tmp_path / "out")
    assert f"names a local path as its base ({str(base)!r})" in text
    assert f"--base {base}" in text
    # a relative path that looks like a hub id
    monkeypatch.chdir(tmp_path)
    named = config.replace(base_model_name_or_path="base")
    shake(get_peft_model(llama(), named)).save_pretrained(tmp_path / "b")
    assert "names a local path" in error("merge", "b", "-o", "out")
    # not here: a hub id, which is asked for (and there is no network in the tests)
    asked = []

    def hub(file: Any, source: str, revision: str | None, built_in: Any) -> Any:
        asked.append((source, revision, built_in))
        raise KeyboardInterrupt

    monkeypatch.setattr(_adapter, "fitting_base", hub)
    named = config.replace(base_model_name_or_path="gpt2", revision="v2")
    shake(get_peft_model(llama(), named)).save_pretrained(tmp_path / "c")
    result = kilotune("merge", "c", "-o", "out")
    assert asked == [("gpt2", "v2", {})]  # no built-in name: those have no weights
    assert (result.exit_code, result.stdout) == (130, "")
    assert not (tmp_path / "out").exists()


def test_a_non_finite_adapter_is_refused(tmp_path: Path) -> None:
    saved(llama(), tmp_path / "base")
    adapted = shake(get_peft_model(llama(), VeraConfig(r=4)))
    next(iter(dict(adapted.adapter_parameters()).values())).data[0] = float("inf")
    adapted.save_pretrained(tmp_path / "adapter")
    words = ("merge", tmp_path / "adapter", "--base", tmp_path / "base", "--out", tmp_path / "out")
    text = error(*words)
    assert "not finite" in text
    assert not (tmp_path / "out").exists()
    assert "not finite" in error(*words, "--no-safe")  # which is for what merging makes of finite numbers
    for _, parameter in adapted.adapter_parameters():
        parameter.data.fill_(3e38)
    adapted.save_pretrained(tmp_path / "adapter")
    assert "not finite" in error(*words)
    assert not (tmp_path / "out").exists()
    assert kilotune(*words, "--no-safe").exit_code == 0  # the caller's explicit choice


def test_the_output_folder_is_guarded(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    adapter(llama(), VeraConfig(r=4), tmp_path / "adapter")
    out = tmp_path / "deep" / "out"
    words = ("merge", tmp_path / "adapter", "--base", base, "--out")
    assert kilotune(*words, out).exit_code == 0
    assert "is there and not empty" in error(*words, out)
    (out / "stray.json").write_text("old")
    assert kilotune(*words, out, "--force").exit_code == 0
    assert not (out / "stray.json").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert kilotune(*words, empty).exit_code == 0
    (tmp_path / "file").write_text("x")
    assert "is a file" in error(*words, tmp_path / "file")
    before = tree(base)
    for inside in (base, tmp_path, tmp_path / "adapter"):
        assert "is, or contains," in error(*words, inside, "--force")
    assert tree(base) == before


def test_a_failure_leaves_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(llama(), tmp_path / "base")
    adapter(llama(), VeraConfig(r=4), tmp_path / "adapter")
    words = ("merge", tmp_path / "adapter", "--base", tmp_path / "base", "--out", tmp_path / "out", "--force")
    assert kilotune(*words).exit_code == 0
    before = tree(tmp_path / "out")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    (tmp_path / "base" / "vocab.json").write_text("{}")
    assert "No space left on device" in error(*words)
    assert tree(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    adapter(llama(), VeraConfig(r=4), tmp_path / "adapter")
    (base / "model.safetensors").unlink()
    torch.save({}, base / "pytorch_model.bin")
    text = error("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out")
    assert "cannot load the weights of the base" in text
    assert "safetensors" in text


def test_bad_input(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    adapter(llama(), VeraConfig(r=4), tmp_path / "adapter")
    words = ("merge", tmp_path / "adapter", "-o", tmp_path / "out", "--base")
    assert "Did you mean 'bfloat16'?" in error(*words, base, "--dtype", "bfloat61")
    assert "needs the folder" in error(*words, base / "config.json")
    assert "is not on the hub" in error(*words, base, "--revision", "main")
    assert "is a folder here, so it has no revisions" in error(*words, base, "--adapter-revision", "x")
    assert "Missing option '--out'" in error("merge", tmp_path / "adapter")
    assert "No such option" in error(*words, base, "--quick")
    # another base: every misfit is listed
    other = saved(llama(hidden_size=32), tmp_path / "other")
    text = error(*words, other)
    assert "the model expects (32,), the file has (16,)" in text
    assert text.count("shape of ") == 4  # b of q of both layers, and of v
    # an adapter that was changed after it was written
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_NAME)
    key = next(iter(tensors))
    tensors[key] += 1
    metadata = {"format": "pt", "kilotune_sha256": "0" * 64}
    save_file(tensors, tmp_path / "adapter" / WEIGHTS_NAME, metadata=metadata)
    assert "is damaged" in error(*words, base)
    assert not (tmp_path / "out").exists()


def test_what_it_says(tmp_path: Path) -> None:
    saved(gpt2(), tmp_path / "base")
    adapter(gpt2(), LoraConfig(r=4, target_modules=["lm_head"]), tmp_path / "adapter")
    result = kilotune("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out", "--no-verify")
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    assert "the tied weights are apart now" in text
    assert "not loaded again" in text
    assert "GPT2LMHeadModel" in text


def test_force_deletes_nothing_but_a_model(tmp_path: Path) -> None:
    """The whole of OUT is replaced, so what else lies there is a reason to refuse."""
    thesis = tmp_path / "out" / "sub" / "thesis.tex"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "adapter_config.json").write_text("{}")
    text = error("merge", tmp_path / "none", "--base", tmp_path / "base", "--out", tmp_path / "out", "--force")
    assert "holds more than a model, and --force would delete it: sub" in text
    assert thesis.read_text() == "years of work"
