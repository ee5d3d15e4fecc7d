"""PEFT beside kilotune: tiny base models, the same adapter in both, and the checks that compare them.

Everything that compares raises AssertionError through :func:`assert_close` or :func:`assert_same`, so the same
checks are run a second time on planted faults (``test_planted.py``).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
)

import kilotune

# What PEFT 0.21 and what it calls warn of, and why that is nothing to these tests.
PEFT_WARNINGS = {
    # transformers' property, which PEFT reads for every model
    "`is_gradient_checkpointing` is deprecated": FutureWarning,
    # GPT-2: PEFT notices by itself that Conv1D stores (in, out), and says so once per model
    "fan_in_fan_out is set to False but the target module is `Conv1D`": UserWarning,
    # a Conv1D model's file loaded into PEFT together with nn.Linear targets
    "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`": UserWarning,
    # its notices that a seed-only VeRA file relies on torch's generator: that is what is tested
    "Specified to not save vera_A and vera_B within the state dictionary": UserWarning,
    "Specified to not load vera_A and vera_B from state dictionary": UserWarning,
    # the same of TinyLoRA's tables
    "Specified to not save projection tensors P within the state dictionary": UserWarning,
    "Specified to not load tinylora_P from state dictionary": UserWarning,
    # merging the bias is not undone by PEFT; our tests of bias modes know
    "Careful, disabling adapter layers with bias configured": UserWarning,
    # it writes the base's own embedding beside an adapter on "embed_tokens"; ours does not, see docs/peft.md
    "Setting `save_embedding_layers` to `True` as embedding layers found": UserWarning,
    # merging one tied layer in place changes the other too; ours does not, see docs/peft.md
    "Model with `tie_word_embeddings=True`": UserWarning,
    "Model has `tie_word_embeddings=True`": UserWarning,
}


@contextmanager
def quiet() -> Iterator[None]:
    """Only the warnings of ``PEFT_WARNINGS`` are silenced, and only around calls of PEFT."""
    with warnings.catch_warnings():
        for message, category in PEFT_WARNINGS.items():
            warnings.filterwarnings("ignore", message=f"(?s).*{re.escape(message)}", category=category)
        yield


# -- base models -----------------------------------------------------------------------------------

IDS = torch.arange(12).reshape(2, 6) * 5 % 37 + 2
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 32}


class Mlp(nn.Module):
    """Nested, with and without bias, a norm, and layers of four shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(20), nn.Linear(20, 28, bias=False), nn.Tanh(), nn.Linear(28, 20))
            for _ in range(3)
        )
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


class Fed(nn.Module):
    """A model that brings its own input."""

    def example(self, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError


def _bert(cls: type[nn.Module]) -> nn.Module:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return cls(BertConfig(**SIZES, num_attention_heads=2, intermediate_size=24, num_labels=3, **still))


def _llama(cls: type[nn.Module]) -> nn.Module:
    config = LlamaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24, num_labels=3, pad_token_id=0
    )
    return cls(config)


def _opt() -> nn.Module:
    sizes = {"ffn_dim": 24, "word_embed_proj_dim": 16, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(**SIZES, **sizes, dropout=0.0, attention_dropout=0.0))


def _gpt2() -> nn.Module:
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1, **still
        )
    )


BASES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: _llama(LlamaForCausalLM),
    "opt": _opt,
    "gpt2": _gpt2,
    "bert": lambda: _bert(BertForSequenceClassification),
    "mlp": Mlp,
}
HEADED: dict[str, Callable[[], nn.Module]] = {
    "bert-mlm": lambda: _bert(BertForMaskedLM),
    "bert-tokens": lambda: _bert(BertForTokenClassification),
    "bert-qa": lambda: _bert(BertForQuestionAnswering),
    "llama-cls": lambda: _llama(LlamaForSequenceClassification),
}

# Bases of single test files, with layers of other kinds.
LAYERED: dict[str, Callable[[], nn.Module]] = {}


def base(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same tiny model at each call: random weights, and biases that are not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20231017)
        model = {**BASES, **HEADED, **LAYERED}[name]()
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.to(dtype).eval()


