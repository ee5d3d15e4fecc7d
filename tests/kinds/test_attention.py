"""torch's MultiheadAttention, alone and in torch's transformer layers, and layers whose parent reads their weight.

The reference is the plain module with weights that numpy has changed in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.func import functional_call

from kilotune import (
    BitfitConfig,
    BottleneckConfig,
    LoraConfig,
    MergeError,
    PeftModel,
    TargetError,
    UnsupportedError,
    VeraConfig,
    get_peft_model,
)
from tests.support.guards import adapters_act
from tests.support.models import Snapshot, bits, randomize

WIDTH, HEADS, RANK = 8, 2, 2


class Attended(nn.Module):
    """``attn`` with names."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, **options)
        for parameter in self.attn.parameters():
            nn.init.normal_(parameter, std=0.4)
        self.requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.attn(*args, **kwargs)


def encoder(layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    given = {"dim_feedforward": 12, "dropout": 0.0, "batch_first": True, **options}
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, **given)
    nested = given["batch_first"] and not given.get("norm_first", False)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested).requires_grad_(False)


def decoder() -> nn.TransformerDecoderLayer:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 12, dropout=0.0, batch_first=True)
    return layer.requires_grad_(False)


def double(value: Tensor) -> np.ndarray[Any, Any]:
    return value.detach().double().numpy()


def lora(target_modules: Any, **options: Any) -> LoraConfig:
    given = {"r": RANK, "lora_alpha": 4, "init_lora_weights": False, **options}
    return LoraConfig(target_modules=target_modules, **given)


def changed_by_numpy(model: PeftModel, plain: nn.Module) -> nn.Module:
    """``plain`` in float64 with W + (alpha / r) B A and the trained biases, for LoRA."""
    plain = plain.double()
    held = dict(plain.named_parameters())
    for name, slot in model.installed("default").slots().items():
        fused = f"{name}.in_proj_weight" in held
        own = {key: double(value) for key, value in slot.named_parameters()}
        if "lora_A" in own:
            weight = held[f"{name}.in_proj_weight" if fused else f"{name}.weight"]
            scale = 4 / own["lora_A"].shape[0]
            weight.copy_(
                torch.from_numpy(double(weight) + scale * np.einsum("or,ri->oi", own["lora_B"], own["lora_A"]))
            )
        if "bias" in own:
            held[f"{name}.bias"].copy_(torch.from_numpy(own["bias"]))
    return plain


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(), dtype=torch.float64)


# -- the module alone ------------------------------------------------------------------------------

