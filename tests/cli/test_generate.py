"""``kilotune generate``: the text is the one that transformers' own ``generate`` writes with the merged model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from kilotune import PeftModel, VeraConfig, get_peft_model
from kilotune.cli.main import app
from kilotune.errors import CheckpointError, ConfigError
from kilotune.train.finished.sampling_options import Sampling
from kilotune.train.finished.text_generation import Writer
from tests.support.cli_helpers import as_json, error, kilotune, saved, shake
from tests.support.generation_support import PROMPT, greedy, loaded, merged, pair
from tests.support.train_support import LENGTH, model_folder, sentence

COUNT = 12


def generate(kind: str, *more: object, template: bool = False) -> Any:
    base, adapter = pair(kind, template)
    how = ("--template",) if template else ()
    return as_json("generate", adapter, PROMPT, "--base", base, "--max-tokens", COUNT, *how, *more)


def written(kind: str, template: bool = False) -> tuple[str, list[int]]:
    """(text, tokens) of transformers' own ``generate`` with the merged model."""
    base, adapter = pair(kind, template)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if template:
        messages = [{"role": "user", "content": PROMPT}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer(PROMPT)["input_ids"]
    made = greedy(merged(kind, base, adapter), ids, COUNT)
    return tokenizer.decode(made, skip_special_tokens=True), made


# -- the text --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "template"), [("llama", False), ("llama", True), ("gpt2", False), ("gpt2", True), ("t5", False)]
)
def test_the_text_is_that_of_the_merged_model(kind: str, template: bool) -> None:
    text, ids = written(kind, template)
    done = generate(kind, template=template)
    assert done["text"] == text
    assert done["tokens"] == len(ids)
    assert len(set(ids)) > (1 if kind == "t5" else 2)  # a model that says one thing for ever would pass with any fault
    assert done["template"] is template
    assert done["reason"] == ("length" if len(ids) == COUNT else "end")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_the_base_alone_writes_something_else(kind: str) -> None:
    base, _ = pair(kind)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = greedy(loaded(kind, base), tokenizer(PROMPT)["input_ids"], COUNT)
    alone = generate(kind, "--base-alone")
    assert alone["text"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert alone["adapter"] is None
    assert alone["text"] != generate(kind)["text"]


OWN = "{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}a {% endif %}"


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_an_adapters_own_chat_template_is_used_and_told(verb: str, tmp_path: Path) -> None:
    base, adapter = pair("llama", True)
    shutil.copytree(adapter, tmp_path / "own")
    (tmp_path / "own" / "chat_template.jinja").write_text(OWN)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], chat_template=OWN, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    words = [verb, str(tmp_path / "own"), "--base", str(base), "-n", str(COUNT), "--template", "--json"]
    words += [PROMPT] if verb == "generate" else []
    result = CliRunner().invoke(app, words, input=None if verb == "generate" else f"{PROMPT}\n", catch_exceptions=False)
    assert f"warning: chats are in the adapter's own chat template, which is not that of {base}" in result.stderr
    done = json.loads(result.stdout)
    told = done if verb == "generate" else done["turns"][0]
    assert told["prompt_tokens"] == len(ids)
    made = greedy(merged("llama", base, adapter), ids, COUNT)
    assert told["text"] == tokenizer.decode(made, skip_special_tokens=True)


def test_the_bases_own_template_is_not_told(tmp_path: Path) -> None:
    base, adapter = pair("llama", True)
    shutil.copytree(adapter, tmp_path / "own")
    (tmp_path / "own" / "chat_template.jinja").write_text(AutoTokenizer.from_pretrained(base).chat_template)
    result = kilotune("generate", tmp_path / "own", PROMPT, "--base", base, "-n", 2, "--template")
    assert result.stderr == ""


def test_on_a_screen_it_is_the_text_alone() -> None:
    base, adapter = pair("llama")
    result = kilotune("generate", adapter, PROMPT, "--base", base, "-n", COUNT)
    assert result.exit_code == 0
    assert result.stdout == written("llama")[0] + "\n"
    assert result.stderr == ""


