"""Make the stand-ins: tiny random models (and adapters of them, by PEFT) under the names of the hub's, in its cache.

    python -m peft_own.models models FOLDER
    python -m peft_own.models adapters FOLDER
    python -m peft_own.models pipelines FOLDER

write FOLDER/hub as huggingface_hub lays it out, so that a hub id finds its stand-in without the network. All are
drawn from one seed. What PEFT's tests want of a model is its architecture, the number of its layers and a tokenizer.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

VOCABULARY = 1100
TEXTS = ["the quick brown fox jumps over the lazy dog", "I love PEFT!", "Hello world, this is a test.", "0123456789"]

_OPT = {"hidden_size": 16, "ffn_dim": 4, "num_hidden_layers": 5, "num_attention_heads": 4, "word_embed_proj_dim": 16}
_OPT_125M = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 12, "num_attention_heads": 4}
_GPT2 = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512}
_BLOCK = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4}
_BERT = {**_BLOCK, "num_hidden_layers": 5, "max_position_embeddings": 512}
_LLAMA = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = {**_LLAMA, "num_key_value_heads": 2}
_HEADS = {"head_dim": 8}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_decoder_layers": 5, "num_heads": 4}
_BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 4,
    "decoder_ffn_dim": 4,
}
_CLIP = {**_BLOCK, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}
_IMAGES = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 96}, "crop_pct": 0.875}
_EXPERTS = {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DEBERTA = {
    **_BERT,
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": ["c2p", "p2c"],
}


class Tiny(NamedTuple):
    """A model to stand in: its Auto class, its architecture, what its config says, and whose names it has."""

    auto: str
    kind: str
    config: dict[str, Any]
    names: tuple[str, ...]
    revision: str = "main"


def tiny(auto: str, kind: str, config: dict[str, Any], names: str) -> Tiny:
    """With names as words; one without an organisation is PEFT's own."""
    whole = (name if "/" in name else f"peft-internal-testing/{name}" for name in names.split())
    return Tiny(f"AutoModel{auto}", kind, config, tuple(name.removeprefix("/") for name in whole))


MODELS = [
    tiny("ForCausalLM", "opt", _OPT, "tiny-random-OPTForCausalLM"),
    tiny("ForCausalLM", "opt", {**_OPT_125M, "word_embed_proj_dim": 64}, "opt-125m facebook/opt-125m"),
    tiny(
        "ForCausalLM",
        "gpt2",
        _GPT2,
        "tiny-random-GPT2LMHeadModel tiny-random-gpt2 hf-internal-testing/tiny-random-gpt2",
    ),
    tiny("ForCausalLM", "gpt2", {**_GPT2, "n_embd": 48, "n_layer": 12}, "/gpt2"),
    tiny("ForCausalLM", "gptj", {**_GPT2, "rotary_dim": 4}, "tiny-random-GPTJForCausalLM"),
    tiny("ForCausalLM", "gpt_neox", {**_BLOCK, "num_hidden_layers": 5}, "tiny-random-GPTNeoXForCausalLM"),
    tiny("ForCausalLM", "bloom", {"hidden_size": 32, "n_layer": 5, "n_head": 4}, "tiny-random-BloomForCausalLM"),
    tiny(
        "ForCausalLM",
        "llama",
        _LLAMA,
        "tiny-random-LlamaForCausalLM trl-internal-testing/tiny-random-LlamaForCausalLM "
        "hf-internal-testing/tiny-random-LlamaForCausalLM HuggingFaceH4/tiny-random-LlamaForCausalLM",
    ),
    tiny(
        "ForCausalLM",
        "mistral",
        {**_GROUPED, "sliding_window": 64},
        "hf-internal-testing/tiny-random-MistralForCausalLM",
    ),
    tiny("ForCausalLM", "qwen2", _GROUPED, "tiny-dummy-qwen2 Qwen/Qwen2-0.5B"),
    tiny("ForCausalLM", "qwen3", {**_GROUPED, **_HEADS}, "trl-internal-testing/tiny-Qwen3ForCausalLM"),
    tiny("ForCausalLM", "gemma3_text", {**_GROUPED, **_HEADS}, "hf-internal-testing/tiny-random-Gemma3ForCausalLM"),
    tiny(
        "ForCausalLM",
        "qwen3_moe",
        {**_EXPERTS, **_HEADS},
        "trl-internal-testing/tiny-Qwen3MoeForCausalLM hf-internal-testing/tiny-qwen3-moe",
    ),
    tiny(
        "ForCausalLM",
        "gpt_oss",
        {**_GROUPED, **_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
        "trl-internal-testing/tiny-GptOssForCausalLM",
    ),
    tiny("ForCausalLM", "mixtral", {**_GROUPED, "num_local_experts": 4}, "hf-internal-testing/Mixtral-tiny"),
    tiny(
        "ForCausalLM",
        "llama4_text",
        {**_GROUPED, **_HEADS, "num_local_experts": 4, "intermediate_size_mlp": 32},
        "trl-internal-testing/tiny-Llama4ForCausalLM",
    ),
    tiny("ForCausalLM", "falcon_mamba", {"hidden_size": 32, "num_hidden_layers": 2}, "tiiuae/falcon-mamba-tiny-dev"),
    tiny(
        "ForSeq2SeqLM",
        "t5",
        _T5,
        "tiny-random-t5 tiny-random-T5ForConditionalGeneration tiny-random-T5ForConditionalGeneration-calibrated "
        "google/flan-t5-small google/flan-t5-base /t5-small /t5-base",
    ),
    tiny("ForSeq2SeqLM", "bart", _BART, "tiny-random-BartForConditionalGeneration"),
    tiny(
        "ForPreTraining",
        "bert",
        _BERT,
        "tiny-random-BertModel hf-internal-testing/tiny-random-BertModel /bert-base-uncased /bert-base-cased",
    ),
    tiny("ForSequenceClassification", "bert", _BERT, "tiny-random-BertForSequenceClassification"),
    tiny("", "roberta", _BERT, "tiny-random-RobertaModel"),
    tiny("ForSequenceClassification", "roberta", _BERT, "tiny-random-RobertaForSequenceClassification"),
    tiny("", "deberta", _DEBERTA, "tiny-random-DebertaModel"),
    tiny("", "deberta-v2", _DEBERTA, "tiny-random-DebertaV2Model"),
    tiny(
        "ForSequenceClassification",
        "llama",
        _GROUPED,
        "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2",
    ),
    tiny(
        "ForImageClassification",
        "resnet",
        {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1], "num_labels": 3},
        "tiny-random-ResNetForImageClassification",
    ),
    tiny("", "clip_text_model", {**_BERT, "projection_dim": 32}, "tiny-clip-text-2"),
    tiny("ForPreTraining", "bert", _BERT, "tiny-random-BertModel")._replace(revision="v2.0.0"),
    tiny("ForSpeechSeq2Seq", "whisper", {**_BART, "max_target_positions": 64}, "tiny_WhisperForConditionalGeneration"),
    tiny(
        "ForImageTextToText",
        "llava",
        {"text_config": {"model_type": "llama", **_GROUPED}, "vision_config": {**_CLIP, "num_hidden_layers": 2}},
        "hf-internal-testing/tiny-random-LlavaForConditionalGeneration",
    ),
]