Q, K = rand(5, 3, WIDTH), rand(7, 3, WIDTH).flip(0)
PADDING = torch.zeros(3, 7, dtype=torch.bool)
PADDING[1, 4:] = True
CAUSAL = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
# name -> (options of the module, positional inputs, keywords)
CALLS: dict[str, tuple[dict[str, Any], tuple[Tensor, ...], dict[str, Any]]] = {
    "self": ({}, (Q, Q, Q), {}),
    "cross": ({}, (Q, K, K), {}),
    "key and value differ": ({}, (Q, K, K.roll(1, 0)), {}),
    "no weights": ({}, (Q, Q, Q), {"need_weights": False}),
    "weights of each head": ({}, (Q, Q, Q), {"average_attn_weights": False}),
    "padding": ({}, (Q, K, K), {"key_padding_mask": PADDING}),
    "mask": ({}, (Q, Q, Q), {"attn_mask": CAUSAL}),
    "float mask": ({}, (Q, Q, Q), {"attn_mask": -2.0 * CAUSAL.double()}),
    "causal": ({}, (Q, Q, Q), {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    "unbatched": ({}, (Q[:, 0], K[:, 0], K[:, 0]), {}),
    "batch first": ({"batch_first": True}, (Q, Q, Q), {}),
    "no bias": ({"bias": False}, (Q, K, K), {}),
    "bias of keys": ({"add_bias_kv": True}, (Q, K, K), {}),
    "zero attention": ({"add_zero_attn": True}, (Q, K, K), {}),
    "odd heads": ({"batch_first": True}, (Q, Q, Q), {"key_padding_mask": torch.zeros(5, 3, dtype=torch.bool)}),
}
TARGETS: list[Any] = [["attn"], ["out_proj"], "all-linear"]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_every_way_to_call_it(call: str, target: Any) -> None:
    options, inputs, keywords = CALLS[call]
    model = get_peft_model(Attended(**options), lora(target)).double()
    reference = changed_by_numpy(model, Attended(**options)).train()
    wanted, weights = reference(*inputs, **keywords)
    base, _ = Attended(**options).double()(*inputs, **keywords)
    assert (wanted - base).abs().max() > 1e-2
    for training in (True, False):
        model.train(training)
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                y, given = model(*inputs, **keywords)
            torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)
            assert (given is None) == (weights is None)
            if weights is not None:
                torch.testing.assert_close(given, weights, rtol=0, atol=1e-12)
        with model.disable_adapter():
            torch.testing.assert_close(model(*inputs, **keywords)[0], base, rtol=0, atol=1e-12)
    as_keywords = dict(zip(("query", "key", "value"), inputs))
    torch.testing.assert_close(model(**as_keywords, **keywords)[0], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_torchs_fused_kernel_runs_with_the_adapters(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In eval, without gradients: the module hands its weights, and those of out_proj, to one function."""
    calls: list[int] = []
    kernel = torch._native_multi_head_attention

    def counted(*args: Any) -> Any:
        calls.append(1)
        return kernel(*args)

    monkeypatch.setattr(torch, "_native_multi_head_attention", counted)
    model = get_peft_model(Attended(batch_first=True), lora(target)).eval()
    reference = changed_by_numpy(model, Attended(batch_first=True)).train()
    x = rand(2, 5, WIDTH)
    with torch.no_grad():
        y = _self(model, x.float())
    assert calls
    torch.testing.assert_close(y.double(), _self(reference, x), rtol=0, atol=1e-5)


def _self(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = model(x, x, x)[0]
    return y


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_gradients_are_those_of_the_formula(target: Any) -> None:
    """Against torch's gradients of the plain module with W + s B A written out, for the factors and the input."""
    model = get_peft_model(Attended(), lora(target)).double()
    plain, x = Attended().double(), Q.clone().requires_grad_()
    model(x, x, x)[0].square().sum().backward()
    found = {name: p.grad for name, p in model.adapter_parameters()}
    factors = {name: p.detach().clone().requires_grad_() for name, p in model.adapter_parameters()}
    held, weights = dict(plain.named_parameters()), {}
    for layer, own in (("attn", "in_proj_weight"), ("attn.out_proj", "weight")):
        if f"{layer}.lora_A" in factors:
            change = 2.0 * factors[f"{layer}.lora_B"] @ factors[f"{layer}.lora_A"]
            weights[f"{layer}.{own}"] = held[f"{layer}.{own}"] + change
    again = Q.clone().requires_grad_()
    functional_call(plain, weights, (again, again, again))[0].square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-9, atol=1e-10)
    for name, factor in factors.items():
        torch.testing.assert_close(found[name], factor.grad, rtol=1e-9, atol=1e-10, msg=name)
        assert factor.grad.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype: torch.dtype) -> None:
    model = get_peft_model(Attended().to(dtype), lora(["attn"])).eval()
    randomize(model, scale=0.1)
    reference = changed_by_numpy(model, Attended().to(dtype))
    x = Q.to(dtype)
    y = _self(model, x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), _self(reference, x.double()), rtol=0, atol=0.1)
    y.float().square().sum().backward()
    for name, parameter in model.adapter_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


# -- what a target means ---------------------------------------------------------------------------


def names(model: PeftModel) -> list[str]:
    return list(model.adapted_layers())


