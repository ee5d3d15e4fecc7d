"""Hold GGUF LoRA files against llama.cpp: its converter's tensors, and the probabilities of its runtime.

    python scripts/gguf_against_llama_cpp.py LLAMA_CPP

``LLAMA_CPP`` is a folder with llama.cpp's sources, for its converters. Needed beside kilotune[train,export]: the
packages xllamacpp, which is llama.cpp's runtime, and sentencepiece, which its converters import. Each architecture is a
tiny model with random weights. Printed for each of them: whether all tensors equal those of convert_lora_to_gguf.py,
and the largest difference of the next token's log-probabilities between llama.cpp and transformers, for the base alone
and with the adapter; beside it what the adapter changes. Tested with llama.cpp of August to October 2026.
"""

from __future__ import annotations

import argparse
import importlib
import json
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kilotune import LoraConfig, get_peft_model
from kilotune.train.finished.gguf_lora import FAMILIES, gguf_lora, write_gguf

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
SPECIAL = ["<s>", "</s>"]
PROMPT = "The table says what a method does"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("kinds", nargs="*", default=list(FAMILIES), help="model types; default: all")
    chosen = parser.parse_args()
    print(f"{'model type':14} {'tensors':8} {'base alone':>11} {'with it':>11} {'it changes':>11}")
    for kind in chosen.kinds:
        with tempfile.TemporaryDirectory() as name:
            print(row(kind, Path(name), chosen.llama_cpp), flush=True)


def row(kind: str, folder: Path, llama_cpp: Path) -> str:
    """One line of the table."""
    tokenizer = make_tokenizer()
    model = make_model(kind, len(tokenizer))
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    ids = tokenizer(PROMPT)["input_ids"]
    words = {token for text, token in tokenizer.get_vocab().items() if text.isascii() and text not in SPECIAL}
    plain = log_probabilities(model, ids)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    with torch.no_grad():  # in place of training
        for _, parameter in adapted.adapter_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(folder / "lora")
    write_gguf(gguf_lora(adapted), folder / "ours.gguf")
    changed = log_probabilities(adapted, ids)
    convert(llama_cpp, "convert_hf_to_gguf.py", folder / "base", "--outfile", folder / "base.gguf", "--outtype", "f32")
    options = ("--base", folder / "base", "--outfile", folder / "theirs.gguf", "--outtype", "f32")
    convert(llama_cpp, "convert_lora_to_gguf.py", folder / "lora", *options)
    same = "equal" if equal(folder / "ours.gguf", folder / "theirs.gguf") else "differ"
    alone = difference(folder / "base.gguf", None, ids, plain, words)
    with_it = difference(folder / "base.gguf", folder / "ours.gguf", ids, changed, words)
    return f"{kind:14} {same:8} {alone:11.1e} {with_it:11.1e} {float((plain - changed).abs().max()):11.1e}"


def make_tokenizer() -> Any:
    """A tokenizer of bytes, with some words of this file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([__doc__], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=SPECIAL[0], eos_token=SPECIAL[1])


def make_model(kind: str, vocabulary: int) -> Any:
    """A tiny model with weights that are large enough to matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(GPT if kind in ("gpt2", "gpt_bigcode") else SIZES)
    if kind == "gpt_neox":
        del sizes["num_key_value_heads"]
    more: dict[str, Any] = {"head_dim": 8} if kind.startswith(("gemma", "qwen3")) else {}
    more |= {"query_pre_attn_scalar": 8} if kind.startswith(("gemma2", "gemma3")) else {}  # llama.cpp goes by head_dim
    more |= {"sliding_window": None} if kind == "mistral" else {}
    more |= {"original_max_position_embeddings": 128} if kind == "phi3" else {}
    tokens = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **tokens, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def log_probabilities(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Of the token after each of ``ids``, (tokens, vocabulary)."""
    scores: torch.Tensor = model(torch.tensor([list(ids)])).logits[0]
    return scores.log_softmax(-1)


def convert(llama_cpp: Path, script: str, *words: object) -> None:
    """Run one of llama.cpp's converters in a process of its own, on a tokenizer that it has no name for."""
    code = f"import sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
    code += f"import {Path(__file__).stem} as here; here.run_converter()"
    done = subprocess.run(
        [sys.executable, "-c", code, "-", str(llama_cpp / script), *map(str, words)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{script}: {done.stderr[-2000:]}")


def run_converter() -> None:
    """In the converter's process: what it looks up by the tokenizer's hash is said, then the script is run."""
    import transformers

    script = Path(sys.argv[1])
    sys.path[:0] = [str(script.parent / "gguf-py"), str(script.parent)]
    base: Any = importlib.import_module("conversion.base")
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    base.TextModel._set_vocab_sentencepiece = lambda self, *a, **k: self._set_vocab_gpt2()
    fast: Any = transformers.PreTrainedTokenizerFast
    auto: Any = transformers.AutoTokenizer
    auto.from_pretrained = lambda folder, **_: fast.from_pretrained(folder)
    load = base.ModelBase.load_hparams
    # Names of two settings that the converters read and transformers writes otherwise today.
    renamed = {"rotary_pct": 0.25, "n_ctx": 128}
    base.ModelBase.load_hparams = staticmethod(lambda *a, **k: {**load(*a, **k), **renamed})
    sys.argv = [str(script), *sys.argv[2:]]
    folder = Path(sys.argv[1])
    if (folder / "tokenizer_config.json").is_file():  # Phi-3's converter goes by this name
        values = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**values, "tokenizer_class": "GPT2Tokenizer"}))
    runpy.run_path(str(script), run_name="__main__")


def equal(one: Path, other: Path) -> bool:
    """Whether two GGUF files hold the same tensors, bit for bit."""
    gguf: Any = importlib.import_module("gguf")
    held = [{t.name: t.data for t in gguf.GGUFReader(path).tensors} for path in (one, other)]
    return held[0].keys() == held[1].keys() and all(np.array_equal(held[0][key], held[1][key]) for key in held[0])


def difference(base: Path, lora: Path | None, ids: Sequence[int], want: torch.Tensor, words: Set[int]) -> float:
    """The largest difference of llama.cpp's log-probabilities of the next token from ``want`` (tokens, vocabulary).

    After as much of the prompt as leaves one of ``words`` as the likeliest token: its server tells nothing of the end
    of a text, or of half a character.
    """
    count = next(n for n in range(len(ids), 0, -1) if int(want[n - 1].argmax()) in words)
    given, expected = list(ids[:count]), want[count - 1]
    command = ["--ask", str(base), str(lora or ""), json.dumps(given), str(len(expected))]
    done = subprocess.run([sys.executable, __file__, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llama.cpp: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return float(max(abs(value - float(expected[int(token)])) for token, value in found.items()))


def ask(base: str, lora: str, ids: str, count: str) -> None:
    """In a process of its own, for llama.cpp writes what it likes: print {token: log-probability}."""
    x: Any = importlib.import_module("xllamacpp")
    params = x.CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers, params.n_parallel = base, 128, 0, 1
    params.cpuparams.n_threads, params.warmup, params.verbosity, params.fit_params = 1, False, -1, False
    params.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = x.ggml_type.GGML_TYPE_F32
    if lora:
        params.lora_adapters = [x.CommonAdapterLoraInfo(lora, 1.0)]
    asked = {"prompt": json.loads(ids), "n_predict": 1, "n_probs": int(count), "temperature": 0.0}
    found = x.Server(params).handle_completions(asked)
    top = found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    print(json.dumps({str(entry["id"]): entry["logprob"] for entry in top}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ask"]:
        ask(*sys.argv[2:])
    else:
        main()
