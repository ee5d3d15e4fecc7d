"""Adapters on the experts of mixture-of-experts layers: against numpy, in each of transformers' implementations."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import kilotune
from kilotune.convert import to_lora
from kilotune.deltas import Need
from kilotune.errors import ConfigError, MergeError, TargetError, UnsupportedError
from kilotune.kinds.experts import Experts, StandIn
from kilotune.layers.adapted_parameters import AdaptedParameters, UntrainedExpertsWarning
from kilotune.methods import METHODS, PRESETS
from kilotune.plan import costs
from tests.conformance.cases import MethodCase, Params
from tests.conformance.cells import FORMULAS, METHOD_CASES, config_of, delta_of
from tests.conformance.toys import TOYS
from tests.support import moe
from tests.support.models import Snapshot, bits, randomize

PAIR = ["gate_up_proj", "down_proj"]
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "llama4")


def cases() -> list[MethodCase]:
    """Every method that sits on a matrix or a bias, in all its configurations."""
    found = [case for name in FORMULAS for case in METHOD_CASES[name] if delta_of(case).needs <= Experts.offers]
    return [case for case in found if not case.kinds or "experts" in case.kinds]


CASES = cases()


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, toy in TOYS.items():
        monkeypatch.setitem(kilotune.methods.METHODS, name, toy)


def in_layouts(layouts: Iterable[tuple[str, ...]]) -> list[Any]:
    """(*layout, case): GPT-OSS, which has all there is, with every case (but the first of each method in full); the
    others with the first of each method that needs no bias."""
    return [
        pytest.param(
            *layout,
            case,
            id="-".join([*layout, case_id(case)]),
            marks=[] if case is METHOD_CASES[case.name][0] else [pytest.mark.full],
        )
        for layout in layouts
        for case in CASES
        if layout[0] == "gpt_oss" or (case is METHOD_CASES[case.name][0] and Need.BIAS not in delta_of(case).needs)
    ]


def case_id(case: MethodCase) -> str:
    return "-".join([case.name, *(f"{key}={value}" for key, value in case.options.items())])


def adapt(base: nn.Module, case: MethodCase, targets: list[str], **options: Any) -> kilotune.PeftModel:
    """Only the parameters ``targets``; BitFit would take every module with a bias beside them."""
    return kilotune.get_peft_model(
        base, config_of(case, **{"target_modules": [], "target_parameters": targets, **options})
    )


def targets_of(form: moe.Layout, case: MethodCase) -> list[str]:
    """Both parameters; one where the formula is of one layer alone (PEFT's matrices depend on all of them)."""
    return [form.second] if case.options.get("generator") == "peft" else [form.first, form.second]


def reference(layout: moe.Layout, model: kilotune.PeftModel, case: MethodCase, batch: tuple[Tensor, ...]) -> moe.Array:
    """The layer's output with every expert's matrix adapted by the method's formula, in numpy."""
    config, layers = model.peft_config["default"], model.adapted_layers()
    wide = {name: p for name, p in model.adapter_parameters() if not name.startswith("experts.")}
    base = {name.replace(".base_layer", ""): p for name, p in model.model.named_parameters()}
    plain = moe.Net(layout.make())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(base[name])
    both = [(name, layout.matrices(plain, name).copy(), layout.biases(plain, name)) for name in layout.names]
    order = [name for name, _, _ in both if f"experts.{name}" in layers]
    shapes = tuple(m.shape[1:] for name, m, _ in both for _ in range(moe.EXPERTS) if name in order)
    for name, matrices, biases in both:
        slot = layers[f"experts.{name}"].slot("default") if name in order else None
        for expert in range(moe.EXPERTS if slot is not None else 0):
            own = {key: p[expert] for key, p in slot.named_parameters()}
            mine = Params({key: p.detach().double().numpy() for key, p in {**own, **wide}.items()})
            mine.fan_in, mine.shapes = matrices.shape[2], shapes
            mine.index = order.index(name) * moe.EXPERTS + expert
            bias = None if biases is None else biases[expert]
            matrices[expert], bias = FORMULAS[case.name](mine, config, matrices[expert], bias)
            if biases is not None:
                biases[expert] = bias
    parts = [(matrices, biases) for _, matrices, biases in both]
    x, index, weights = (value.double().numpy() for value in batch)
    return moe.dense(layout, x, index, weights, *parts)


def close(actual: Tensor, expected: moe.Array | Tensor, relative: float = 2e-6) -> None:
    wanted = torch.as_tensor(np.asarray(expected.detach() if isinstance(expected, Tensor) else expected))
    torch.testing.assert_close(
        actual.detach().double(), wanted.double(), rtol=relative, atol=relative * float(wanted.abs().max())
    )


@pytest.mark.parametrize("layout, implementation, case", in_layouts(moe.CELLS))
def test_every_method_in_every_implementation(layout: str, implementation: str, case: MethodCase) -> None:
    """Forward against numpy; the start; merged; the bits of the base; all with an expert that gets no token."""
    form, batch = moe.LAYOUTS[layout], moe.routed()
    net = moe.net(layout, implementation)
    before, bits_before = net(*batch), bits(net)
    model = adapt(net, case, targets_of(form, case))
    assert isinstance(net.experts, AdaptedParameters)
    start = model(*batch)
    if case.start == "exact":
        assert torch.equal(start, before)
    elif case.start == "near" and "init_lora_weights" not in case.options:
        close(start, before)
    randomize(model, scale=0.3)
    output = model(*batch)
    assert float((output - before).detach().abs().max()) > 1e-3
    close(output, reference(form, model, case, batch), 1e-5)
    with model.disable_adapter():
        assert torch.equal(model(*batch), before)
    model.merge_adapter()
    close(model(*batch), output, 1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(*batch), output)
    model.unload()
    assert bits(net) == bits_before
    assert torch.equal(net(*batch), before)


@pytest.mark.parametrize("layout, case", in_layouts((name,) for name in moe.LAYOUTS))
def test_gradients(layout: str, case: MethodCase) -> None:
    """Of the parameters and of the input: finite differences of the formula (in one layout; that costs), the same in
    all implementations, and zero for the expert without tokens."""
    form, (x, *choices) = moe.LAYOUTS[layout], moe.routed(tokens=4)
    net = moe.net(layout)
    model = adapt(net, case, targets_of(form, case))
    randomize(model, scale=0.05)  # little enough that no step crosses the kinks of GPT-OSS's activation
    x = (0.3 * x).requires_grad_()
    probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(8))
    found: list[dict[str, Tensor]] = []
    for implementation in form.implementations:
        net.experts.base_layer.config._experts_implementation = implementation
        model.zero_grad()
        x.grad = None
        (model(x, *choices) * probe).sum().backward()
        found.append({name: p.grad for name, p in [("x", x), *model.adapter_parameters()] if p.grad is not None})
    own = dict(model.adapter_parameters())
    assert set(found[0]) == {"x", *own}
    for other in found[1:]:
        for name, gradient in other.items():
            close(gradient, found[0][name], 2e-5)
    for name, gradient in found[0].items():
        if name.startswith("experts."):  # else one vector for the whole model
            assert not bool(gradient[2].any()), f"{name}: the expert without tokens"
            assert all(bool(gradient[e].any()) for e in (0, 1, 3)), name
        exactly = name == "x" or any(fnmatch(name, exact) for exact in case.exact_gradient)
        if exactly and layout == "gpt_oss":  # the others differ in the layout alone, which the outputs have shown
            value = x if name == "x" else own[name]
            direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(4))
            slope = difference(form, model, case, (x, *choices), value, direction, probe, 1e-3)
            assert float((gradient * direction).sum()) == pytest.approx(slope, rel=2e-3, abs=2e-3), name