def test_a_target_that_is_the_module_means_both_projections_as_in_peft() -> None:
    both = ["attn", "attn.out_proj"]
    assert names(get_peft_model(Attended(), lora(["attn"]))) == both
    assert names(get_peft_model(Attended(), lora(".*attn"))) == both
    assert names(get_peft_model(Attended(), lora("all-linear"))) == both
    assert names(get_peft_model(Attended(), lora(["attn", "out_proj"]))) == both
    assert names(get_peft_model(Attended(), lora(["out_proj"]))) == both[1:]
    assert names(get_peft_model(Attended(), lora(["attn"], exclude_modules=["out_proj"]))) == both[:1]
    whole = lora(["attn"], exclude_modules=["out_proj"], modules_to_save=["nothing"])
    with pytest.raises(TargetError, match="modules_to_save"):
        get_peft_model(Attended(), whole)
    assert names(get_peft_model(Attended(), BitfitConfig())) == both
    assert names(get_peft_model(Attended(), BottleneckConfig(width=2, target_modules=["attn"]))) == both[:1]


def test_counts() -> None:
    model = get_peft_model(Attended(), lora(["attn"]))
    assert model.report().trainable == RANK * (3 * WIDTH + WIDTH) + RANK * (WIDTH + WIDTH)
    assert sum(p.numel() for _, p in model.adapter_parameters()) == model.report().trainable


def test_patterns_are_held_against_the_module_as_in_peft() -> None:
    model = get_peft_model(Attended(), lora(["attn"], rank_pattern={"attn": 3}, alpha_pattern={"attn": 12}))
    assert [p.shape[0] for n, p in model.adapter_parameters() if n.endswith("lora_A")] == [3, 3]
    assert {slot.delta().scale for slot in model.installed("default").slots().values()} == {4.0}  # 12 / 3
    with pytest.raises(TargetError, match="'out_proj' fits no adapted layer"):
        get_peft_model(Attended(), lora(["attn"], rank_pattern={"out_proj": 3}))
    alone = get_peft_model(Attended(), lora(["out_proj"], rank_pattern={"out_proj": 3}))
    assert [p.shape[0] for n, p in alone.adapter_parameters() if n.endswith("lora_A")] == [3]


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_option_bias_trains_what_is_called_bias(bias: str) -> None:
    """PEFT leaves in_proj_bias alone, because its name does not end in '.bias'; BitFit trains it."""
    model = get_peft_model(Attended(), lora(["attn"], bias=bias)).double()
    trained = [name for name, _ in model.adapter_parameters()]
    assert [name for name in trained if name.endswith("bias")] == ["attn.out_proj.bias"]
    randomize(model)
    reference = changed_by_numpy(model, Attended())
    torch.testing.assert_close(_self(model, Q), _self(reference, Q), rtol=0, atol=1e-12)
    model.merge_adapter()
    torch.testing.assert_close(_self(model, Q), _self(reference, Q), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 5}], ids=str)
def test_bitfit_shifts_both_biases(options: dict[str, Any]) -> None:
    target = {"target_modules": ["attn"]} if options.get("bias") is False else {}
    model = get_peft_model(Attended(**options), BitfitConfig(**target)).double()
    randomize(model)
    inputs = (Q, rand(7, 3, options.get("kdim", WIDTH)), rand(7, 3, options.get("vdim", WIDTH)))
    plain = Attended(**options).double()
    shift = {name.rpartition(".")[0]: p.detach() for name, p in model.adapter_parameters()}
    assert set(shift) == {"attn", "attn.out_proj"}
    for own, layer in (("in_proj_bias", plain.attn), ("bias", plain.attn.out_proj)):
        change = shift["attn" if own == "in_proj_bias" else "attn.out_proj"]
        now = getattr(layer, own)
        layer.register_parameter(own, nn.Parameter(change if now is None else now + change, requires_grad=False))
    wanted = plain(*inputs)[0]
    torch.testing.assert_close(model(*inputs)[0], wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.merge_and_unload()(*inputs)[0], wanted, rtol=0, atol=1e-12)