class Adapter(NamedTuple):
    """An adapter to stand in: whose name it has, the base under it, and the Auto class and task of that."""

    name: str
    base: str
    auto: str
    task: str | None
    config: dict[str, Any]
    folder: str = ""
    revision: str = "main"
    longer: bool = False  # a base with more words than the model on the hub, and their tokenizer


_OWN = "peft-internal-testing/"
_LORA = {"r": 8, "init_lora_weights": False}
_ATTENTION = {**_LORA, "target_modules": ["q_proj", "v_proj"]}
_ASKED = "ForConditionalGeneration"
_OPT_LORA = Adapter(
    f"{_OWN}tiny-OPTForCausalLM-lora", f"{_OWN}tiny-random-OPTForCausalLM", "ForCausalLM", "CAUSAL_LM", _LORA
)
ADAPTERS = [
    _OPT_LORA,
    _OPT_LORA._replace(name=f"{_OWN}test-lora-subfolder", folder="test"),
    Adapter(f"{_OWN}tiny_T5ForSeq2SeqLM-lora", f"{_OWN}tiny-random-t5", "ForSeq2SeqLM", "SEQ_2_SEQ_LM", _LORA),
    Adapter(
        f"{_OWN}tiny_OPTForSequenceClassification-lora",
        f"{_OWN}tiny-random-OPTForCausalLM",
        "ForSequenceClassification",
        "SEQ_CLS",
        _LORA,
    ),
    Adapter(
        f"{_OWN}tiny_OPTForQuestionAnswering-lora",
        f"{_OWN}tiny-random-OPTForCausalLM",
        "ForQuestionAnswering",
        "QUESTION_ANS",
        _LORA,
    ),
    Adapter(
        f"{_OWN}tiny_OPTForFeatureExtraction-lora", f"{_OWN}tiny-random-OPTForCausalLM", "", "FEATURE_EXTRACTION", _LORA
    ),
    Adapter(
        f"{_OWN}tiny_GPT2ForTokenClassification-lora",
        f"{_OWN}tiny-random-gpt2",
        "ForTokenClassification",
        "TOKEN_CLS",
        _LORA,
    ),
    Adapter(f"{_OWN}tiny_Whisper{_ASKED}-lora", f"{_OWN}tiny_Whisper{_ASKED}", "ForSpeechSeq2Seq", None, _ATTENTION),
    _OPT_LORA._replace(name=f"{_OWN}tiny-opt-lora-revision", revision="test"),
    _OPT_LORA._replace(name="ybelkada/test-st-lora"),
    _OPT_LORA._replace(name=f"{_OWN}tiny-random-OPTForCausalLM-extended-vocab", longer=True),
    _OPT_LORA._replace(name=f"{_OWN}opt-tokenizer-revision", revision="my-revision", longer=True),
    Adapter(
        f"{_OWN}tiny-random-BertModel-lora",
        "hf-internal-testing/tiny-random-BertModel",
        "ForCausalLM",
        "CAUSAL_LM",
        _LORA,
        revision="v1.2.3",
    ),
    Adapter(f"{_OWN}gpt2-lora-random", "gpt2", "ForCausalLM", "CAUSAL_LM", _LORA),
    Adapter(f"{_OWN}opt-125m-dummy-lora", f"{_OWN}opt-125m", "ForCausalLM", "CAUSAL_LM", _LORA),
]


