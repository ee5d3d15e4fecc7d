"""``kilotune inspect``: what is in an adapter folder, and whether its checksums hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kilotune import LoraConfig, VeraConfig, get_peft_model
from kilotune.adapter_files.files import CONFIG_NAME, WEIGHTS_NAME
from kilotune.cli import _adapter
from tests.support.cli_helpers import as_json, error, kilotune, llama, saved, shake
from tests.support.models import untie

VERA = VeraConfig(r=6, target_modules=["q_proj", "down_proj"], projection_prng_key=3)


def written(folder: Path, config: Any = VERA) -> Path:
    shake(get_peft_model(llama(), config)).save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The base's config.json alone: inspecting needs no weights."""
    folder = tmp_path / "base"
    llama().config.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": ["LlamaForCausalLM"]}))
    return file


def metadata(folder: Path) -> dict[str, str]:
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        return dict(file.metadata())


def rewrite(folder: Path, change: Any = None, **more: str) -> None:
    """Write the weights again with something changed, under the old metadata."""
    tensors, old = load_file(folder / WEIGHTS_NAME), metadata(folder)
    if change is not None:
        change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME, metadata={**old, **more})


def test_a_vera_adapter(tmp_path: Path, base: Path) -> None:
    folder = written(tmp_path / "adapter")
    done = as_json("inspect", folder)
    assert (done["method"], done["rank"], done["targets"]) == ("vera", 6, ["q_proj", "down_proj"])
    assert done["layers"] == 4
    assert done["trained"] == 4 * (16 + 6)
    assert done["tensor_bytes"] == 4 * done["trained"]
    assert done["stored_projections"] == 0
    assert done["files"] == {path.name: path.stat().st_size for path in folder.iterdir()}
    assert done["checksums"] == {"tensors": "verified", "projections": "present, not verified: give --base"}
    assert done["config"]["projection_prng_key"] == 3
    assert done["metadata"] == metadata(folder)
    assert done["tensors"]["model.layers.0.self_attn.q_proj.vera_lambda_d"] == {"shape": [6], "dtype": "float32"}
    assert len(done["tensors"]) == 8
    assert done["non_finite"] == []
    assert done["written_for"] == "kilotune"
    with_base = as_json("inspect", folder, "--base", base)
    assert with_base["checksums"] == {"tensors": "verified", "projections": "verified"}
    assert with_base["fits"] == str(base)


# PEFT reads an attribute that transformers has renamed since.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_other_forms(tmp_path: Path, base: Path) -> None:
    lora = as_json("inspect", written(tmp_path / "lora", LoraConfig(r=2, target_modules=["q_proj"])))
    assert lora["checksums"] == {"tensors": "verified", "projections": "not present"}
    assert lora["written_for"] == "PEFT and kilotune"
    stored = as_json("inspect", written(tmp_path / "stored", VERA.replace(save_projection=True)), "--base", base)
    assert stored["checksums"]["projections"] == "none needed: the matrices are in the file"
    assert stored["stored_projections"] == 6 * (24 + 16)
    shape = as_json("inspect", written(tmp_path / "shape", VERA.replace(sharing="shape")), "--base", base)
    assert shape["checksums"]["projections"] == "verified"
    theirs = peft.get_peft_model(llama(), peft.VeraConfig(r=6, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path / "theirs")
    by_peft = as_json("inspect", tmp_path / "theirs", "--base", base)
    assert by_peft["checksums"]["tensors"] == "not present"
    assert by_peft["written_for"] == "PEFT and kilotune"
    assert "README.md" in by_peft["files"]


@pytest.mark.parametrize("words", [(), ("--json",)], ids=["text", "json"])
def test_a_changed_tensor_is_a_mismatch(tmp_path: Path, words: tuple[str, ...]) -> None:
    folder = written(tmp_path / "adapter")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values())).view(-1)[0].add_(1e-6)

    rewrite(folder, change)
    result = kilotune("inspect", folder, *words)
    assert result.exit_code == 1
    assert "tensors: MISMATCH: expected SHA-256 " in result.stderr
    assert metadata(folder)["kilotune_sha256"] in result.stderr
    if words:
        assert json.loads(result.stdout)["checksums"] == {"tensors": "MISMATCH"}