def test_a_bias_for_the_first_projection_alone_runs_in_the_fused_kernel_and_is_not_merged() -> None:
    """torch's kernel, and so its module, takes biases for both projections or for none."""
    options = {"bias": False, "batch_first": True}
    model = get_peft_model(Attended(**options), BitfitConfig(target_modules=["attn"], exclude_modules=["out_proj"]))
    randomize(model)
    ((name, shift),) = model.adapter_parameters()
    assert name == "attn.bitfit_delta"
    plain = Attended(**options).train()
    plain.attn.in_proj_bias = nn.Parameter(shift.detach().clone())
    x = rand(2, 5, WIDTH).float()
    with torch.no_grad():
        torch.testing.assert_close(_self(model.eval(), x), _self(plain, x))
    with pytest.raises(MergeError, match="attn"):
        model.merge_adapter()


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [["attn"], ["out_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("config", [LoraConfig, VeraConfig])
def test_dropout_on_the_adapters_input_is_refused(config: type[Any], target: Any) -> None:
    base = Attended()
    before = Snapshot.of(base)
    option = "lora_dropout" if config is LoraConfig else "vera_dropout"
    with pytest.raises(UnsupportedError, match=f"{option}=0.1.*'attn.*no input of the adapter's own") as caught:
        get_peft_model(base, config(r=2, target_modules=target, **{option: 0.1}))
    assert "exclude_modules" in str(caught.value)
    assert Snapshot.of(base) == before


def test_separate_weights_are_refused_with_the_reason_and_out_proj_is_not() -> None:
    options = {"kdim": 6, "vdim": 5}
    with pytest.raises(TargetError, match="kdim or vdim is not embed_dim.*'out_proj' inside it can be adapted"):
        get_peft_model(Attended(**options), lora(["attn"]))
    model = get_peft_model(Attended(**options), lora(["out_proj"])).double()
    inputs = (Q, rand(7, 3, 6), rand(7, 3, 5))
    wanted = changed_by_numpy(model, Attended(**options))(*inputs)[0]
    torch.testing.assert_close(model(*inputs)[0], wanted, rtol=0, atol=1e-12)
    assert names(get_peft_model(Attended(**options), lora("all-linear"))) == ["attn.out_proj"]


def test_nothing_can_be_added_to_the_output_of_a_layer_that_is_never_called() -> None:
    with pytest.raises(TargetError, match="'attn.out_proj'.*multiplies by this layer's weight itself.*name 'attn'"):
        get_peft_model(Attended(), BottleneckConfig(width=2, target_modules=["out_proj"]))


# -- torch's transformer layers --------------------------------------------------------------------

MIXTURES: list[Any] = [
    ["self_attn"],
    ["out_proj"],
    ["linear1"],
    ["self_attn", "linear2"],
    ["linear1", "out_proj"],
    "all-linear",
    ["layers.1.self_attn"],
    ".*0.self_attn|.*1.linear1",
]
Z = rand(2, 4, WIDTH)
PADS = torch.tensor([[False] * 4, [False, False, True, True]])


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("targets", MIXTURES, ids=str)
def test_torchs_encoder_with_any_mixture_of_adapted_parts(targets: Any, bias: str) -> None:
    """The fast paths of layer and encoder skip wrappers; the reference is in training mode, which has none."""
    model = get_peft_model(encoder(), lora(targets, bias=bias)).double()
    randomize(model, scale=0.3)
    reference = changed_by_numpy(model, encoder()).train()
    base = encoder().double()(Z)
    wanted, padded = reference(Z), reference(Z, src_key_padding_mask=PADS)
    for training in (True, False):
        model.train(training)
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                torch.testing.assert_close(model(Z), wanted, rtol=0, atol=1e-11)
                y = model(Z, src_key_padding_mask=PADS)
            torch.testing.assert_close(y[~PADS], padded[~PADS], rtol=0, atol=1e-11)
    assert (wanted - base).abs().max() > 1e-2
    adapters_act(model, lambda: model(Z))
    with model.disable_adapter():
        torch.testing.assert_close(model(Z), base, rtol=0, atol=1e-11)
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    torch.testing.assert_close(merged(Z), wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_torchs_encoder_in_its_other_forms(norm_first: bool, activation: str) -> None:
    options = {"norm_first": norm_first, "activation": activation, "batch_first": False}
    model = get_peft_model(encoder(**options), lora("all-linear")).double().eval()
    reference = changed_by_numpy(model, encoder(**options)).train()
    mask = nn.Transformer.generate_square_subsequent_mask(2, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(Z, mask, is_causal=True), reference(Z, mask), rtol=0, atol=1e-11)


@pytest.mark.parametrize("targets", [["self_attn"], ["multihead_attn", "linear2"], "all-linear"], ids=str)
def test_torchs_decoder_layer(targets: Any) -> None:
    model = get_peft_model(decoder(), lora(targets)).double().eval()
    reference, memory = changed_by_numpy(model, decoder()).train(), rand(2, 6, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(model(Z, memory), reference(Z, memory), rtol=0, atol=1e-11)
    adapters_act(model, lambda: model(Z, memory))


def test_a_bottleneck_on_a_whole_encoder_layer_and_lora_inside_it() -> None:
    """Wrappers inside a wrapper: adding, switching, merging one of them, removing."""
    base = encoder()
    before = bits(base)
    model = get_peft_model(base, BottleneckConfig(width=3, activation="tanh", target_modules=["layers.0"]), "neck")
    model.add_adapter("lora", lora(["self_attn", "linear1"]))
    model.double()
    randomize(model, "neck")
    model.set_adapter(["neck", "lora"])
    model.eval()
    plain = encoder().double().train()
    held = dict(model.adapter_parameters("neck"))
    down, up = (double(held[f"layers.0.{key}"]) for key in ("down", "up"))
    b1, b2 = (double(held[f"layers.0.{key}"]) for key in ("down_bias", "up_bias"))
    weights = dict(plain.named_parameters())
    for name, slot in model.installed("lora").slots().items():
        own = {key: double(value) for key, value in slot.named_parameters()}
        weight = weights[f"{name}.in_proj_weight" if name.endswith("self_attn") else f"{name}.weight"]
        weight.copy_(torch.from_numpy(double(weight) + 2.0 * own["lora_B"] @ own["lora_A"]))
    h = double(plain.layers[0](Z))
    h = h + np.tanh(h @ down.T + b1) @ up.T + b2
    wanted = plain.layers[1](torch.from_numpy(h))
    with torch.no_grad():
        torch.testing.assert_close(model(Z), wanted, rtol=0, atol=1e-11)
    model.merge_adapter(["lora"])
    torch.testing.assert_close(model(Z), wanted, rtol=0, atol=1e-11)
    model.unmerge_adapter()
    torch.testing.assert_close(copy.deepcopy(model)(Z), wanted, rtol=0, atol=1e-11)
    model.delete_adapter("neck")
    assert "layers.0" not in model.adapted_layers()
    assert type(model.get_base_model().layers[0]) is nn.TransformerEncoderLayer
    model.delete_adapter("lora")
    assert model.adapted_layers() == {}
    assert bits(base.float()) == before


# -- through a life --------------------------------------------------------------------------------


def test_two_adapters_in_the_module_and_in_its_projection() -> None:
    base = Attended()
    before, kinds = bits(base), [type(m) for m in base.modules()]
    model = get_peft_model(base, lora(["attn"]), "both")
    model.add_adapter("out", lora(["out_proj"], r=3))
    model.set_adapter(["both", "out"])
    y = _self(model, Q.float())
    plain = Attended().double()
    held = dict(plain.named_parameters())
    for adapter in ("both", "out"):
        for layer, slot in model.installed(adapter).slots().items():
            a, b = (double(slot.get_parameter(key)) for key in ("lora_A", "lora_B"))
            weight = held[f"{layer}.in_proj_weight" if layer == "attn" else f"{layer}.weight"]
            weight.add_(torch.from_numpy(4 / len(a) * b @ a))
    torch.testing.assert_close(y.double(), _self(plain, Q), rtol=0, atol=1e-4)
    for name in ("out", "both"):
        model.set_adapter(name)
        assert (_self(model, Q.float()) - y).abs().max() > 1e-3
    model.set_adapter(["both", "out"])
    model.merge_adapter()
    torch.testing.assert_close(_self(model, Q.float()), y, rtol=0, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(_self(model, Q.float()), _self(Attended(), Q.float()), rtol=0, atol=1e-6)
    model.unmerge_adapter()
    model.delete_adapter("both")
    assert names(model) == ["attn.out_proj"]
    model.add_adapter("again", lora(["attn"], r=1))
    assert names(model) == ["attn", "attn.out_proj"]
    model.delete_adapter("out")
    plain = model.unload()
    assert bits(plain) == before
    assert [type(m) for m in plain.modules()] == kinds


FILES: dict[str, LoraConfig | VeraConfig] = {
    "module": lora(["self_attn"]),
    "both names": lora(["self_attn", "out_proj"]),
    "projection": lora(["out_proj", "linear1"]),
    "all": lora("all-linear", bias="all"),
    "without": lora(["self_attn"], exclude_modules=["out_proj"]),
    "patterns": lora(["self_attn"], rank_pattern={"0.self_attn": 3}, alpha_pattern={"self_attn": 1}),
    "vera": VeraConfig(r=3, target_modules=["self_attn"], init_weights=False),
    "vera without": VeraConfig(r=3, target_modules=["self_attn"], exclude_modules=["out_proj"], generator="peft"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_there_and_back(case: str, tmp_path: Path) -> None:
    model = get_peft_model(encoder(), FILES[case])
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(encoder(), tmp_path)
    assert names(loaded) == names(model)
    with torch.no_grad():
        assert torch.equal(loaded(Z.float()), model.eval()(Z.float()))
    loaded.save_pretrained(tmp_path / "again")
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_it_compiles() -> None:
    model = get_peft_model(encoder(1), lora(["self_attn"]))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = Z.float()
    torch.testing.assert_close(compiled(x), model(x))


# -- other layers whose parent reads their weight --------------------------------------------------


def mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "intermediate_size": 32, "time_step_rank": 2}
    return MambaForCausalLM(
        MambaConfig(vocab_size=40, pad_token_id=0, bos_token_id=1, eos_token_id=None, **sizes)
    ).eval()


def mamba2() -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "expand": 2, "head_dim": 8, "num_heads": 4}
    more = {"n_groups": 1, "chunk_size": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=40, **sizes, **more)).eval()


@pytest.mark.parametrize("targets", [["out_proj"], ["conv1d"], ["in_proj", "out_proj", "conv1d"]], ids=str)
@pytest.mark.parametrize("make", [mamba, mamba2])
def test_mamba_hands_the_weights_of_its_layers_to_kernels(make: Callable[[], Any], targets: list[str]) -> None:
    """The prompt goes through one kernel and each new token through another: both against the merged model."""
    ids = torch.arange(12).reshape(2, 6) * 5 % 37 + 2
    model = get_peft_model(make(), lora(targets))
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    y = model(input_ids=ids).logits
    assert (y - make()(input_ids=ids).logits).abs().max() > 1e-2
    y.square().sum().backward()
    for name, parameter in model.adapter_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    adapters_act(model, lambda: model(input_ids=ids).logits)
    tokens = model.eval().generate(input_ids=ids, **options)
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(input_ids=ids).logits, y, rtol=1e-4, atol=1e-4)
    merged = plain.generate(input_ids=ids, **options)
    assert torch.equal(tokens.sequences, merged.sequences)
    for one, two in zip(tokens.logits, merged.logits, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_an_adapter_acts_where_fsdp_puts_plain_tensors_in_the_place_of_parameters() -> None:
    """FSDP1 with ``use_orig_params``: within a forward the module's parameters are attributes of the same names."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["attn"], init_lora_weights=False)
    model = get_peft_model(Attended(), config).eval()
    x = torch.randn(3, 2, WIDTH)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch.no_grad():
            before = model(x, x, x)[0]
            with model.disable_adapter():
                plain = model(x, x, x)[0]
            assert not torch.allclose(before, plain)
            sharded = FullyShardedDataParallel(
                model,
                use_orig_params=True,
                device_id=torch.device("cpu"),
                sharding_strategy=ShardingStrategy.NO_SHARD,
            )
            assert torch.equal(sharded(x, x, x)[0], before)
    finally:
        dist.destroy_process_group()