def run(model: nn.Module) -> Tensor:
    """The model's logits on the fixed input."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(inner, Fed):
        return model(inner.example(next(inner.parameters()).dtype))
    if isinstance(inner, Mlp):
        x = torch.sin(torch.arange(7 * 12, dtype=torch.float32)).reshape(7, 12)
        return model(x.to(next(inner.parameters()).dtype))
    output = model(input_ids=IDS)
    return output.start_logits if "start_logits" in output else output.logits


def loss_of(model: nn.Module) -> Tensor:
    """Cross entropy against fixed classes."""
    logits = run(model).float()
    flat = logits.reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, torch.arange(flat.shape[0]) * 7 % flat.shape[1])


# -- the same adapter in both ----------------------------------------------------------------------


@dataclass
class Twins:
    """One adapter in kilotune's model and in PEFT's, over equal bases, with equal numbers in it."""

    ours: kilotune.PeftModel
    theirs: peft.PeftModel


METHODS = {"vera": (kilotune.VeraConfig, peft.VeraConfig), "lora": (kilotune.LoraConfig, peft.LoraConfig)}


def twins(name: str, method: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Twins:
    """Both models, the adapter's numbers set to equal random values (nothing is left at zero)."""
    ours_cls, theirs_cls = METHODS[method]
    extra = {"generator": "peft"} if method == "vera" else {}
    ours = kilotune.get_peft_model(base(name, dtype), ours_cls(**options, **extra))
    with quiet():
        theirs = peft.get_peft_model(base(name, dtype), theirs_cls(**options))
    theirs.eval()
    made = Twins(ours, theirs)
    scramble(made)
    return made


def scramble(both: Twins, adapter: str = "default") -> None:
    """Give every trained tensor a new value, the same on both sides; a bias moves a little from the base's."""
    generator = torch.Generator().manual_seed(7)
    mine, other = dict(both.ours.adapter_parameters(adapter)), peft_parameters(both.theirs, adapter)
    assert_same(sorted(mine), sorted(other), "names of the trained tensors")
    with torch.no_grad():
        for key in sorted(mine):
            noise = (torch.randn(mine[key].shape, generator=generator) * 0.2).reshape(other[key].shape)
            value = noise if ".lora_" in key or ".vera_" in key else other[key].float() + 0.1 * noise
            other[key].copy_(value)
            mine[key].copy_(other[key].reshape(mine[key].shape))  # PEFT's factors of a convolution have four axes


INSIDE = ".base_layer.out_proj"  # of torch's MultiheadAttention, which PEFT wraps with a wrapper inside


def peft_parameters(model: peft.PeftModel, adapter: str = "default") -> dict[str, nn.Parameter]:
    """PEFT's trained tensors under our names: ``<layer>.<parameter>``, each memory location once."""
    found: dict[str, nn.Parameter] = {}
    saved: list[str] = []
    for path, module in model.named_modules():
        name = path.removeprefix("base_model.model.").replace(INSIDE, ".out_proj")
        if isinstance(module, BaseTunerLayer):
            for key in module.adapter_layer_names:
                held = getattr(module, key, {})
                if adapter in held:
                    ours = key.replace("lora_embedding_", "lora_")
                    found[f"{name}.{ours}"] = getattr(held[adapter], "weight", held[adapter])
        elif isinstance(module, ModulesToSaveWrapper):
            saved.append(name)
            copy = module.modules_to_save[adapter]
            found.update({f"{name}.{key}": p for key, p in copy.named_parameters()})
    places: dict[int, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if key.endswith(".bias") and parameter.requires_grad:
            place = key.replace(".base_layer.bias", ".bias").replace(INSIDE, ".out_proj")
            place = place.removeprefix("base_model.model.")
            places.setdefault(id(parameter), []).append(place)
    biases = {id(p): p for p in model.parameters()}
    for key, names in places.items():
        name = max(names, key=lambda n: n.count("."))  # of a tied bias: where the layer is that uses it
        if not any(name.startswith(f"{s}.") for s in saved):
            found[name] = biases[key]
    return found


# -- checks ----------------------------------------------------------------------------------------


def assert_same(actual: object, expected: object, what: str) -> None:
    """Plain equality."""
    if actual != expected:
        raise AssertionError(f"{what}: expected {expected!r}, got {actual!r}")


def assert_close(actual: Tensor, expected: Tensor, what: str, relative: float = 1e-5) -> None:
    """Equal within ``relative`` of the largest expected value; shapes equal, and something there to compare."""
    assert_same(tuple(actual.shape), tuple(expected.shape), f"{what}: shape")
    scale = float(expected.detach().float().abs().max())
    error = float((actual.detach().double() - expected.detach().double()).abs().max())
    if not (scale > 0 and error <= relative * scale):
        raise AssertionError(f"{what}: error {error:.3g} with values up to {scale:.3g}, allowed {relative:g} of them")


def assert_all_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str, relative: float = 1e-5
) -> None:
    """:func:`assert_close` for each tensor by name; tensors that are zero on PEFT's side are zero on ours."""
    assert_same(sorted(actual), sorted(expected), f"{what}: names")
    largest = max(float(v.detach().float().abs().max()) for v in expected.values())
    for key, value in expected.items():
        if float(value.detach().float().abs().max()) <= 1e-6 * largest:  # rounding noise around zero
            error = float(actual[key].detach().float().abs().max())
            assert error <= 1e-5 * largest, f"{what} of {key}: expected about 0, got {error:.3g}"
        else:
            assert_close(actual[key], value, f"{what} of {key}", relative)


