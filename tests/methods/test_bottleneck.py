"""Bottleneck adapters: on layers, on blocks, and where the papers put them in known architectures.

The formula itself is held against numpy in the conformance tests; here are the places, the blocks, and what is refused.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kilotune import (
    BottleneckConfig,
    ConfigError,
    LoraConfig,
    MergeError,
    PeftModel,
    TargetError,
    UnsupportedError,
    VeraConfig,
    get_config,
    get_peft_model,
)
from kilotune.methods.bottleneck import _BLOCKS, ACTIVATIONS
from tests.conformance.references.bottleneck import FUNCTIONS, bottleneck
from tests.support.guards import adapters_act
from tests.support.models import Snapshot, bits, randomize

# -- where the papers put them ---------------------------------------------------------------------

_S: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_G: dict[str, Any] = {**_S, "num_key_value_heads": 2, "head_dim": 8}
_N: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}
_D: dict[str, Any] = {"d_model": 16, "vocab_size": 40}
_T5: dict[str, Any] = {**_D, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}


def _alike(sizes: dict[str, Any], *names: str) -> dict[str, dict[str, Any]]:
    return dict.fromkeys(names, sizes)


SIZES: dict[str, dict[str, Any]] = {
    **_alike(_G, "llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text"),
    **_alike(_S, "bert", "deberta-v2", "gpt_neox", "phi", "phi3", "olmo2", "granite"),
    **{name: {**_S, "max_position_embeddings": 40} for name in ("roberta", "xlm-roberta")},
    **{name: {**_S, "num_key_value_heads": 2} for name in ("qwen2", "stablelm")},
    "t5": _T5,
    "mt5": _T5,
    "electra": {**_S, "embedding_size": 16},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": 40},
    "gpt2": _N,
    "gptj": {**_N, "rotary_dim": 4},
    "gpt_neo": {**_S, "num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]},
    "opt": {**_S, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40},
    "falcon": {**_S},
    "mpt": {**_D, "n_layers": 2, "n_heads": 2},
    "bart": {
        **_D,
        **{
            f"{side}_{key}": value
            for side in ("encoder", "decoder")
            for key, value in {"layers": 2, "attention_heads": 2, "ffn_dim": 24}.items()
        },
    },
    "vit": {**{key: _S[key] for key in list(_S)[:4]}, "image_size": 8, "patch_size": 4},
}
TWICE = {"t5", "mt5", "bart"}  # an encoder and a decoder, which attends to the encoder as well


def tiny(model_type: str) -> Any:
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **SIZES[model_type]), attn_implementation="eager")
    for module in model.modules():  # no dropout in training mode: one run is to be like the next
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (name == "p" or "drop" in name):
                setattr(module, name, 0.0)
    return model.eval()


def fed(model_type: str) -> dict[str, Tensor]:
    if model_type == "vit":
        return {"pixel_values": torch.sin(torch.arange(2.0 * 3 * 8 * 8)).reshape(2, 3, 8, 8)}
    ids = torch.arange(10).reshape(2, 5) * 7 % 37 + 3
    return {"input_ids": ids, "decoder_input_ids": ids[:, :4] + 1} if model_type in TWICE else {"input_ids": ids}


def test_every_listed_architecture_is_tried() -> None:
    assert set(SIZES) == set(_BLOCKS)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("model_type", sorted(_BLOCKS))
def test_the_places_of_every_listed_architecture(model_type: str, placement: str) -> None:
    """The start is the base's very bits; then each adapter, moved alone, moves the output."""
    inputs, config = fed(model_type), get_config(placement, width=3, activation="tanh")
    if placement == "parallel" and _BLOCKS[model_type][2] is None:
        with pytest.raises(ConfigError, match="no module is the feed-forward alone"):
            get_peft_model(tiny(model_type), config)
        return
    model = get_peft_model(tiny(model_type), config)
    with torch.no_grad():
        wanted = tiny(model_type)(**inputs)[0]
        assert torch.equal(model(**inputs)[0], wanted)
    blocks = 4 if model_type in TWICE else 2
    attentions = 6 if model_type in TWICE else 2
    assert len(model.adapted_layers()) == blocks + (attentions if placement == "houlsby" else 0)
    d, m = 16, 3
    assert model.report().trainable == len(model.adapted_layers()) * (2 * m * d + d + m)
    randomize(model, scale=0.2)
    adapters_act(model, lambda: model(**inputs)[0])
    model(**inputs)[0].square().sum().backward()
    for name, parameter in model.adapter_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_t5_without_a_decoder_has_places_too() -> None:
    from transformers import T5Config, T5EncoderModel

    model = get_peft_model(T5EncoderModel(T5Config(**_T5)), get_config("houlsby", width=2))
    assert len(model.adapted_layers()) == 4


