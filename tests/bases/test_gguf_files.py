"""A GGUF file becomes a folder of transformers with the same weights; what would not is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kilotune.bases import located
from kilotune.errors import CheckpointError, ConfigError, MissingExtraError, ResourceError
from tests.support.gguf_models import TEMPLATE, toy, write


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOTUNE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(("kind", "dtype"), [("Q4_1", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_the_folder_has_the_files_weights_bit_for_bit(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = toy(0, dtype)
    folder = located(str(write(tmp_path / "toy.gguf", model, kind)))
    again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert again.dtype == dtype
    assert getattr(again.config, "quantization_config", None) is None
    assert again.lm_head.weight is again.model.embed_tokens.weight
    found = again.state_dict()
    assert found.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(found[name].float(), value), name
    assert again.config.rope_parameters["rope_theta"] == 50000.0
    if dtype is torch.float32:
        ids = torch.tensor([[1, 35, 36, 2]])
        assert torch.allclose(again(ids).logits, model.eval()(ids).logits, atol=1e-5)


def test_the_folder_has_the_tokenizer_and_its_template(tmp_path: Path) -> None:
    folder = located(str(write(tmp_path / "toy.gguf", toy())))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 128
    ids = tokenizer("hi <|im_end|>é").input_ids
    assert ids == [259, 3 + ord(" "), 2, *(3 + byte for byte in "é".encode())]  # the bytes follow three tokens
    assert tokenizer.decode(ids) == "hi <|im_end|>é"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_it_is_made_once_and_anew_when_the_file_changes(tmp_path: Path) -> None:
    file = write(tmp_path / "toy.gguf", toy())
    folder = Path(located(str(file)))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert located(str(file)) == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    write(file, toy(1))
    os.utime(file, ns=(0, 10**9))
    other = located(str(file))
    assert other != str(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(AutoModelForCausalLM.from_pretrained(other).state_dict()[name], toy(1).state_dict()[name])


def test_what_transformers_would_leave_out_is_refused(tmp_path: Path) -> None:
    # transformers 5.23 knows no rope_freqs, in which Llama 3's files have the scaling of their positions.
    file = write(tmp_path / "scaled.gguf", toy(), more={"rope_freqs.weight": torch.ones(8)})
    with pytest.raises(ConfigError, match="of the .* in this file, so it would not be the same model"):
        located(str(file))
    assert [*(tmp_path / "cache" / "gguf").iterdir()] == []


def test_files_that_hold_no_such_model_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write(tmp_path / "other.gguf", toy(), architecture="clip")
    with pytest.raises(ConfigError, match="no causal language model .* architecture is 'clip'"):
        located(str(other))
    text = tmp_path / "text.gguf"
    text.write_text("hello")
    with pytest.raises(ConfigError, match="is no GGUF file"):
        located(str(text))
    cut = write(tmp_path / "cut.gguf", toy())
    cut.write_bytes(cut.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="is damaged"):
        located(str(cut))
    with pytest.raises(ConfigError, match="is not there; expected a GGUF file"):
        located(str(tmp_path / "none.gguf"))
    good = write(tmp_path / "good.gguf", toy())
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "gguf", None)
        with pytest.raises(MissingExtraError, match=r"needs the package 'gguf': pip install 'kilotune\[export\]'"):
            located(str(good))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
        with pytest.raises(ResourceError, match="set KILOTUNE_CACHE to a folder with room"):
            located(str(good))
    assert [*(tmp_path / "cache" / "gguf").iterdir()] == []
