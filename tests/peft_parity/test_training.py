"""Forward, gradients, merging and three optimizer steps agree with PEFT's, live, on five tiny architectures."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

import kilotune
from tests.peft_parity.oracle import (
    BASES,
    IDS,
    METHODS,
    Twins,
    assert_all_close,
    assert_close,
    assert_same,
    base,
    check_forward,
    check_gradients,
    check_merge,
    check_training,
    loss_of,
    peft_parameters,
    quiet,
    run,
    scramble,
    twins,
)

# OPT and Llama with their default targets; the others with layers of several shapes.
TARGETS: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": None},
    "opt": {"target_modules": None, "r": 128},
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"]},
    "bert": {"target_modules": ["query", "value", "dense"]},
    "mlp": {"target_modules": "all-linear"},
}
CASES = [(name, method) for name in BASES for method in ("vera", "lora")]
MODES = ("none", "all", "only")


def pair(name: str, method: str, bias: str = "none", **options: Any) -> Twins:
    mode = f"{method}_only" if bias == "only" else bias
    return twins(name, method, bias=mode, **{"r": 6, **TARGETS[name], **options})


@pytest.mark.parametrize("bias", MODES)
@pytest.mark.parametrize("name, method", CASES)
def test_forward_and_gradients(name: str, method: str, bias: str) -> None:
    both = pair(name, method, bias)
    check_forward(both)
    check_gradients(both)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("bias", MODES)
@pytest.mark.parametrize("name, method", CASES)
def test_three_optimizer_steps(name: str, method: str, bias: str, optimizer: str) -> None:
    """Weight decay is on, and pulls a trained bias to zero, not to the base's, as PEFT's does."""
    check_training(pair(name, method, bias), optimizer)


@pytest.mark.parametrize("bias", MODES)
@pytest.mark.parametrize("name, method", CASES)
def test_merge(name: str, method: str, bias: str) -> None:
    check_merge(pair(name, method, bias))


@pytest.mark.parametrize("name, method", CASES)
def test_bfloat16_forward(name: str, method: str) -> None:
    """PEFT multiplies in float32 here and we in bfloat16, so both differ by rounding: 8 steps of 2^-8 are allowed,
    and ours may be no more than 3 times as far from the exact result as PEFT's."""
    both = pair(name, method, dtype=torch.bfloat16)
    check_forward(both, relative=8 * 2.0**-8)
    with torch.no_grad():
        ours, theirs = run(both.ours), run(both.theirs)
        assert_same((ours.dtype, theirs.dtype), (torch.bfloat16, torch.bfloat16), "dtypes of the outputs")
        both.ours.float()
        exact = run(both.ours)
    errors = [float((side.float() - exact).norm() / exact.norm()) for side in (ours, theirs)]
    assert errors[0] <= 3 * errors[1] + 2.0**-8, f"error of ours {errors[0]:.3g}, of PEFT's {errors[1]:.3g}"


@pytest.mark.parametrize("name", ["mlp", "gpt2", "bert"])
@pytest.mark.parametrize("method", ["vera", "lora"])
def test_float16_forward(name: str, method: str) -> None:
    check_forward(pair(name, method, dtype=torch.float16), relative=8 * 2.0**-11)


def test_float64() -> None:
    """LoRA in float64 has nothing to round, so both agree to its last digits."""
    both = pair("mlp", "lora")
    both.ours.double()
    both.theirs.double()
    check_forward(both, relative=1e-13)
    check_gradients(both, relative=1e-12)
    check_training(both, "adamw", relative=1e-11)