def check_adapter_acts(both: Twins) -> None:
    """The adapter changes the output at all: otherwise equality shows nothing."""
    with torch.no_grad(), both.ours.disable_adapter():
        plain = run(both.ours)
    with torch.no_grad():
        changed = run(both.ours)
    move = float((changed - plain).abs().max() / plain.abs().max())
    assert move > 1e-3, f"the adapter moves the output by {move:.2g} only"


def check_forward(both: Twins, relative: float = 1e-5) -> None:
    """Equal outputs, and an adapter that acts."""
    check_adapter_acts(both)
    with torch.no_grad():
        assert_close(run(both.ours), run(both.theirs), "output", relative)


def check_gradients(both: Twins, relative: float = 1e-4) -> None:
    """Equal gradients of every trained tensor, and none anywhere else."""
    for model in (both.ours, both.theirs):
        model.zero_grad(set_to_none=True)
        loss_of(model).backward()
    mine, other = dict(both.ours.adapter_parameters()), peft_parameters(both.theirs)
    missing = [key for key, p in mine.items() if p.grad is None]
    assert_same(missing, [], "trained tensors without a gradient")
    own = {id(p) for p in mine.values()}
    stray = [key for key, p in both.ours.named_parameters() if p.grad is not None and id(p) not in own]
    assert_same(stray, [], "frozen tensors with a gradient")
    gradients = [{key: p.grad for key, p in side.items()} for side in (mine, other)]
    assert_all_close(gradients[0], _shaped(gradients[1], mine), "gradient", relative)  # type: ignore[arg-type]


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    # Some gradients are zero but for rounding (the bias of attention keys); Adam divides by their own size, so
    # eps stands well above rounding noise and well below real gradients.
    "adamw": lambda p: torch.optim.AdamW(p, lr=5e-3, weight_decay=0.1, eps=1e-4),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
}


def train(model: nn.Module, optimizer: str, steps: int) -> list[float]:
    """The losses before each step, and after the last."""
    chosen = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    losses = []
    for _ in range(steps):
        chosen.zero_grad(set_to_none=True)
        loss = loss_of(model)
        loss.backward()
        chosen.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        losses.append(float(loss_of(model)))
    return losses


def check_training(both: Twins, optimizer: str, steps: int = 3, relative: float = 1e-4) -> None:
    """Three steps: one curve, which moves, and equal tensors at its end."""
    mine, other = train(both.ours, optimizer, steps), train(both.theirs, optimizer, steps)
    assert abs(mine[0] - mine[-1]) > 1e-3, f"the loss does not move: {mine}"
    assert_close(torch.tensor(mine), torch.tensor(other), "losses", 1e-5)
    values = dict(both.ours.adapter_parameters())
    others = _shaped(peft_parameters(both.theirs), values)
    assert_all_close(values, others, f"value after {steps} steps", relative)


def _shaped(theirs: Mapping[str, Any], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's tensors in our shapes; the names have been compared."""
    return {key: value.reshape(ours[key].shape) for key, value in theirs.items()}


def check_merge(both: Twins, relative: float = 1e-5) -> None:
    """Merged in place: equal weights and outputs; unmerged: the very bits of the base. Then merged for good."""
    before = {key: value.clone() for key, value in weights_of(both.ours).items()}
    with torch.no_grad():
        unmerged = run(both.ours)
        both.ours.merge_adapter()
        with quiet():
            both.theirs.merge_adapter()
        assert_all_close(weights_of(both.ours), weights_of(both.theirs), "merged weight", relative)
        assert_close(run(both.ours), unmerged, "merged output", relative)
        both.ours.unmerge_adapter()
        with quiet():
            both.theirs.unmerge_adapter()
    after = weights_of(both.ours)
    changed = [key for key, value in before.items() if not torch.equal(value, after[key])]
    assert_same(changed, [], "weights whose bits changed by merging and unmerging")
    with quiet():
        plain, expected = both.ours.merge_and_unload(), both.theirs.merge_and_unload()
    assert_same(sorted(plain.state_dict()), sorted(expected.state_dict()), "keys of the merged model")
    with torch.no_grad():
        assert_close(run(plain), unmerged, "output merged for good", relative)
        assert_close(run(plain), run(expected), "output merged for good, against PEFT", relative)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights of all adapted linear layers, as stored."""
    if isinstance(model, peft.PeftModel):
        return {
            name.removeprefix("base_model.model."): module.get_base_layer().weight.detach()
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer)
        }
    assert isinstance(model, kilotune.PeftModel)
    layers = model.adapted_layers().items()
    return {name: layer.base_layer.weight.detach() for name, layer in layers if layer.slot("default").own()}
