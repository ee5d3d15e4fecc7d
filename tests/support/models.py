"""Small models, and what tests ask about a model: its bits, its modules, whether anything changed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kilotune.model.adapter_model import AdapterModel


def mlp(bias: bool = True, seed: int = 0) -> nn.Sequential:
    """6 -> 5 -> 3 (modules ``0`` and ``2``)."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias))


class Block(nn.Module):
    """``x + down(tanh(up(norm(x))))``, modules norm, mix.up, mix.down."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.ModuleDict({"up": nn.Linear(width, inner), "down": nn.Linear(inner, width, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix["down"](torch.tanh(self.mix["up"](self.norm(x))))


class Nested(nn.Module):
    """stem 6 -> 8, ``blocks.0 ... blocks.n-1``, head 8 -> 3: nested modules, norms, some without bias."""

    def __init__(self, blocks: int = 2, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList([Block(8, 12) for _ in range(blocks)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def greet(self, name: str = "you") -> str:
        """A method of the base, for tests of the passthrough."""
        return f"hello {name} from {type(self).__name__}"


def tiny_llama(tie: bool = False, seed: int = 0, layers: int = 2) -> Any:
    """A random Llama of 2 blocks, width 16, vocabulary 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2(tie: bool = True, seed: int = 0) -> Any:
    """A random GPT-2 of 2 blocks, width 16, vocabulary 32; its layers are Conv1D."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def tiny_classifier(seed: int = 0) -> Any:
    """A random BERT with a classification head of 3 classes."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def randomize(model: AdapterModel, adapter: str | None = None, seed: int = 1, scale: float = 0.5) -> None:
    """Give the trained tensors of one adapter (or the active ones) random values, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters(adapter):
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def bits(module: nn.Module) -> dict[str, bytes]:
    """The bytes of everything in the state dict."""
    return {key: value_bits(value) for key, value in module.state_dict().items()}


def is_base(key: str) -> bool:
    """Whether a state-dict key of a model with adapters is of the base."""
    return key.startswith("model.") and ".adapters." not in key and ".modules_to_save." not in key


def plain_name(key: str) -> str:
    """A state-dict key of a model with adapters as it stands in the base model."""
    return key.removeprefix("model.").replace("base_layer.", "").replace("original_module.", "")


def base_bits(model: AdapterModel) -> dict[str, bytes]:
    """The bytes of all base weights, by their names in the base model."""
    return {plain_name(key): value_bits(value) for key, value in model.state_dict().items() if is_base(key)}


def value_bits(value: Tensor) -> bytes:
    """The bytes of one tensor, with its dtype and shape."""
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{value.dtype}{tuple(value.shape)}".encode() + raw


def places(module: nn.Module) -> dict[str, int]:
    """Where each parameter lies in memory."""
    return {name: p.data_ptr() for name, p in module.named_parameters(remove_duplicate=False)}


@dataclass(frozen=True)
class Snapshot:
    """All that a refused call must leave alone."""

    modules: dict[str, int]
    bits: dict[str, bytes]
    trainable: dict[str, bool]
    training: dict[str, bool]
    active: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        return cls(
            {name: id(m) for name, m in model.named_modules(remove_duplicate=False)},
            bits(model),
            {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)},
            {name: m.training for name, m in model.named_modules(remove_duplicate=False)},
            tuple(model.active_adapters) if isinstance(model, AdapterModel) else (),
        )


def disk(folder: Path) -> dict[str, bytes | None]:
    """Every file below ``folder`` with its bytes, every folder with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of what gets gradients."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def untie(folder: Path) -> None:
    """Take the config's checksum out of an adapter's weights: as others write them, any config may stand beside."""
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        return
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    metadata.pop("kilotune_config_sha256", None)
    save_file(load_file(path), path, metadata=metadata)


@contextmanager
def freed_at_once() -> Iterator[list[weakref.ref[Any]]]:
    """Hold that what is put into the list is gone when the context is left, without the garbage collector."""
    watched: list[weakref.ref[Any]] = []
    gc.disable()
    try:
        yield watched
        left = [type(found).__name__ for seen in watched if (found := seen()) is not None]
        assert watched
        assert left == []
    finally:
        gc.enable()


def watch(model: nn.Module) -> list[weakref.ref[Any]]:
    """All modules and tensors of a model, for :func:`freed_at_once`."""
    return [weakref.ref(found) for found in (*model.modules(), *model.parameters(), *model.buffers())]