# -- the hub's cache ----------------------------------------------------------------------------------------


def place(home: Path, name: str, revision: str = "main") -> Path:
    """The folder of a model's files in the cache, with what makes it found under its name and revision."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(f"{name} {revision}".encode()).hexdigest()
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit, encoding="utf-8")
    files = folder / "snapshots" / commit
    files.mkdir(parents=True, exist_ok=True)
    return files


def tokenizer() -> Any:
    """A tokenizer of bytes, which knows a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=512, **names)


def model_of(one: Tiny) -> Any:
    """A random model."""
    import transformers

    # The tests' inputs are of the words 1 and 2. A padding word is zeros, of which an adapter makes nothing where a
    # model adds no positions to them.
    numbers = {"bos_token_id": 0, "pad_token_id": 1 if one.kind in ("opt", "bart", "roberta") else 3, "eos_token_id": 2}
    numbers |= (
        {"decoder_start_token_id": 1} if one.auto in ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq") else {}
    )
    words = {} if one.kind == "resnet" else {"vocab_size": VOCABULARY, **numbers}
    config = transformers.AutoConfig.for_model(one.kind, **{**words, **one.config})
    return getattr(transformers, one.auto).from_config(config)


def write_models(home: Path) -> Iterator[str]:
    """Write the models, each once, and give their names; one that cannot be made is told."""
    import torch

    words = tokenizer()
    for one in MODELS:
        torch.manual_seed(len(one.revision))
        try:
            model = model_of(one)
        except Exception as error:  # another transformers may lack an architecture, or name it otherwise
            print(f"no stand-in for {one.names}: {error}", file=sys.stderr)
            continue
        for name in one.names:
            files = place(home, name, one.revision)
            model.save_pretrained(files)
            words.save_pretrained(files)
            if one.kind == "resnet":
                (files / "preprocessor_config.json").write_text(json.dumps(_IMAGES), encoding="utf-8")
            yield name


def write_adapters(home: Path) -> Iterator[str]:
    """Write the adapters, by PEFT."""
    import peft
    import transformers

    for one in ADAPTERS:
        base = getattr(transformers, f"AutoModel{one.auto}").from_pretrained(one.base)
        files = place(home, one.name, one.revision)
        if one.longer:
            words = tokenizer()
            words.add_tokens([f"word{number}" for number in range(VOCABULARY + 8 - len(words))])
            words.save_pretrained(files)
            base.resize_token_embeddings(len(words))
        model = peft.get_peft_model(base, peft.LoraConfig(task_type=one.task, **one.config))
        model.save_pretrained(str(files / one.folder))
        yield one.name


def write_pipelines(home: Path) -> Iterator[str]:
    """Write a pipeline of diffusers."""
    import torch
    import transformers

    diffusers: Any = importlib.import_module("diffusers")  # in the cache, not in every environment
    torch.manual_seed(0)
    sizes = {"block_out_channels": (32, 64), "sample_size": 32}
    unet = diffusers.UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        **sizes,
    )
    halves = {
        f"{way}_block_types": (f"{name}Block2D",) * 2 for way, name in (("down", "DownEncoder"), ("up", "UpDecoder"))
    }
    text = transformers.CLIPTextConfig(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=2, **_BERT)
    words = tokenizer()
    words.model_max_length = 77
    made = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(latent_channels=4, **halves, **sizes),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=words,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    name = "hf-internal-testing/tiny-sd-pipe"
    made.save_pretrained(place(home, name))
    yield name


STEPS: dict[str, Callable[[Path], Iterator[str]]] = {
    "models": write_models,
    "adapters": write_adapters,
    "pipelines": write_pipelines,
}

if __name__ == "__main__":
    for _ in STEPS[sys.argv[1]](Path(sys.argv[2])):
        pass