def difference(
    form: moe.Layout,
    model: kilotune.PeftModel,
    case: MethodCase,
    batch: tuple[Tensor, ...],
    parameter: Tensor,
    direction: Tensor,
    probe: Tensor,
    step: float,
) -> float:
    """The slope of the numpy reference along ``direction``, by five points."""
    values, start = [], parameter.detach().clone()
    for factor in (-2, -1, 1, 2):
        with torch.no_grad():
            parameter.copy_(start + factor * step * direction)
        detached = tuple(value.detach() for value in batch)
        values.append(float((reference(form, model, case, detached) * probe.double().numpy()).sum()))
    with torch.no_grad():
        parameter.copy_(start)
    return (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("lora", "vera", "toy_rescale")], ids=case_id)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("layout", ["mixtral", "gpt_oss"])
def test_choices_of_other_processes(layout: str, implementation: str, case: MethodCase) -> None:
    """Expert parallelism marks experts of other processes by the index E: they add nothing, not even a NaN."""
    form, batch = moe.LAYOUTS[layout], moe.routed(sentinels=True)
    if layout == "gpt_oss" and implementation == "eager":
        batch = moe.routed()  # its own loop has no room for such an index
    net = moe.net(layout, implementation)
    net.experts._is_expert_parallel = True
    model = adapt(net, case, targets_of(form, case))
    randomize(model, scale=0.3)
    x = batch[0].clone().requires_grad_()
    with poisoned():
        output = model(x, *batch[1:])
        output.sum().backward()
    close(output, reference(form, model, case, batch), 1e-5)
    gradients = [x.grad, *(p.grad for _, p in model.adapter_parameters())]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients)


