"""The n-th adapter costs what the first does. Work is counted (calls, of Python and of C), not timed."""

from __future__ import annotations

import copy
import gc
import io
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from kilotune import (
    AdapterConfig,
    BitfitConfig,
    BottleneckConfig,
    Ia3Config,
    IntrinsicConfig,
    LoraConfig,
    LoraXsConfig,
    PeftModel,
    UniLoraConfig,
    VeraConfig,
    get_peft_model,
)
from kilotune.layers.adapted import AdaptedLayer
from kilotune.model.adapter_model import AdapterModel
from kilotune.projections.matrices import Extent, PortableSource, Projections
from kilotune.storage.dense import Dense
from tests.support import moe
from tests.support.models import Block, Nested, tiny_classifier, tiny_llama

FEW, MANY = 3, 60
LINEAR: dict[str, Any] = {"target_modules": "all-linear"}
LORA, VERA = LoraConfig(r=2, **LINEAR), VeraConfig(r=4, **LINEAR)
X = torch.linspace(-1, 1, 24).view(4, 6)
CPU = torch.device("cpu")


def calls(act: Callable[[], Any]) -> Counter[str]:
    """How often each function was called, by Python code; generators count once for each item."""
    found: Counter[str] = Counter()

    def note(frame: Any, event: str, arg: Any) -> None:
        if event == "call":
            found[frame.f_code.co_name] += 1
        elif event == "c_call":
            found[getattr(arg, "__name__", "?")] += 1

    before, collecting = sys.getprofile(), gc.isenabled()
    gc.disable()  # what it frees, and when, is no work of ours
    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(before)
        if collecting:
            gc.enable()
    return found


def differences(few: Mapping[str, Counter[str]], many: Mapping[str, Counter[str]]) -> dict[str, dict[str, Any]]:
    """The functions that were not called equally often, by what was done."""
    assert few.keys() == many.keys()
    found = {}
    for what, few_calls in few.items():
        both = {name: (few_calls[name], many[what][name]) for name in few_calls | many[what]}
        found[what] = {name: counts for name, counts in both.items() if counts[0] != counts[1]}
    return {what: unlike for what, unlike in found.items() if unlike}


class Case(NamedTuple):
    """A base model, and the configuration of the adapter number i."""

    base: Callable[[], nn.Module]
    config: Callable[[int], AdapterConfig]


def always(config: AdapterConfig) -> Callable[[int], AdapterConfig]:
    return lambda i: config


def encoder() -> nn.Module:
    """Torch's own encoder, whose fast path is turned off while adapters are in it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Head(nn.Module):
    """A bias of its own, and a layer with another."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(3))
        self.decoder = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x) + self.bias


def headed() -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), Head())


def turns(*configs: AdapterConfig) -> Callable[[int], AdapterConfig]:
    return lambda i: configs[i % len(configs)]


BLOCK = BottleneckConfig(width=2, target_modules=["blocks.0", "blocks.1.mix.up"])
CASES = {
    "vera": Case(Nested, always(VERA)),
    "vera, a seed each": Case(Nested, lambda i: VERA.replace(projection_prng_key=i)),
    "vera, a pair for each shape": Case(Nested, always(VERA.replace(sharing="shape"))),
    "vera in dora": Case(Nested, always(VERA.replace(use_dora=True))),
    "lora": Case(tiny_llama, always(LORA)),
    "lora, all biases": Case(tiny_classifier, always(LORA.replace(bias="all"))),
    "lora and a head": Case(Nested, always(LORA.replace(target_modules=["stem"], modules_to_save=["head"]))),
    "lora in an encoder": Case(encoder, always(LORA.replace(target_modules=["self_attn", "linear1"]))),
    "ia3": Case(Nested, always(Ia3Config(target_modules=["stem", "up"], feedforward_modules=["up"]))),
    "lora-xs": Case(Nested, always(LoraXsConfig(r=2, **LINEAR))),
    "uni-lora": Case(Nested, always(UniLoraConfig(r=2, theta_d_length=16, **LINEAR))),
    "intrinsic": Case(Nested, always(IntrinsicConfig(d=8, **LINEAR))),
    "bitfit": Case(tiny_classifier, always(BitfitConfig())),
    "a bias around a layer": Case(headed, always(BitfitConfig())),
    "blocks around layers": Case(Nested, turns(LORA, BLOCK, BLOCK)),
    "experts": Case(
        lambda: moe.net("mixtral"), always(LoraConfig(r=2, target_modules=[], target_parameters=["gate_up_proj"]))
    ),
}