def test_matrices_of_another_seed_are_a_mismatch(tmp_path: Path, base: Path) -> None:
    """The tensors are whole; the config was edited, so the seed gives other matrices than at training."""
    folder = written(tmp_path / "adapter")
    values = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**values, "projection_prng_key": 4}))
    assert "do not belong together" in error("inspect", folder)
    untie(folder)  # as in a file that others wrote
    assert kilotune("inspect", folder).exit_code == 0  # without the base nobody can know
    result = kilotune("inspect", folder, "--base", base, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["checksums"] == {"tensors": "verified", "projections": "MISMATCH"}
    assert result.stderr.startswith("error: projections: MISMATCH: ")
    assert kilotune("inspect", folder, "--base", base).exit_code == 1


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    model = get_peft_model(llama(), VERA)
    next(iter(dict(model.adapter_parameters()).values())).data[0] = float("nan")
    model.save_pretrained(tmp_path / "adapter")
    result = kilotune("inspect", tmp_path / "adapter", "--json")
    assert result.exit_code == 1
    assert len(json.loads(result.stdout)["non_finite"]) == 1


def test_another_base_is_told_with_all_that_does_not_fit(tmp_path: Path) -> None:
    folder = written(tmp_path / "adapter")
    other = saved(llama(hidden_size=32, num_hidden_layers=1), tmp_path / "other")
    text = error("inspect", folder, "--base", other)
    assert "unexpected: model.layers.1.self_attn.q_proj.vera_lambda_b (16,)" in text
    assert "the model expects (32,), the file has (16,)" in text


def test_the_head_of_the_adapter(tmp_path: Path) -> None:
    """A classifier's adapter is held against its base with a classifier of as many labels."""
    from transformers import LlamaForSequenceClassification

    config = llama().config
    config.num_labels = 5
    model = get_peft_model(LlamaForSequenceClassification(config), VERA.replace(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "adapter")
    saved(llama(), tmp_path / "base")
    done = as_json("inspect", tmp_path / "adapter", "--base", tmp_path / "base")
    assert done["checksums"]["projections"] == "verified"


def test_the_text(tmp_path: Path) -> None:
    folder = written(tmp_path / "adapter", VERA.replace(target_modules=r".*\.[qv]_proj"))
    text = kilotune("inspect", folder).stdout
    assert r".*\.[qv]_proj" in text
    assert "checksum of the tensors" in text
    assert "verified" in text
    many = written(tmp_path / "many", LoraConfig(r=1, target_modules="all-linear"))
    short, whole = kilotune("inspect", many).stdout, kilotune("inspect", many, "--all").stdout
    assert "... and 4 more (--all lists them)" in short
    assert len(whole.splitlines()) == len(short.splitlines()) + 3


def test_bad_input(tmp_path: Path) -> None:
    folder = written(tmp_path / "adapter")
    assert "holds no adapter_config.json. Adapters are in its subfolders: adapter" in error("inspect", tmp_path)
    assert "is no folder in" in error("inspect", tmp_path / "none")
    assert "has no revisions" in error("inspect", folder, "--adapter-revision", "x")
    assert "--revision is of --base" in error("inspect", folder, "--revision", "x")
    assert "holds no config.json" in error("inspect", folder, "--base", folder)
    weights = folder / WEIGHTS_NAME
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    assert "truncated" in error("inspect", folder)
    weights.write_bytes(b"\xff" * 8 + whole[8:])
    assert "the header claims" in error("inspect", folder)
    weights.write_bytes(whole)
    config = json.loads((folder / CONFIG_NAME).read_text())
    for change, message in (
        ({"peft_type": "VERB"}, "Did you mean 'vera'?"),
        ({"r": 0}, "r: expected a whole number >= 1"),
        ({"kilotune": {**config["kilotune"], "weights": "../../x"}}, "outside the adapter's folder"),
    ):
        (folder / CONFIG_NAME).write_text(json.dumps({**config, **change}))
        assert message in error("inspect", folder)
    (folder / CONFIG_NAME).write_text("{")
    assert "is no JSON" in error("inspect", folder)


def test_what_the_labels_are_read_from() -> None:
    class File:
        def __init__(self, task: str, tensors: dict[str, torch.Tensor]) -> None:
            self.config, self.tensors = LoraConfig(task_type=task, target_modules="x"), tensors

    def labels(task: str, **tensors: tuple[int, ...]) -> int | None:
        return _adapter.head_labels(File(task, {k.replace("__", "."): torch.zeros(v) for k, v in tensors.items()}))  # type: ignore[arg-type]

    assert labels("SEQ_CLS", score__weight=(5, 16)) == 5
    assert labels("SEQ_CLS", classifier__dense__weight=(9, 9), classifier__out_proj__weight=(3, 9)) == 3
    assert labels("SEQ_CLS", classifier__bias=(3,)) is None
    assert labels("CAUSAL_LM", score__weight=(5, 16)) is None