@contextmanager
def poisoned() -> Iterator[None]:
    """What torch leaves undefined is NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(False)


class Largest(TorchDispatchMode):
    """The number of elements in the largest tensor that is made anew, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("layout", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("case", [MethodCase("lora", {"r": 2}), MethodCase("vera", {"r": 4})], ids=case_id)
def test_no_adapted_weight_is_built(layout: str, implementation: str, case: MethodCase) -> None:
    form, (_, *choices) = moe.LAYOUTS[layout], moe.routed(tokens=3)
    model = adapt(moe.net(layout, implementation, size=128), case, targets_of(form, case))
    randomize(model)
    with Largest() as seen:
        model(torch.randn(3, 128), *choices).sum().backward()
    assert 0 < seen.largest < 128 * 128  # not even one of one expert


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models(family: str, tmp_path: Path) -> None:
    """Start, training steps, all implementations, several adapters, files, merging for good."""
    base = moe.tiny(family)
    ids = moe.tokens()
    with torch.no_grad():
        before = base(ids).logits
    model = kilotune.get_peft_model(base, kilotune.LoraConfig(r=3, target_parameters=PAIR))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    with torch.no_grad():
        output = model(ids).logits
        if family != "llama4":  # transformers has but one implementation of it
            for name in ("eager", "batched_mm", "grouped_mm"):
                base.set_experts_implementation(name)
                close(model(ids).logits, output, 1e-5)
    model.save_pretrained(tmp_path / "one")
    again = kilotune.PeftModel.from_pretrained(moe.tiny(family), tmp_path / "one", is_trainable=True)
    with torch.no_grad():
        close(again(ids).logits, output, 1e-5)
    again.save_pretrained(tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    merged = again.merge_and_unload()
    assert not any(isinstance(m, (AdaptedParameters, kilotune.layers.adapted.AdaptedLayer)) for m in merged.modules())
    with torch.no_grad():
        close(merged(ids).logits, output, 1e-5)


@pytest.mark.parametrize("method", sorted({case.name for case in CASES} & {*METHODS, *PRESETS}))
def test_files_of_every_method(method: str, tmp_path: Path) -> None:
    """Save, load, save: the same bytes and outputs; one tensor for all experts of a parameter."""
    case = METHOD_CASES.get(method, [MethodCase(method)])[0]
    ids, options = moe.tokens(), {k: v for k, v in case.options.items() if k != "bias"}
    case = MethodCase(method, options)
    model = adapt(moe.tiny("gpt_oss"), case, PAIR, exclude_modules=None)
    randomize(model, scale=0.3)
    model.save_pretrained(tmp_path / "one")
    again = kilotune.PeftModel.from_pretrained(moe.tiny("gpt_oss"), tmp_path / "one", is_trainable=True)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert not torch.equal(moe.tiny("gpt_oss")(ids).logits, model(ids).logits)
    again.save_pretrained(tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    plain = sum(p.numel() for _, p in model.adapter_parameters())
    assert model.get_nb_trainable_parameters()[0] == plain


def test_several_adapters() -> None:
    """Other ranks, other parameters; one, both, none; deleting, and merging one while the other runs."""
    net, batch = moe.net("gpt_oss", "grouped_mm"), moe.routed()
    before = net(*batch)
    model = kilotune.get_peft_model(net, kilotune.LoraConfig(r=3, target_parameters=PAIR))
    model.add_adapter("second", kilotune.VeraConfig(r=5, target_parameters=["down_proj"]))
    for name in ("default", "second"):
        randomize(model, name, scale=0.3)
    one = model(*batch)
    model.set_adapter("second")
    assert all(p.grad is None and not p.requires_grad for _, p in model.adapter_parameters("default"))
    two = model(*batch)
    model.set_adapter(["default", "second"])
    both = model(*batch)
    assert not torch.allclose(both, one)
    assert not torch.allclose(both, two)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(*batch), both)
    twin.merge_and_unload()
    close(twin.model(*batch), both, 1e-5)
    model.merge_adapter(["second"])
    close(model(*batch), both, 1e-5)
    model.unmerge_adapter()
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(model(*batch), two)
    assert [name for name, _ in net.experts.adapted()] == ["down_proj"]
    model.delete_adapter("second")
    assert torch.equal(net(*batch), before)
    assert type(net.experts).__name__ == "GptOssExperts"


def test_a_rescaling_beside_a_merged_adapter() -> None:
    """A change of the base's own matrices, whatever is merged into them now."""
    net, batch = moe.net("mixtral", "batched_mm"), moe.routed()
    model = adapt(net, MethodCase("toy_rescale", {"rows": True, "cols": True}), PAIR)
    model.add_adapter("other", kilotune.LoraConfig(r=2, target_parameters=PAIR))
    for name in ("default", "other"):
        randomize(model, name, scale=0.3)
    model.set_adapter(["default", "other"])
    both = model(*batch)
    model.merge_adapter(["other"])
    close(model(*batch), both, 1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_bfloat16(family: str, implementation: str) -> None:
    """The factors run in bfloat16, the trained tensors stay float32, and the output is as near as rounding allows."""
    base = moe.tiny(family, dtype=torch.bfloat16)
    base.set_experts_implementation(implementation)
    model = kilotune.get_peft_model(base, kilotune.LoraConfig(r=3, target_parameters=PAIR))
    randomize(model, scale=0.3)
    assert {p.dtype for _, p in model.adapter_parameters()} == {torch.float32}
    output = model(moe.tokens()).logits
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    exact = moe.tiny(family, dtype=torch.bfloat16).float()
    twin = kilotune.get_peft_model(exact, kilotune.LoraConfig(r=3, target_parameters=PAIR))
    randomize(twin, scale=0.3)
    wanted = twin(moe.tokens()).logits
    assert float((output - wanted).detach().abs().max()) < 8 * 2.0**-8 * float(wanted.detach().abs().max())
    wanted.sum().backward()
    for (name, p), (_, q) in zip(model.adapter_parameters(), twin.adapter_parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert float((p.grad - q.grad).norm()) < 0.1 * float(q.grad.norm()), name


@pytest.mark.heavy
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.full)])
@pytest.mark.parametrize("method", ["lora", "vera"])
def test_compile(family: str, implementation: str, method: str) -> None:
    """In one graph, forward and backward, where transformers' own experts compile (its "eager" loop does not)."""
    base = moe.tiny(family)
    base.set_experts_implementation(implementation)
    model = kilotune.get_peft_model(base, kilotune.get_config(method, r=3, target_parameters=PAIR))
    randomize(model, scale=0.3)
    ids = moe.tokens()
    output = model(ids).logits
    output.sum().backward()
    expected = {name: p.grad.clone() for name, p in model.adapter_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(ids).logits
    close(compiled, output, 1e-5)
    compiled.sum().backward()
    for name, parameter in model.adapter_parameters():
        assert parameter.grad is not None
        close(parameter.grad, expected[name], 1e-4)
    torch._dynamo.reset()


def test_gradient_checkpointing_and_router() -> None:
    """The router is a matrix of its own; its logits are still recorded, and blocks can be run again in backward."""
    base = moe.tiny("mixtral")
    config = kilotune.LoraConfig(r=2, target_parameters=[*PAIR, "gate.weight"], target_modules=["q_proj"])
    model = kilotune.get_peft_model(base, config)
    randomize(model, scale=0.3)
    ids = moe.tokens()
    found = model(ids, labels=ids, output_router_logits=True)
    assert len(found.router_logits) == 2
    found.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.adapter_parameters() if p.grad is not None}
    assert {name.rsplit(".", 2)[-2] for name in expected} == {*PAIR, "weight", "q_proj"}
    model.zero_grad()
    base.train()
    base.activation_checkpointing_enable()
    model(ids, labels=ids, output_router_logits=True).loss.backward()
    for name, parameter in model.adapter_parameters():
        assert parameter.grad is not None
        close(parameter.grad, expected[name], 1e-5)


def test_hooks_of_the_module_run() -> None:
    net, batch, seen = moe.net("mixtral", "eager"), moe.routed(), []
    net.experts.register_forward_hook(lambda module, args, output: seen.append(output))
    model = kilotune.get_peft_model(net, kilotune.LoraConfig(r=2, target_parameters=PAIR, init_lora_weights=False))
    output = model(*batch)
    assert len(seen) == 1
    assert torch.equal(seen[0], output)


def test_threads_do_not_meet() -> None:
    """The module itself is not changed while it runs, so two calls at once give what each gives alone."""
    from concurrent.futures import ThreadPoolExecutor

    net, batch = moe.net("mixtral", "grouped_mm"), moe.routed()
    model = kilotune.get_peft_model(net, kilotune.LoraConfig(r=2, target_parameters=PAIR, init_lora_weights=False))
    with torch.no_grad():
        expected = model(*batch)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: model(*batch), range(100)))
    assert all(torch.equal(y, expected) for y in found)