def name_of(i: int) -> str:
    return f"a{i:04}"  # all of one length, for the check goes through the letters


def work(case: Case, there: int, folder: Path) -> dict[str, Counter[str]]:
    """What one more adapter costs where ``there`` are, and changes between them, by what is done."""
    model = get_peft_model(case.base(), case.config(0), name_of(0))
    model.load_adapter(folder, "loaded")  # puts the model into eval mode
    for i in range(1, there - 1):
        model.add_adapter(name_of(i), case.config(i))
    model.set_adapter(name_of(1))
    new = case.config(there)
    found = {
        "add": calls(lambda: model.add_adapter("added", new)),
        "load": calls(lambda: model.load_adapter(folder, "again")),
        "switch": calls(lambda: model.set_adapter("added")),
        "delete": calls(lambda: model.delete_adapter("again")),
        "delete the active one": calls(lambda: model.delete_adapter("added")),
    }
    assert len(model.peft_config) == there
    assert model.active_adapters == [name_of(0)]
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_nth_adapter_costs_what_the_third_does(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    get_peft_model(case.base(), case.config(0)).save_pretrained(tmp_path)
    work(case, FEW, tmp_path)  # what Python and torch do only once
    few, many = work(case, FEW, tmp_path), work(case, MANY, tmp_path)
    assert differences(few, many) == {}
    assert min(sum(count.values()) for count in few.values()) > 100, "the counter saw nothing"


def over_all(self: AdapterModel, train: bool) -> None:
    for name, installed in self._installed.items():
        for _, parameter in installed.parameters():
            parameter.requires_grad_(name in self._state.active)


def load_and_eval(real: Any) -> Any:
    def load_adapter(self: AdapterModel, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        self.eval()

    return load_adapter


def settle_all(self: Projections, before: Any, now: Any) -> None:
    self._extents = {}
    for needs in self._needs.values():
        for source, extent in needs.items():
            self._extents[source] = self._extents.get(source, extent).union(extent)


@pytest.mark.parametrize(
    ("case", "owner", "attribute", "planted", "where"),
    [
        ("vera", AdapterModel, "_set_requires_grad", over_all, {"switch", "delete the active one"}),
        ("vera", AdapterModel, "load_adapter", load_and_eval(AdapterModel.load_adapter), {"load"}),
        ("vera", Projections, "_recount", settle_all, {"add", "load", "delete"}),
        ("vera", "kilotune.model.adapter_model", "own_modules", nn.Module.modules, {"add", "load"}),
        ("intrinsic", "kilotune.model.adapter_model", "base_modules", nn.Module.modules, {"load"}),
        ("blocks around layers", "kilotune.kinds.block", "base_modules", nn.Module.modules, {"add"}),
        ("a bias around a layer", "kilotune.injection.targets", "base_modules", nn.Module.modules, {"add", "load"}),
    ],
)
def test_planted_work_on_every_adapter_is_found(
    case: str,
    owner: Any,
    attribute: str,
    planted: Any,
    where: set[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    whole = CASES[case]
    get_peft_model(whole.base(), whole.config(0)).save_pretrained(tmp_path)
    monkeypatch.setattr(sys.modules[owner] if isinstance(owner, str) else owner, attribute, planted)
    work(whole, FEW, tmp_path)
    assert where <= differences(work(whole, FEW, tmp_path), work(whole, MANY // 3, tmp_path)).keys()


# -- gradients and modes ---------------------------------------------------------------------------


def trained(model: AdapterModel) -> dict[str, tuple[bool, bool]]:
    """For each adapter: whether any parameter wants a gradient, and whether any has one."""
    own = {name: [p for _, p in model.adapter_parameters(name)] for name in model.peft_config}
    return {n: (any(p.requires_grad for p in ps), any(p.grad is not None for p in ps)) for n, ps in own.items()}


def several(count: int = 4) -> PeftModel:
    model = get_peft_model(Nested(), LORA, "a")
    for name in "bcdefgh"[: count - 1]:
        model.add_adapter(name, VERA if name in "bd" else LORA)
    return model


OFF, ON, RUN = (False, False), (True, False), (True, True)


def test_only_the_active_adapters_have_gradients() -> None:
    model = several()
    assert trained(model) == {"a": ON, "b": OFF, "c": OFF, "d": OFF}
    before = ""
    for wanted in ("b", "cd", "ad", "a", "a"):  # what stays active keeps its gradients
        model.set_adapter(list(wanted))
        assert trained(model) == {n: OFF if n not in wanted else RUN if n in before else ON for n in "abcd"}
        model(X).sum().backward()
        assert trained(model) == {n: RUN if n in wanted else OFF for n in "abcd"}
        before = wanted
    model.delete_adapter("a")
    assert trained(model) == {"b": ON, "c": OFF, "d": OFF}


def test_a_gradient_of_a_graph_from_before_the_switch_goes_nowhere() -> None:
    model = several()
    out = model(X).sum()
    model.set_adapter("b")
    (out + model(X).sum()).backward()
    assert trained(model) == {"a": OFF, "b": RUN, "c": OFF, "d": OFF}


def test_a_switch_after_unfreezing_the_whole_model_freezes_the_other_adapters() -> None:
    model = several()
    assert model.requires_grad_(True) is model
    assert set(trained(model).values()) == {ON}
    model.set_adapter("c")
    assert trained(model) == {"a": OFF, "b": OFF, "c": ON, "d": OFF}
    model.requires_grad_(False)
    model.delete_adapter("b")
    model.add_adapter("b", VERA)
    assert trained(model) == {"a": OFF, "c": OFF, "d": OFF, "b": OFF}  # another one's end trains nobody
    model.set_adapter("c")
    assert trained(model) == {"a": OFF, "c": ON, "d": OFF, "b": OFF}


def test_a_copy_switches_as_its_model_does() -> None:
    model = several()
    model.requires_grad_(True)
    twin = copy.deepcopy(model)
    twin.set_adapter("b")
    assert trained(twin) == {"a": OFF, "b": ON, "c": OFF, "d": OFF}
    assert set(trained(model).values()) == {ON}


def test_loading_for_inference_puts_all_of_the_model_into_eval_mode(tmp_path: Path) -> None:
    several().save_pretrained(tmp_path)
    model = several()
    assert all(module.training for module in model.modules())
    model.load_adapter(tmp_path / "b", "e", is_trainable=True)
    assert all(module.training for module in model.modules())
    model.load_adapter(tmp_path / "b", "f")
    assert not any(module.training for module in model.modules())
    base: Any = model.model
    inner = (base.blocks[1], base.blocks[0].mix["up"], base.stem.base_layer, model.projections)
    for i, module in enumerate(inner):  # one part alone
        module.train()
        model.load_adapter(tmp_path / "b", f"g{i}")
        assert not any(module.training for module in model.modules())


# -- a base that changes under its adapters --------------------------------------------------------


def test_an_adapter_goes_into_the_base_as_it_is_now() -> None:
    """Modules put in, taken out and replaced between two adapters: the new one is where a fresh model has it."""
    torch.manual_seed(5)
    new, block = nn.Linear(8, 3), Block(8, 12)
    model = several(2)
    base: Any = model.model
    base.head = new  # in the place of a wrapper, adapters and all
    base.blocks.append(block)
    base.blocks[0].mix["up"].base_layer = nn.Linear(8, 12)
    del base.blocks[1]
    config = LORA.replace(init_lora_weights=False)
    torch.manual_seed(6)
    model.add_adapter("new", config)
    model.set_adapter("new")
    bare = copy.deepcopy(model).unload()
    torch.manual_seed(6)
    fresh = get_peft_model(bare, config, "new")
    assert model.installed("new").layers.keys() == fresh.installed("new").layers.keys()
    assert "blocks.1.mix.down" in model.installed("new").layers
    assert torch.equal(model(X), fresh(X))
    assert not torch.equal(model(X), bare_output(model))
    for name in ("a", "b"):
        model.set_adapter(name)
        assert torch.isfinite(model(X)).all()


def bare_output(model: AdapterModel) -> Tensor:
    with model.disable_adapter():
        out: Tensor = model(X)
    return out


def test_every_layer_of_the_base_is_prepared_whenever_an_adapter_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that came later, too, and those inside modules that are saved whole; each once, and no adapter's."""
    prepared: list[nn.Module] = []
    monkeypatch.setattr(Dense, "prepare", lambda self, module: prepared.append(module))
    config = LORA.replace(target_modules=["stem"], modules_to_save=["blocks.1"])
    model = get_peft_model(Nested(), config, "a")
    plain = [m for m in Nested().modules() if isinstance(m, (nn.Linear, nn.LayerNorm))]
    assert len(prepared) == len(plain) == len({id(m) for m in prepared})
    first = list(prepared)
    later = nn.Linear(2, 2)
    model.model.later = later
    prepared.clear()
    model.add_adapter("b", config)
    assert {id(m) for m in prepared} == {id(m) for m in (*first, later)}
    assert len(prepared) == len(first) + 1


# -- the holder of the frozen matrices -------------------------------------------------------------


def holder(owners: int) -> tuple[Projections, list[PortableSource]]:
    """Each owner needs one source of its own, in its own size, and one that all have."""
    held, sources = Projections(), [PortableSource(seed) for seed in range(owners)]
    for i, source in enumerate(sources):
        held.require(f"{i}", {source: Extent(2, 3, 4), PortableSource(10**6): Extent(2 + i, 8, 8)})
        held.pair(source, CPU, torch.float32)
        held.pair(PortableSource(10**6), CPU, torch.float64)
    held.require("largest", {PortableSource(10**6): Extent(100, 9, 9)})
    return held, sources


def test_what_the_holder_does_for_one_adapter_does_not_grow_with_the_others() -> None:
    def act(held: Projections, sources: list[PortableSource]) -> dict[str, Counter[str]]:
        shared = PortableSource(10**6)
        return {
            "require": calls(
                lambda: held.require("x", {shared: Extent(1, 8, 8), PortableSource(7**9): Extent(2, 2, 2)})
            ),
            "again": calls(lambda: held.require("x", {shared: Extent(101, 8, 8), sources[1]: Extent(2, 2, 2)})),
            "shrink": calls(lambda: held.release("x")),
            "release": calls(lambda: held.release("1")),
        }

    act(*holder(FEW))
    assert differences(act(*holder(FEW)), act(*holder(MANY))) == {}


@pytest.mark.parametrize("seed", range(4))
def test_extents_and_copies_are_those_of_all_owners_together(seed: int) -> None:
    """Against the union computed anew after each step, through copies and pickles as well."""
    rng, held = random.Random(seed), Projections()
    needs: dict[str, dict[Any, Extent]] = {}
    used: set[tuple[Any, torch.dtype]] = set()
    for step in range(60):
        owner = rng.choice("abcdef")
        if rng.random() < 0.4:
            needs.pop(owner, None)
            held.release(owner)
        else:
            chosen = rng.sample([PortableSource(i) for i in range(4)], rng.randint(0, 3))
            needs[owner] = {s: Extent(*(rng.randint(1, 5) for _ in range(3))) for s in chosen}
            held.require(owner, needs[owner])
        wanted: dict[Any, Extent] = {}
        for source, extent in (item for own in needs.values() for item in own.items()):
            wanted[source] = Extent(*map(max, wanted.get(source, extent), extent))
        assert held.extents() == wanted
        used = {(s, dtype) for s, dtype in used if s in wanted}
        assert {(s, dtype) for s, _, dtype in held._copies} == used, "what was in use stays ready"
        if wanted:
            used.add((rng.choice(sorted(wanted, key=str)), rng.choice([torch.float32, torch.float64])))
        for source, dtype in used:
            pair = held.pair(source, CPU, dtype)
            assert (pair.a.shape, pair.b.shape) == (wanted[source][:2], wanted[source][::2])
            assert torch.equal(pair.a, source.build(wanted[source]).a.to(dtype) * 2.0**-pair.exponent)
        if step % 20 == 7:
            held = copy.deepcopy(held)
        if step % 20 == 17:
            file = io.BytesIO()
            torch.save(held, file)
            held = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert used


def test_layers_that_are_passed_over_are_there_for_torch() -> None:
    """What adapters added is left out by our own walks only: parameters, state dict and moves know it."""
    model = several(3)
    layer = model.model.get_submodule("stem")
    assert isinstance(layer, AdaptedLayer)
    names = {"a", "b", "c"}
    assert {key.split(".")[3] for key in model.state_dict() if ".stem.adapters." in key} == names
    assert {key.split(".")[3] for key, _ in model.named_parameters() if ".stem.adapters." in key} == names
    assert {p.dtype for p in layer.to(torch.float64).adapters.parameters()} == {torch.float64}