@pytest.mark.parametrize("method", ["vera", "lora"])
def test_generation(method: str) -> None:
    """Greedy decoding, with the cache of keys and values."""
    both = pair("llama", method)
    options = {"input_ids": IDS, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    texts = [model.generate(**options) for model in (both.ours, both.theirs)]
    assert torch.equal(*texts)
    assert not torch.equal(texts[0], base("llama").generate(**options))


@pytest.mark.parametrize("method", ["vera", "lora"])
def test_two_adapters(method: str) -> None:
    """One, the other, both at once, and one after the other is deleted."""
    both = pair("mlp", method)
    ours_cls, theirs_cls = METHODS[method]
    # PEFT's second VeRA adapter must have the first one's targets and rank
    options: dict[str, Any] = {"r": 6, "target_modules": "all-linear"}
    if method == "lora":
        options = {"r": 3, "target_modules": ["first", "0.1"], "lora_alpha": 5}
    both.ours.add_adapter("other", ours_cls(**options, **({"generator": "peft"} if method == "vera" else {})))
    both.theirs.add_adapter("other", theirs_cls(**options))
    check_forward(both)
    both.ours.set_adapter("other")
    both.theirs.set_adapter("other")
    scramble(both, "other")
    check_forward(both)
    check_gradients_of(both, "other")
    both.ours.set_adapter(["default", "other"])
    both.theirs.base_model.set_adapter(["default", "other"])
    check_forward(both)
    check_gradients_of(both, "default", "other")
    both.ours.delete_adapter("default")
    both.theirs.delete_adapter("default")
    both.theirs.set_adapter("other")
    assert_same(both.ours.active_adapters, ["other"], "active adapters")
    check_forward(both)


def check_gradients_of(both: Twins, *adapters: str) -> None:
    for model in (both.ours, both.theirs):
        model.zero_grad(set_to_none=True)
        loss_of(model).backward()
    for name in adapters:
        sides = (dict(both.ours.adapter_parameters(name)), peft_parameters(both.theirs, name))
        ours, theirs = ({key: p.grad for key, p in side.items()} for side in sides)
        assert_all_close(ours, theirs, f"gradient in {name!r}", 1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["vera", "lora"])
@pytest.mark.parametrize("name, head", [("mlp", "head"), ("bert", "classifier"), ("llama", "lm_head")])
def test_modules_to_save(name: str, head: str, method: str) -> None:
    for bias in ("none", "all"):
        both = pair(name, method, bias, modules_to_save=[head])
        names = dict(both.ours.adapter_parameters())
        assert f"{head}.weight" in names
        check_forward(both)
        check_gradients(both)
        check_training(both, "adamw")
        check_merge(both)


LORA_OPTIONS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 24},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "ranks": {"rank_pattern": {r"layers\.0\.self_attn\.q_proj": 3, "v_proj": 9}},
    "alphas": {"alpha_pattern": {"q_proj": 30, "model.layers.1.self_attn.v_proj": 1}},
    "ranks, alphas and rslora": {
        "rank_pattern": {"^model.layers.0.*q_proj": 5, "q_proj": 2},
        "alpha_pattern": {"(q|v)_proj": 7},
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("options", LORA_OPTIONS.values(), ids=LORA_OPTIONS)
def test_lora_options(options: dict[str, Any]) -> None:
    both = pair("llama", "lora", **options)
    shapes = [{k: tuple(p.shape) for k, p in side} for side in (both.ours.adapter_parameters(), _items(both))]
    assert_same(*shapes, "shapes of the trained tensors")
    check_forward(both)
    check_gradients(both)
    check_merge(both)


def _items(both: Twins) -> Any:
    return peft_parameters(both.theirs).items()


@pytest.mark.parametrize("method, key", [("vera", "vera_dropout"), ("lora", "lora_dropout")])
def test_dropout_at_one_place(method: str, key: str) -> None:
    """Dropout stands on the adapter's input: with the same random numbers both sides drop the same ones."""
    both = pair("mlp", method, **{key: 0.5})
    check_forward(both)  # off in eval
    outputs = []
    for model in (both.ours, both.theirs):
        model.train()
        torch.manual_seed(3)
        outputs.append(run(model).detach())
    assert_close(*outputs, "output with dropout")
    both.ours.eval()
    assert not torch.allclose(outputs[0], run(both.ours), atol=1e-4)


@pytest.mark.parametrize("method", ["vera", "lora"])
def test_an_untrained_adapter_changes_nothing(method: str) -> None:
    model = kilotune.get_peft_model(base("mlp"), kilotune.get_config(method, r=6, target_modules="all-linear"))
    with torch.no_grad():
        assert torch.equal(run(model), run(base("mlp")))


@pytest.mark.parametrize("options", [{}, {"d_initial": -0.25}], ids=["default", "d_initial"])
def test_vera_starts_equal_to_peft(options: dict[str, Any]) -> None:
    """The same matrices bit for bit, and the same vectors, with nothing copied from one to the other."""
    options = {"r": 6, "target_modules": "all-linear", "projection_prng_key": 2**40 + 3, **options}
    ours = kilotune.get_peft_model(base("mlp"), kilotune.VeraConfig(generator="peft", **options))
    theirs = peft.get_peft_model(base("mlp"), peft.VeraConfig(**options))
    (source,) = ours.projections.extents()
    pair = ours.projections.pair(source, torch.device("cpu"), torch.float32)
    assert torch.equal(pair.a, theirs.base_model.vera_A["default"])
    assert torch.equal(pair.b.T, theirs.base_model.vera_B["default"])
    mine, other = dict(ours.adapter_parameters()), peft_parameters(theirs)
    assert_same(sorted(mine), sorted(other), "names of the trained tensors")
    for name, value in other.items():
        assert torch.equal(mine[name], value), name


@pytest.mark.parametrize("start", [True, "gaussian", False])
def test_lora_starts_have_peft_statistics(start: bool | str) -> None:
    """Our generator is torch's global one, and the draws are PEFT's in size: deviation and largest value agree."""
    options = {"r": 64, "target_modules": ["first"], "init_lora_weights": start}
    wide = [torch.nn.Sequential() for _ in range(2)]
    for model in wide:
        model.first = torch.nn.Linear(400, 300)
    torch.manual_seed(0)
    ours = dict(kilotune.get_peft_model(wide[0], kilotune.LoraConfig(**options)).adapter_parameters())
    with quiet():
        theirs = peft_parameters(peft.get_peft_model(wide[1], peft.LoraConfig(**options)))
    for key in ("first.lora_A", "first.lora_B"):
        a, b = ours[key].detach(), theirs[key].detach()
        assert abs(float(a.std()) - float(b.std())) <= 0.02 * float(b.std()), key
        assert abs(float(a.mean())) <= 0.02 * float(a.std()) + 1e-12, key
        assert abs(float(a.abs().max()) - float(b.abs().max())) <= 0.25 * float(b.abs().max()), key


def test_the_loss_curve_is_not_flat() -> None:
    """What the training tests compare is a curve that falls."""
    both = pair("mlp", "vera")
    before = float(loss_of(both.ours).detach())
    check_training(both, "adamw", steps=10)
    assert float(loss_of(both.ours).detach()) < before - 0.01