# -- what is refused -------------------------------------------------------------------------------


def lora(**options: Any) -> kilotune.LoraConfig:
    return kilotune.LoraConfig(r=2, **options)


@pytest.mark.parametrize(
    "config, message",
    [
        (lora(target_parameters=["gate_upp_proj"]), "no parameter is called 'gate_upp_proj'.*Nearest: 'gate_up_proj'"),
        (lora(target_parameters=["experts"]), "no parameter is called 'experts'"),
        (lora(target_parameters=["q_proj.weight"]), "'q_proj.weight'|q_proj' in target_modules"),
        (lora(target_parameters=["input_layernorm.weight"]), r"has the shape \(16,\); expected a matrix"),
        (lora(target_parameters=["gate_up_proj_bias"]), "is a bias; name 'gate_up_proj'"),
        (lora(target_parameters=PAIR, exclude_modules=["experts"]), "left out by exclude_modules"),
        (lora(target_modules=["gate_up_proj"]), "target_parameters=.*gate_up_proj"),
        (lora(target_modules=["experts"]), "target_parameters=.'gate_up_proj', 'down_proj'"),
    ],
)
def test_targets_that_cannot_be(config: kilotune.LoraConfig, message: str) -> None:
    model = moe.tiny("gpt_oss")
    before = Snapshot.of(model)
    with pytest.raises(TargetError, match=message):
        kilotune.get_peft_model(model, config)
    assert Snapshot.of(model) == before