def test_an_architecture_that_is_not_known_is_refused_with_the_nearest() -> None:
    base = tiny("llama")
    base.config.model_type = "lama"
    with pytest.raises(
        ConfigError, match=r"there are none for 'lama'. Did you mean 'llama'\?.*names of layers or blocks"
    ):
        get_peft_model(base, BottleneckConfig())
    with pytest.raises(ConfigError, match=r"the model has no config.model_type"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), BottleneckConfig())


def test_houlsby_in_bert_stands_before_the_residual() -> None:
    """Against the block written out: projection, adapter, residual, norm."""
    model = get_peft_model(tiny("bert"), get_config("houlsby", width=3, activation="gelu")).double()
    randomize(model)
    layer = model.get_base_model().encoder.layer[0]
    h, before = (torch.sin(torch.arange(2.0 * 5 * n, dtype=torch.float64)).reshape(2, 5, n) for n in (24, 16))
    config = model.installed("default").config
    params = {
        name.rpartition(".")[2]: p.detach().numpy()
        for name, p in model.adapter_parameters()
        if name.startswith("encoder.layer.0.output.dense.")
    }
    dense, norm = layer.output.dense.base_layer, layer.output.LayerNorm
    y = h.numpy() @ dense.weight.detach().numpy().T + dense.bias.detach().numpy()
    wanted = norm(torch.from_numpy(bottleneck(params, config, h.numpy(), y)) + before)
    torch.testing.assert_close(layer.output(h, before), wanted, rtol=0, atol=1e-12)


def test_parallel_reads_the_input_of_the_feed_forward_and_is_scaled_by_four() -> None:
    model = get_peft_model(tiny("llama"), get_config("parallel", width=3)).double()
    randomize(model)
    mlp = model.get_base_model().layers[1].mlp
    x = torch.sin(torch.arange(2.0 * 5 * 16, dtype=torch.float64)).reshape(2, 5, 16)
    params = {
        name.rpartition(".")[2]: p.detach().numpy()
        for name, p in model.adapter_parameters()
        if name.startswith("layers.1.mlp.")
    }
    h = np.maximum(x.numpy() @ params["down"].T + params["down_bias"], 0)
    wanted = mlp.base_layer(x) + 4 * torch.from_numpy(h @ params["up"].T + params["up_bias"])
    torch.testing.assert_close(mlp(x), wanted, rtol=0, atol=1e-12)


# -- blocks ----------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["hidden", "extra"])
ANSWERS: dict[str, Any] = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, None),
    "list": lambda y: [y, y + 1],
    "named tuple": lambda y: Pair(y, 3),
    "dictionary": lambda y: {"hidden": y, "extra": 3},
}


