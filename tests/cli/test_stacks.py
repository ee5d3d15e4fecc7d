"""A personal adapter on top of a shared one, by command: generate, evaluate, merge, export, convert, inspect."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import Tensor
from transformers import AutoModelForCausalLM

from kilotune import BitfitConfig, LoraConfig, PeftModel, StandsOnWarning, VeraConfig, get_peft_model
from kilotune.adapter_files.content import content_sha256
from kilotune.adapter_files.files import read_files, write
from kilotune.adapter_files.reading import open_adapter
from kilotune.adapter_files.stands_on import StandsOn, with_mark
from tests.support.cli_helpers import as_json, distance, error, llama, logits, saved, shake
from tests.support.generation_support import PROMPT, pair
from tests.support.train_support import prompts, write_jsonl

CLOSE = 2e-6
SHARED = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
PERSONAL: dict[str, Any] = {
    "vera": VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "lora": LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", rank_pattern={"v_proj": 1}),
    "bitfit": BitfitConfig(target_modules=["q_proj"]),
}


def base() -> Any:
    return llama(attention_bias=True)


def adapted(config: Any, seed: int) -> PeftModel:
    return shake(get_peft_model(base(), config), seed=seed)


def stack(folder: Path, personal: str = "vera", marked: bool = True) -> dict[str, Tensor]:
    """Write the base, the shared adapter and the personal one; the weights of both merged, worked out apart."""
    saved(base(), folder / "base")
    models = [adapted(SHARED, 5), adapted(PERSONAL[personal], 6)]
    for name, model in zip(("style", "ann"), models, strict=True):
        model.save_pretrained(folder / name)
    if marked:
        files = read_files(folder / "ann")
        mark = StandsOn("style", None, content_sha256(open_adapter(folder / "style")))
        write(folder / "ann", files.config, files.tensors, with_mark(files.header, mark))
    plain = base().double().state_dict()
    whole = {name: value.clone() for name, value in plain.items()}
    for model in models:
        merged = model.double().merge_and_unload().state_dict()
        for name, value in merged.items():
            whole[name] += value - plain[name]
    return whole


def expected(whole: dict[str, Tensor]) -> Tensor:
    """The logits of a plain model with these weights."""
    model = base().double()
    model.load_state_dict(whole)
    return logits(model)


def words(folder: Path, verb: str, *more: object) -> tuple[object, ...]:
    return (verb, folder / "ann", "--base", folder / "base", *more)


@pytest.mark.parametrize("personal", PERSONAL)
def test_a_stack_is_merged_whole(tmp_path: Path, personal: str) -> None:
    want = expected(stack(tmp_path, personal))
    done = as_json(*words(tmp_path, "export", "--on", tmp_path / "style", "--to", "merged", "--out", tmp_path / "out"))
    assert done["on"] == str(tmp_path / "style")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out").double()
    assert distance(want, logits(made)) < CLOSE
    with pytest.warns(StandsOnWarning, match="runs without it now"):
        alone = PeftModel.from_pretrained(base(), tmp_path / "ann")
    assert distance(want, logits(alone)) > 1e-3


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("personal", ["vera", "lora"])
def test_a_stack_of_low_rank_is_one_lora_of_summed_rank(tmp_path: Path, personal: str) -> None:
    want = expected(stack(tmp_path, personal))
    on = ("--on", tmp_path / "style", "--to", "lora")
    done = as_json(*words(tmp_path, "export", *on, "--out", tmp_path / "out"))
    assert done["rank"] == 3 + {"vera": 4, "lora": 2}[personal]
    ours = PeftModel.from_pretrained(base().double(), tmp_path / "out").double()
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "out").double()
    for model in (ours, theirs):
        assert distance(want, logits(model)) < 1e-5
    assert StandsOn.of_header(open_adapter(tmp_path / "out").metadata) is None, "it is whole by itself"
    small = as_json(*words(tmp_path, "export", *on, "--rank", 2, "--out", tmp_path / "small"))
    assert small["rank"] == 2
    assert max(small["errors"].values()) > 0


def test_what_is_no_lora_is_refused_by_name(tmp_path: Path) -> None:
    stack(tmp_path, "bitfit")
    told = error(*words(tmp_path, "export", "--on", tmp_path / "style", "--to", "lora", "--out", tmp_path / "out"))
    assert "the personal one of the stack is no LoRA: bitfit" in told
    assert "--to merged" in told
    assert not (tmp_path / "out").exists()


def test_a_stack_in_gguf_is_the_sum_of_both(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    stack(tmp_path, "vera")
    on = ("--on", tmp_path / "style", "--to", "gguf")
    done = as_json(*words(tmp_path, "export", *on, "--out", tmp_path / "a.gguf"))
    assert done["rank"] == 7
    names = {tensor.name.rpartition(".")[0] for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert {name.split(".")[2] for name in names} == {"attn_q", "attn_v", "ffn_down"}


@pytest.mark.parametrize("verb", ["merge", "export", "generate", "evaluate", "chat"])
def test_an_adapter_that_stands_on_one_is_not_run_without_it(tmp_path: Path, verb: str) -> None:
    stack(tmp_path)
    more = {
        "merge": ("--out", tmp_path / "out"),
        "export": ("--to", "merged", "--out", tmp_path / "out"),
        "generate": ("hello",),
        "evaluate": (tmp_path / "data.jsonl",),
        "chat": (),
    }[verb]
    told = error(verb, tmp_path / "ann", *more, "--base", tmp_path / "base")
    assert "was trained on top of 'style', and is another one without it" in told
    assert f"perhaps --on {tmp_path / 'style'}" in told
    adapted(SHARED, 9).save_pretrained(tmp_path / "other")
    told = error(verb, tmp_path / "ann", *more, "--base", tmp_path / "base", "--on", tmp_path / "other")
    assert "other numbers" in told
    told = error(verb, tmp_path / "style", *more, "--base", tmp_path / "base", "--on", tmp_path / "ann")
    assert "stands on 'style' itself, and a stack has two levels" in told


def test_generate_writes_what_the_merged_stack_writes(tmp_path: Path) -> None:
    place, adapter = pair("llama", False)
    model = AutoModelForCausalLM.from_pretrained(place)
    shared = shake(get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])), seed=8)
    shared.save_pretrained(tmp_path / "style")
    how = ("--on", tmp_path / "style")
    as_json("merge", adapter, "--base", place, *how, "--out", tmp_path / "whole")
    stacked = as_json("generate", adapter, PROMPT, "--base", place, *how, "--max-tokens", 12)
    whole = as_json("generate", tmp_path / "whole", PROMPT, "--max-tokens", 12)
    assert stacked["text"] == whole["text"]
    assert stacked["text"] != as_json("generate", adapter, PROMPT, "--base", place, "--max-tokens", 12)["text"]
    assert stacked["on"] == str(tmp_path / "style")
    assert "is a whole model" in error("generate", tmp_path / "whole", PROMPT, *how)


def test_inspect_says_what_it_stands_on_and_convert_keeps_it(tmp_path: Path) -> None:
    stack(tmp_path)
    style = as_json("inspect", tmp_path / "style")
    assert style["stands_on"] is None
    found = as_json("inspect", tmp_path / "ann")["stands_on"]
    assert found == {"name": "style", "version": None, "sha256": style["content_sha256"]}
    as_json("convert", tmp_path / "ann", tmp_path / "out", "--to", "lora", "--base", tmp_path / "base")
    assert as_json("inspect", tmp_path / "out")["stands_on"] == found


def test_evaluate_scores_what_the_merged_stack_scores(tmp_path: Path) -> None:
    place, adapter = pair("llama", False)
    model = AutoModelForCausalLM.from_pretrained(place)
    shared = shake(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])), seed=8)
    shared.save_pretrained(tmp_path / "style")
    data = write_jsonl(tmp_path / "test.jsonl", prompts(5))
    how = ("--task", "causal-lm")
    as_json("merge", adapter, "--base", place, "--on", tmp_path / "style", "--out", tmp_path / "whole")
    stacked = as_json("evaluate", adapter, data, "--base", place, "--on", tmp_path / "style", *how)
    whole = as_json("evaluate", tmp_path / "whole", data, *how)
    alone = as_json("evaluate", adapter, data, "--base", place, *how)
    assert any("loss" in name for name in whole["metrics"])
    for name, value in whole["metrics"].items():
        if "loss" in name:
            assert abs(stacked["metrics"][name] - value) < 1e-4 * abs(value)
            assert abs(alone["metrics"][name] - value) > 1e-3 * abs(value)
    assert stacked["on"] == str(tmp_path / "style")