def test_all_wrong_names_at_once() -> None:
    with pytest.raises(TargetError) as caught:
        kilotune.get_peft_model(moe.tiny("mixtral"), lora(target_parameters=["nothing", "norm.weight", "down_proj"]))
    assert "'nothing'" in str(caught.value)
    assert "norm.weight" in str(caught.value)


@pytest.mark.parametrize("implementation", ["deepgemm", "sonicmoe"])
def test_fused_kernels_are_refused(implementation: str) -> None:
    net = moe.net("mixtral", implementation)
    model = kilotune.get_peft_model(net, lora(target_parameters=PAIR, init_lora_weights=False))
    with pytest.raises(UnsupportedError, match=f"'{implementation}'.*set_experts_implementation"):
        model(*moe.routed())


def test_an_own_implementation_runs_or_says_why_not() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def odd(self: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return x @ self.down_proj.sum(0)

    ALL_EXPERTS_FUNCTIONS.register("kilotune-test-odd", odd)
    model = kilotune.get_peft_model(moe.net("mixtral", "kilotune-test-odd"), lora(target_parameters=PAIR))
    with pytest.raises(UnsupportedError, match=r"does \.sum with a parameter that has an adapter"):
        model(*moe.routed())


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match=r"lora_dropout=0\.1: there is no dropout on the input of a parameter"):
        kilotune.get_peft_model(moe.tiny("mixtral"), lora(target_parameters=PAIR, lora_dropout=0.1))
    with pytest.raises(ConfigError, match="target_parameters: expected a list of parameter names, got 'down_proj'"):
        lora(target_parameters="down_proj")
    with pytest.raises(ConfigError, match="layers_to_transform: does not reach target_parameters"):
        lora(target_modules=["q_proj"], target_parameters=PAIR, layers_to_transform=[0])
    with pytest.raises(TargetError, match="needs the output of a layer"):
        adapt(moe.net("mixtral"), MethodCase("toy_residual"), PAIR)
    with pytest.raises(TargetError, match="has no bias: MixtralExperts has no parameter 'down_proj_bias'"):
        adapt(moe.net("mixtral"), MethodCase("toy_shift"), PAIR)
    net = moe.net("mixtral")
    net.experts.forward = net.experts.forward
    model = kilotune.get_peft_model(net, lora(target_parameters=PAIR))
    with pytest.raises(UnsupportedError, match="has been replaced in the object"):
        model(*moe.routed())