class Answering(nn.Module):
    """6 -> 4 -> 5, the answer in some form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.form = nn.Linear(6, 4), nn.Linear(4, 5), form

    def forward(self, x: Tensor) -> Any:
        if self.form == "ModelOutput":
            from transformers.modeling_outputs import BaseModelOutput

            return BaseModelOutput(last_hidden_state=self.last(self.first(x)), hidden_states=(x,))
        return ANSWERS[self.form](self.last(self.first(x)))


def tensor_in(answer: Any) -> Tensor:
    if isinstance(answer, Tensor):
        return answer
    found: Tensor = next(iter(answer.values())) if isinstance(answer, (dict, OrderedDict)) else answer[0]
    return found


X = torch.sin(torch.arange(18.0)).reshape(3, 6)


@pytest.mark.parametrize("form", [*ANSWERS, "ModelOutput"])
def test_a_block_may_answer_in_any_form(form: str) -> None:
    model = get_peft_model(
        nn.Sequential(OrderedDict(block=Answering(form))), BottleneckConfig(target_modules=["block"])
    )
    randomize(model)
    plain, params = (
        Answering(form)(X),
        {n.rpartition(".")[2]: p.detach().numpy() for n, p in model.adapter_parameters()},
    )
    y = tensor_in(plain).detach().numpy()
    answer = model(X)
    assert type(answer) is type(plain)
    wanted = bottleneck(params, model.installed("default").config, X.numpy(), y)
    torch.testing.assert_close(tensor_in(answer), torch.from_numpy(wanted).float())
    if form != "tensor":
        rest = list(plain.values())[1:] if isinstance(plain, dict) else list(plain)[1:]
        given = list(answer.values())[1:] if isinstance(answer, dict) else list(answer)[1:]
        assert len(rest) == len(given)
        if form in ("named tuple", "dictionary"):
            assert given == [3]
        if form == "ModelOutput":
            assert torch.equal(answer.last_hidden_state, tensor_in(answer))
            assert torch.equal(answer.hidden_states[0], X)


def test_a_block_that_answers_without_a_tensor_first() -> None:
    class Odd(Answering):
        def forward(self, x: Tensor) -> Any:
            return "no", x

    model = get_peft_model(nn.Sequential(OrderedDict(block=Odd("tensor"))), BottleneckConfig(target_modules=["block"]))
    with pytest.raises(UnsupportedError, match="does not begin with a tensor; name a layer inside"):
        model(X)


def test_a_block_whose_sizes_mislead_says_so_when_it_runs() -> None:
    class Turned(Answering):
        def forward(self, x: Tensor) -> Any:
            return self.first(x)  # the last layer inside is not the last that runs

    model = get_peft_model(
        nn.Sequential(OrderedDict(block=Turned("tensor"))), BottleneckConfig(target_modules=["block"])
    )
    with pytest.raises(UnsupportedError, match="block: the adapter reads 5 features.*its output has 4; name a layer"):
        model(X)


def test_blocks_that_say_nothing_of_their_sizes_are_refused() -> None:
    net = nn.Sequential(OrderedDict(acts=nn.Sequential(nn.Tanh()), lists=nn.ModuleList([nn.Linear(6, 6)])))
    with pytest.raises(TargetError, match="'acts': the sizes of its input and output cannot be told: no linear layer"):
        get_peft_model(net, BottleneckConfig(target_modules=["acts"]))
    with pytest.raises(TargetError, match=r"'lists': is a container \(ModuleList\), not a layer; inside it: 0"):
        get_peft_model(net, BottleneckConfig(target_modules=["lists"]))
    with pytest.raises(TargetError, match=r"'acts': is a container \(Sequential\), not a layer; inside it: 0"):
        get_peft_model(net, LoraConfig(target_modules=["acts"]))  # as without the kind


def test_a_block_of_experts_is_refused() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.stacked = nn.Linear(6, 3), nn.Parameter(torch.randn(3, 6, 6))

    net = nn.Sequential(OrderedDict(moe=nn.Sequential(Experts())))
    with pytest.raises(TargetError, match=r"'moe': the size of its output cannot be told.*experts \('0'\)"):
        get_peft_model(net, BottleneckConfig(target_modules=["moe"]))


def test_the_kwargs_of_a_block_reach_it() -> None:
    model = get_peft_model(tiny("llama"), BottleneckConfig(width=2, target_modules=["self_attn"]))
    randomize(model, scale=0.3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    options = {"output_attentions": True, "attention_mask": mask}
    answer = model(**fed("llama"), **options)
    assert len(answer.attentions) == 2
    adapters_act(model, lambda: model(**fed("llama"), **options)[0])


# -- beside other adapters -------------------------------------------------------------------------


def test_lora_inside_a_block_and_a_bottleneck_on_it() -> None:
    base = nn.Sequential(OrderedDict(block=Answering("tuple")))
    before = bits(base)
    model = get_peft_model(base, BottleneckConfig(width=2, target_modules=["block"]), "neck")
    model.add_adapter("lora", LoraConfig(r=2, lora_alpha=2, target_modules=["first", "last"], init_lora_weights=False))
    randomize(model, "neck")
    model.set_adapter(["neck", "lora"])
    y = model(X)[0]
    model.merge_adapter(["lora"])
    torch.testing.assert_close(model(X)[0], y)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(X)[0], Answering("tuple")(X)[0])
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X)[0], y)
    with pytest.raises(MergeError, match="is not linear and cannot be merged"):
        model.merge_adapter()
    model.add_adapter("second", BottleneckConfig(width=2, target_modules=["block"]))
    with pytest.raises(UnsupportedError, match="'neck' and 'second' are both not linear"):
        model.set_adapter(["neck", "second"])
    assert list(model.adapted_layers()) == ["block", "block.first", "block.last"]
    for name in ("neck", "second"):
        model.delete_adapter(name)
    assert list(model.adapted_layers()) == ["block.first", "block.last"]
    plain = model.unload()
    assert bits(plain) == before


def test_files_there_and_back(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(OrderedDict(block=Answering("tensor"), last=nn.Linear(5, 5)))

    torch.manual_seed(3)
    base = make()
    config = BottleneckConfig(width=2, activation="silu", scale=0.5, target_modules=["block", "block.last"])
    model = get_peft_model(base, config)
    assert list(model.adapted_layers()) == ["block", "block.last"]
    randomize(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(3)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(loaded(X), model.eval()(X))
    assert loaded.peft_config["default"].replace(inference_mode=False) == model.peft_config["default"]
    import peft

    with pytest.raises(KeyError, match="BOTTLENECK"):
        peft.PeftModel.from_pretrained(make(), tmp_path)


# -- the configuration -----------------------------------------------------------------------------


def test_all_that_is_wrong_with_a_configuration_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        BottleneckConfig(
            width=0,
            activation="gelu_tan",
            placement="housby",
            init="zero",
            scale=float("nan"),
            bottleneck_dropout=1.0,
        )
    text = str(caught.value)
    for part in (
        "width: expected a whole number >= 1, got 0",
        "Did you mean 'gelu_tanh'?",
        "Did you mean 'houlsby'?",
        "init: expected one of ['identity', 'near-identity'], got 'zero'",
        "scale: expected a number that is finite, got nan",
        "bottleneck_dropout: expected a number in [0, 1), got 1.0",
    ):
        assert part in text, part


def test_presets_and_defaults() -> None:
    assert get_config("houlsby") == BottleneckConfig()
    assert get_config("pfeiffer", width=8) == BottleneckConfig(placement="pfeiffer", width=8)
    assert [get_config(name).factor for name in ("houlsby", "pfeiffer", "parallel")] == [1, 1, 4]
    assert BottleneckConfig(placement="parallel", scale=0.5).factor == 0.5


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_the_function_of_its_name(name: str) -> None:
    x = np.linspace(-4, 4, 81)
    mine = ACTIVATIONS[name](torch.from_numpy(x))
    np.testing.assert_allclose(mine.numpy(), FUNCTIONS[name](x), rtol=0, atol=1e-12)
    assert set(FUNCTIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("init", ["identity", "near-identity"])
def test_the_start_is_that_of_the_paper(init: str) -> None:
    """A normal of deviation 0.01, cut at two deviations (whose deviation is 0.8796 of the whole one's)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(400, 400))
    own = dict(get_peft_model(net, BottleneckConfig(width=200, init=init, target_modules=["0"])).adapter_parameters())
    for name in ("down", "up") if init == "near-identity" else ("down",):
        values = own[f"0.{name}"].detach()
        assert values.abs().max() <= 0.02
        assert abs(float(values.std()) / 0.01 - 0.8796) < 0.01
        assert abs(float(values.mean())) < 1e-4
    zero = ("down_bias", "up_bias", "up") if init == "identity" else ("down_bias", "up_bias")
    assert all(not own[f"0.{name}"].any() for name in zero)


def test_vera_on_a_layer_inside_and_a_refused_pair_leave_the_base_alone() -> None:
    base = nn.Sequential(OrderedDict(block=Answering("tensor")))
    before = Snapshot.of(base)
    with pytest.raises(TargetError, match="'block': is a container"):
        get_peft_model(base, VeraConfig(r=2, target_modules=["block"]))
    assert Snapshot.of(base) == before