def test_the_prompt_can_be_piped_in() -> None:
    base, adapter = pair("gpt2")
    words = ["generate", str(adapter), "--base", str(base), "-n", str(COUNT)]
    result = CliRunner().invoke(app, words, input=f"{PROMPT}\n", catch_exceptions=False)
    assert result.stdout == written("gpt2")[0] + "\n"


def test_a_system_message_is_part_of_the_prompt() -> None:
    base, adapter = pair("llama", True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    messages = [{"role": "system", "content": sentence(1, 3)}, {"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    done = as_json("generate", adapter, PROMPT, "--base", base, "-n", COUNT, "--system", sentence(1, 3))
    assert done["template"] is True
    assert done["prompt_tokens"] == len(ids)
    assert done["text"] == tokenizer.decode(
        greedy(merged("llama", base, adapter), ids, COUNT), skip_special_tokens=True
    )
    plain = as_json("generate", adapter, PROMPT, "--base", base, "-n", COUNT, "--plain")
    assert plain["prompt_tokens"] == len(tokenizer(PROMPT)["input_ids"])
    unknown = as_json("generate", adapter, PROMPT, "--base", base, "-n", COUNT)
    assert unknown["template"] is True, "nothing is known of how it was trained, and there is a template"
    assert plain["template"] is False


def test_the_adapters_own_tokenizer_comes_first(tmp_path: Path) -> None:
    """The one that it was trained with: here with a chat template, which the base's has not."""
    base, adapter = pair("llama")
    mine = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    AutoTokenizer.from_pretrained(pair("llama", True)[0]).save_pretrained(mine)
    done = as_json("generate", mine, PROMPT, "--base", base, "-n", COUNT, "--template")
    assert done["template"] is True
    assert "no chat template" in error("generate", adapter, PROMPT, "--base", base, "--template")


def test_a_whole_model_needs_no_base(tmp_path: Path) -> None:
    base, adapter = pair("llama")
    saved(merged("llama", base, adapter), tmp_path / "whole")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "whole")
    done = as_json("generate", tmp_path / "whole", PROMPT, "-n", COUNT)
    assert done["text"] == written("llama")[0]
    assert "is a whole model" in error("generate", tmp_path / "whole", PROMPT, "--base", base)
    assert "is a whole model" in error("generate", tmp_path / "whole", PROMPT, "--base-alone")


# -- how it ends and how it is drawn ---------------------------------------------------------------


def test_stops_end_the_text_before_them() -> None:
    text, ids = written("llama")
    stop = text[len(text) // 2 :][:3]
    done = generate("llama", "--stop", "not in there", "--stop", stop)
    assert done["text"] == text[: text.index(stop)]
    assert done["reason"] == "stop"
    assert done["tokens"] < len(ids)


def test_the_end_of_text_token_ends_it() -> None:
    """The end is in the tokenizer's words, not in the model's own settings, and none of it is shown."""
    base, adapter = pair("llama")
    tokenizer = AutoTokenizer.from_pretrained(base)
    text, ids = written("llama")
    at = next(i for i, token in enumerate(ids) if i > 1 and ids.index(token) == i)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[at])
    writer = Writer(merged("llama", base, adapter), tokenizer, Sampling(max_tokens=COUNT))
    answer = writer.write(writer.plain(PROMPT))
    assert answer.reason == "end"
    assert answer.tokens == at + 1
    assert text.startswith(answer.text)


def test_the_template_says_what_ends_a_turn() -> None:
    base, adapter = pair("llama", True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[SEP]"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>", "[SEP]")
    writer = Writer(merged("llama", base, adapter), tokenizer)
    assert tokenizer.convert_tokens_to_ids("[SEP]") in writer._ends
    assert tokenizer.eos_token_id in writer._ends


def test_drawing_is_the_seeds() -> None:
    draw = ("--temperature", 1.5, "--top-k", 0, "--top-p", 1.0)
    one, again, other = (generate("llama", *draw, "--seed", seed)["text"] for seed in (3, 3, 4))
    assert one == again != other
    free = {generate("llama", *draw)["text"] for _ in range(3)}
    assert len(free) > 1  # without a seed another text each time
    assert generate("llama", *draw, "--seed", 3, "--top-k", 1)["text"] == written("llama")[0]
    assert generate("llama", *draw[:2], "--seed", 3, "--top-p", 1e-6)["text"] == written("llama")[0]


def test_drawing_leaves_torchs_own_numbers_alone() -> None:
    base, adapter = pair("llama")
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    writer = Writer(
        merged("llama", base, adapter), AutoTokenizer.from_pretrained(base), Sampling(temperature=1, seed=1)
    )
    writer.write(writer.plain(PROMPT))
    assert torch.equal(torch.rand(3), want)


def test_the_seed_draws_as_transformers_does() -> None:
    base, adapter = pair("llama")
    tokenizer, model = AutoTokenizer.from_pretrained(base), merged("llama", base, adapter)
    given = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    torch.manual_seed(7)
    own = model.generate(given, do_sample=True, temperature=0.8, top_p=0.9, top_k=10, max_new_tokens=COUNT)
    done = generate("llama", "-t", 0.8, "--top-p", 0.9, "--top-k", 10, "--seed", 7)
    assert done["text"] == tokenizer.decode(own[0, given.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_pieces_are_the_text(kind: str) -> None:
    base, adapter = pair(kind)
    tokenizer = AutoTokenizer.from_pretrained(base)
    writer = Writer(merged(kind, base, adapter), tokenizer, Sampling(max_tokens=COUNT))
    pieces: list[str] = []
    answer = writer.write(writer.plain(PROMPT), pieces.append)
    assert "".join(pieces) == answer.text == written(kind)[0]
    assert len(pieces) > 3


def test_no_piece_is_half_a_character_or_the_beginning_of_a_stop() -> None:
    """A tokenizer of bytes, and a model that writes exactly the tokens of a text."""
    text = "one é two 漢字 three STOPS here STOP never"
    tokenizer = _bytes()
    ids = tokenizer(text)["input_ids"]
    assert any("\ufffd" in tokenizer.decode(ids[:i]) for i in range(len(ids)))
    from kilotune.train.finished.text_generation import _Stream

    pieces: list[str] = []
    stream = _Stream(tokenizer, ["STOP never"], pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in ids:
        stream.put(torch.tensor([token]))
        assert "\ufffd" not in "".join(pieces)
        if stream.stopped:
            break
    assert stream.finish() == "".join(pieces) == "one é two 漢字 three STOPS here "
    assert stream.stopped


def _bytes() -> Any:
    """A tokenizer that has a token for each byte, and no others."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


# -- what the model takes --------------------------------------------------------------------------


def test_the_models_length_is_the_limit() -> None:
    base, adapter = pair("gpt2")
    long = sentence(1, 50)
    count = len(AutoTokenizer.from_pretrained(base)(long)["input_ids"])
    assert LENGTH - 20 < count < LENGTH
    done = as_json("generate", adapter, long, "--base", base, "-n", 100)
    assert done["prompt_tokens"] + done["tokens"] == LENGTH
    assert done["reason"] == "length"
    text = error("generate", adapter, sentence(1, 80), "--base", base)
    assert f"and the model takes {LENGTH}; shorten it" in text


def test_a_tokenizer_of_another_model_is_noticed(tmp_path: Path) -> None:
    base, adapter = pair("llama")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["kilotune"])
    writer = Writer(merged("llama", base, adapter), tokenizer)
    with pytest.raises(CheckpointError, match="the tokenizer gives token 96, and the model has 96"):
        writer.write(writer.plain("kilotune"))


@pytest.mark.parametrize("more", [(), ("--template",), ("--system", "x")])
def test_half_a_character_is_no_text(more: tuple[str, ...]) -> None:
    base, adapter = pair("llama", True)
    said = error("generate", adapter, "caf\udcc3", "--base", base, *more)  # bytes of a command line that are no UTF-8
    assert "the prompt holds '\\udcc3', which is half a character and no text" in said


def test_an_empty_prompt() -> None:
    base, adapter = pair("gpt2")
    assert "the prompt is empty" in error("generate", adapter, "", "--base", base)


def test_a_model_whose_settings_ask_for_beams_writes_one_text() -> None:
    base, adapter = pair("t5")
    model = merged("t5", base, adapter)
    model.generation_config.num_beams = 4
    writer = Writer(model, AutoTokenizer.from_pretrained(base), Sampling(max_tokens=COUNT))
    assert writer.write(writer.plain(PROMPT)).text == written("t5")[0]


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--temperature", "-1"), "temperature: expected a number >= 0, got -1.0"),
        (("--top-p", "0.9"), "top_p: nothing is drawn at temperature 0"),
        (("--seed", "1"), "seed: nothing is drawn at temperature 0"),
        (("-t", "1", "--top-p", "0"), "top_p: expected a number above 0"),
        (("-n", "0"), "max_tokens: expected a whole number >= 1, got 0"),
        (("--stop", ""), "stop: expected a list of texts that are not empty"),
        (("--dtype", "float23"), "Did you mean 'float32'?"),
        (("--quantization", "nf5"), "Did you mean 'nf4'?"),
        (("--device", "gpu"), "--device: expected one of auto, cpu, cuda, got 'gpu'"),
        (("--system", "x"), "a system message needs the chat template"),
        (("--template",), "the tokenizer has no chat template"),
        (("--plain", "--system", "x"), "a system message needs the chat template"),
        (("--revision", "main"), "is a folder here, so it has no revisions"),
    ],
)
def test_bad_options(more: tuple[str, ...], text: str) -> None:
    base, adapter = pair("llama")
    assert text in error("generate", adapter, PROMPT, "--base", base, *more)


def test_faults_are_told_together() -> None:
    base, adapter = pair("llama")
    text = error("generate", adapter, PROMPT, "--base", base, "-n", 0, "--temperature", -1)
    assert "max_tokens" in text
    assert "temperature" in text


@pytest.mark.parametrize("hub", ["owner/model-that-is-not-there", "not-there"])
def test_a_base_that_cannot_be_reached(hub: str) -> None:
    _, adapter = pair("llama")
    text = error("generate", adapter, PROMPT, "--base", hub)
    assert f"error: --base: {hub!r} is no folder here" in text
    assert f"hf download {hub} --local-dir FOLDER" in text
    text = error("generate", hub, PROMPT)
    assert f"{hub!r} is no folder here, and adapter_config.json cannot be had from the hub" in text
    assert f"hf download {hub} --local-dir FOLDER" in text


def test_options_go_by_their_own_names(tmp_path: Path) -> None:
    base, adapter = pair("llama")
    assert "error: --revision: " in error("generate", adapter, PROMPT, "--base", base, "--revision", "x")
    if not torch.cuda.is_available():
        assert "error: --device: cuda, but" in error("generate", adapter, PROMPT, "--base", base, "--device", "cuda")
    text = error("generate", adapter, PROMPT, "--base", adapter)
    assert text == f"error: --base: {str(adapter)!r} holds an adapter, not a model\n"
    elsewhere = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    config = json.loads((elsewhere / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "no-such-base"
    (elsewhere / "adapter_config.json").write_text(json.dumps(config))
    text = error("generate", elsewhere, PROMPT)
    assert text.startswith("error: the base that the adapter names (--base gives another): 'no-such-base' is no folder")


def test_an_adapter_of_another_base(tmp_path: Path) -> None:
    _, adapter = pair("llama")
    text = error("generate", adapter, PROMPT, "--base", pair("gpt2")[0])
    assert "pair" not in text
    assert "the adapter in" in text or "match nothing" in text
    saved(loaded("llama", pair("llama")[0]).__class__(_wider()), tmp_path / "wide")
    AutoTokenizer.from_pretrained(pair("llama")[0]).save_pretrained(tmp_path / "wide")
    text = error("generate", adapter, PROMPT, "--base", tmp_path / "wide")
    assert "does not fit this LlamaForCausalLM" in text
    assert "the model expects (32,), the file has (16,)" in text


def _wider() -> Any:
    from transformers import LlamaConfig

    values = json.loads((pair("llama")[0] / "config.json").read_text())
    return LlamaConfig(**{**values, "hidden_size": 32, "head_dim": 16})


def test_a_base_that_only_the_adapter_names(tmp_path: Path) -> None:
    base, _ = pair("llama")
    config = VeraConfig(r=8, target_modules=["q_proj"], base_model_name_or_path=str(base))
    shake(get_peft_model(loaded("llama", base), config)).save_pretrained(tmp_path)
    assert f"if you trust it, give it yourself: --base {base}" in error("generate", tmp_path, PROMPT)


def test_a_base_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache laid out as the hub's, and no network: the adapter names the hub id, so nothing else is needed."""
    from huggingface_hub import constants

    base, adapter = pair("llama")
    place = tmp_path / "models--owner--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    shutil.copytree(base, place / "snapshots" / ("a" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    mine = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    values = json.loads((mine / "adapter_config.json").read_text())
    (mine / "adapter_config.json").write_text(json.dumps({**values, "base_model_name_or_path": "owner/tiny"}))
    done = as_json("generate", mine, PROMPT, "-n", COUNT)
    assert done["base"] == "owner/tiny"
    assert done["text"] == written("llama")[0]


def test_models_that_write_no_text(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bert = BertForSequenceClassification.from_pretrained(model_folder("bert"), num_labels=2)
    saved(bert, tmp_path / "bert")
    shake(get_peft_model(bert, VeraConfig(r=4, task_type="SEQ_CLS"))).save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(model_folder("bert")).save_pretrained(tmp_path / "bert")
    text = error("generate", tmp_path / "adapter", PROMPT, "--base", tmp_path / "bert")
    assert "a BertForSequenceClassification writes no text; kilotune evaluate scores it" in text


def test_an_image_model_writes_no_text(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_pretrained(model_folder("vit"), num_labels=2)
    saved(model, tmp_path / "vit")
    config = VeraConfig(r=4, target_modules=["q_proj"], modules_to_save=["classifier"])
    shake(get_peft_model(model, config)).save_pretrained(tmp_path / "adapter")
    assert "writes no text" in error("generate", tmp_path / "adapter", PROMPT, "--base", tmp_path / "vit")


def test_a_keyboard_gets_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    from kilotune.cli import generate as verb

    monkeypatch.setattr(verb.sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(ConfigError, match="no prompt"):
        verb._piped()


def test_ctrl_c_keeps_what_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from kilotune.train.finished import text_generation as inference

    base, adapter = pair("llama")
    put, calls = inference._Stream.put, []

    def interrupted(self: Any, tokens: Any) -> None:
        put(self, tokens)
        calls.append(tokens)
        if len(calls) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(inference._Stream, "put", interrupted)
    result = kilotune("generate", adapter, PROMPT, "--base", base, "-n", COUNT)
    assert result.exit_code == 130
    text = result.stdout.removesuffix("\n")
    assert text
    assert written("llama")[0].startswith(text)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base(quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    base, adapter = pair("llama")
    how = {"load_in_8bit": True}
    if quantization == "nf4":
        compute = {"bnb_4bit_compute_dtype": torch.bfloat16, "bnb_4bit_use_double_quant": True}
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **compute}
    quantised = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(**how))
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = greedy(PeftModel.from_pretrained(quantised, adapter).eval(), tokenizer(PROMPT)["input_ids"], COUNT)
    done = generate("llama", "--quantization", quantization)
    assert done["text"] == tokenizer.decode(ids, skip_special_tokens=True)
    if quantization == "nf4":  # 4 bits change what this model says
        assert done["text"] != written("llama")[0]