def test_a_module_saved_whole_and_adapted() -> None:
    with pytest.raises(UnsupportedError, match="the same object"):
        kilotune.get_peft_model(moe.tiny("mixtral"), lora(target_parameters=PAIR, modules_to_save=["experts"]))
    config = lora(target_parameters=["gate_up_proj"], modules_to_save=["down_proj"])
    with pytest.raises(TargetError, match="no module is called 'down_proj'"):
        kilotune.get_peft_model(moe.tiny("mixtral"), config)


def test_all_linear_says_that_experts_are_left() -> None:
    with pytest.warns(UntrainedExpertsWarning, match=r"target_parameters=\['down_proj', 'gate_up_proj'\]"):
        kilotune.get_peft_model(moe.tiny("mixtral"), lora(target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for targets in (None, [], PAIR):
            options = {} if targets is None else {"target_parameters": targets}
            modules = ["q_proj"] if targets is None else "all-linear"
            kilotune.get_peft_model(moe.tiny("mixtral"), lora(target_modules=modules, **options))


def test_the_stand_in_only_multiplies() -> None:
    """A forward that takes an adapted parameter from outside gets one that cannot be mistaken for the weight."""
    model = kilotune.get_peft_model(moe.net("mixtral"), lora(target_parameters=PAIR, init_lora_weights=False))
    experts = model.model.experts
    assert experts.gate_up_proj is experts.base_layer.gate_up_proj  # for tying, resizing and saving
    found: list[Any] = []
    handle = model.register_forward_pre_hook(lambda module, args: found.append(experts.gate_up_proj))
    model(*moe.routed())
    handle.remove()
    (held,) = found
    assert isinstance(held, StandIn)
    assert held.shape == experts.base_layer.gate_up_proj.shape
    for use in (lambda: held + 1, lambda: torch.relu(held), lambda: held[1:3], lambda: held.sum(), lambda: len(held)):
        with pytest.raises((UnsupportedError, TypeError)):
            use()
    with model.disable_adapter():
        assert experts.gate_up_proj is experts.base_layer.gate_up_proj
    model.merge_adapter()
    with pytest.raises(MergeError):
        experts.gate_up_proj = nn.Parameter(torch.zeros(1))


def test_rank_patterns_reach_parameters(tmp_path: Path) -> None:
    """By the parameter's whole name or its end, as in PEFT; one that fits nothing is refused."""
    config = lora(target_parameters=PAIR, rank_pattern={"layers.0.mlp.experts.down_proj": 5, "gate_up_proj": 3})
    model = kilotune.get_peft_model(moe.tiny("mixtral"), config)
    shapes = {name.removeprefix("model.layers."): p.shape[1] for name, p in model.adapter_parameters() if "_A" in name}
    assert shapes == {
        "0.mlp.experts.gate_up_proj.lora_A": 3,
        "0.mlp.experts.down_proj.lora_A": 5,
        "1.mlp.experts.gate_up_proj.lora_A": 3,
        "1.mlp.experts.down_proj.lora_A": 2,
    }
    with pytest.raises(TargetError, match="fits no adapted layer"):
        kilotune.get_peft_model(moe.tiny("mixtral"), lora(target_parameters=PAIR, rank_pattern={"up_proj": 3}))


@pytest.mark.parametrize("method, options", [("lora", {"r": 3}), ("vera", {"r": 4, "save_projection": True})])
def test_a_plan_knows_the_size_of_the_file(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    config = kilotune.get_config(method, target_parameters=PAIR, **options)
    expected = costs(moe.tiny("mixtral"), config).file_bytes
    kilotune.get_peft_model(moe.tiny("mixtral"), config).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size == expected


def test_it_becomes_no_lora_file() -> None:
    model = kilotune.get_peft_model(moe.tiny("mixtral"), kilotune.VeraConfig(r=4, target_parameters=PAIR))
    with pytest.raises(UnsupportedError, match=r"\(target_parameters\) into LoRA is not there"):
        to_lora(model)


def test_a_module_is_not_adapted_twice() -> None:
    """As a whole and by a parameter of its own: the second would hide the first."""
    model = kilotune.get_peft_model(moe.tiny("gpt_oss"), lora(target_parameters=["router.weight"]))
    with pytest.raises(UnsupportedError, match="as a whole, and has an adapter on a parameter of its own"):
        model.add_adapter("whole", kilotune.LoraConfig(target_modules=["q_proj"], bias="all"))
    model = kilotune.get_peft_model(moe.tiny("gpt_oss"), lora(target_modules=["q_proj"], bias="all"))
    with pytest.raises(TargetError, match="is adapted already; a module and one of its parameters cannot both be"):
        model.add_adapter("part", lora(target_parameters=["router.weight"]))
