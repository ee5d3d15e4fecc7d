"""Properties over drawn shapes, ranks, targets, seeds and orders of calls."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kilotune import AdapterConfig, KilotuneError, LoraConfig, PeftModel, VeraConfig, get_peft_model
from kilotune.adapter_files.fitting import OtherBaseWarning
from kilotune.adapter_files.peft_layout import BASE
from kilotune.adapter_files.reading import open_adapter
from kilotune.projections.matrices import Extent
from tests.support.models import Nested, bits, mlp, randomize

sizes = st.integers(1, 40)
ranks = st.integers(1, 50)
seeds = st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1))
NAMES = ["stem", "up", "down", "head", "blocks.0.mix.up", "mix.down"]
targets = st.one_of(
    st.just("all-linear"), st.lists(st.sampled_from(NAMES), min_size=1, unique=True), st.just(r".*\.(up|down)")
)


@st.composite
def configs(draw: st.DrawFn, where: Any = targets) -> AdapterConfig:
    target = draw(where)
    if draw(st.booleans()):
        return LoraConfig(
            r=draw(ranks),
            lora_alpha=draw(st.floats(0.1, 4)),
            use_rslora=draw(st.booleans()),
            target_modules=target,
            bias=draw(st.sampled_from(["none", "all", "lora_only"])),
        )
    return VeraConfig(
        r=draw(ranks),
        projection_prng_key=draw(seeds),
        target_modules=target,
        sharing=draw(st.sampled_from(["nested", "shape"])),
        bias=draw(st.sampled_from(["none", "all", "vera_only"])),
    )


def deep(sizes: list[int], bias: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(inn, out, bias=bias) for inn, out in itertools.pairwise(sizes)))


@given(st.lists(sizes, min_size=2, max_size=5), st.booleans(), configs(st.just("all-linear")), st.integers(0, 5))
def test_any_shape_starts_at_the_base_merges_counts_and_comes_back(
    shape: list[int], bias: bool, config: AdapterConfig, batch: int
) -> None:
    base, plain = deep(shape, bias), deep(shape, bias)
    x = torch.randn(batch, shape[0])
    model = get_peft_model(base, config)
    torch.testing.assert_close(model(x), plain(x))
    layers = list(itertools.pairwise(shape))
    rank = config.r  # type: ignore[attr-defined]
    count = sum(rank * (inn + out) if isinstance(config, LoraConfig) else rank + out for inn, out in layers)
    count += sum(shape[1:]) if bias and config.bias != "none" else 0
    assert model.get_nb_trainable_parameters() == (count, count + sum(p.numel() for p in plain.parameters()))
    model.double()
    randomize(model)
    y = model(x.double())
    model.merge_adapter(safe_merge=True)
    scale = 1 + float(y.detach().abs().max()) if batch else 1.0
    torch.testing.assert_close(model(x.double()), y, rtol=1e-9, atol=1e-10 * scale)
    model.unmerge_adapter()
    assert bits(model.unload()) == bits(plain.double())


@given(configs(), configs(), st.integers(0, 3))
def test_two_adapters_of_any_kind_live_together(one: AdapterConfig, two: AdapterConfig, action: int) -> None:
    x = torch.linspace(-1, 1, 12).view(2, 6)
    torch.manual_seed(0)
    model = get_peft_model(Nested(), one, "one")
    model.add_adapter("two", two)
    randomize(model, "one", seed=1)
    randomize(model, "two", seed=2)
    outputs = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        outputs[name] = model(x)
    if action == 0:
        model.delete_adapter("two")
    elif action == 1:
        model.merge_adapter()
        model.unmerge_adapter()
        model.set_adapter("one")
    elif action == 2:
        model.half()
        model.float()
        model.set_adapter("one")
        torch.testing.assert_close(model(x), outputs["one"], rtol=0.1, atol=0.1 * float(outputs["one"].abs().max()))
        return
    else:
        model.add_adapter("three", two.replace(r=60))
        model.set_adapter("one")
    assert torch.equal(model(x), outputs["one"])
    with model.disable_adapter():
        assert torch.equal(model(x), Nested()(x))


@given(configs())
@settings(max_examples=15)
def test_any_adapter_is_saved_and_loaded_with_its_bits(
    tmp_path_factory: pytest.TempPathFactory, config: AdapterConfig
) -> None:
    x, folder = torch.linspace(-1, 1, 12).view(2, 6), tmp_path_factory.mktemp("adapter")
    model = get_peft_model(Nested(), config)
    randomize(model)
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(Nested(), folder, is_trainable=True)
    assert torch.equal(again(x), model(x))
    assert again.peft_config == model.peft_config


@given(seeds, ranks, ranks, sizes, sizes, sizes)
def test_matrices_of_other_ranks_and_shapes_are_prefixes(
    seed: int, small: int, large: int, inn: int, out: int, more: int
) -> None:
    """What two VeRA adapters of one seed use of the shared matrices is a corner of the larger one's."""
    small, large = sorted((small, large))
    lone = get_peft_model(
        nn.Sequential(nn.Linear(inn, out)), VeraConfig(r=small, projection_prng_key=seed, target_modules=["0"])
    )
    wide = get_peft_model(
        nn.Sequential(nn.Linear(inn + more, out + more)),
        VeraConfig(r=large, projection_prng_key=seed, target_modules=["0"]),
    )
    (a, b), (big_a, big_b) = ([t.numpy() for t in m.projections.tensors()] for m in (lone, wide))
    powers = [
        next(iter(m.projections.extents())).exponent(Extent(0, n, 0)) for m, n in ((lone, inn), (wide, inn + more))
    ]
    a, big_a = a * 2.0 ** powers[0], big_a * 2.0 ** powers[1]  # exact
    assert np.array_equal(a, big_a[:small, :inn])
    assert np.array_equal(b, big_b[:small, :out])
    assert (np.abs(big_a) <= 1).all()
    assert np.array_equal(big_a * 2.0**23, np.round(big_a * 2.0**23))  # on the grid of 2^-23


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=6), st.data())
def test_any_order_of_merging_ends_at_the_same_bits(order: list[str], data: st.DataObject) -> None:
    """Merging one by one, in any order, with refusals between, equals merging at once; unmerging gives the base."""
    torch.manual_seed(0)
    model = get_peft_model(mlp(), VeraConfig(r=3, target_modules=["0"]), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules="all-linear"))
    model.add_adapter("c", LoraConfig(r=3, target_modules=["2"], bias="all"))
    for seed, name in enumerate("abc"):
        randomize(model, name, seed=seed)
    merged: list[str] = []
    for name in order:
        if name in merged:
            with pytest.raises(KilotuneError, match="merged already"):
                model.merge_adapter([name])
        else:
            model.merge_adapter([name])
            merged.append(name)
    assert model.merged_adapters == sorted(merged)
    if merged:
        after = bits(model)
        model.unmerge_adapter()
        model.merge_adapter(merged)
        assert bits(model) == after
        model.unmerge_adapter()
    assert bits(model.unload()) == bits(mlp())


@pytest.mark.full
@given(st.data())
@settings(max_examples=300)
def test_no_change_of_a_few_bytes_gets_through(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A file with random bytes changed is refused by one of our errors, or holds what was written."""
    folder = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    model = get_peft_model(mlp(), VeraConfig(r=3, target_modules="all-linear", init_weights=False))
    model.save_pretrained(folder)
    name = data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    header = open_adapter(folder).metadata
    raw = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(raw)
    try:
        file = open_adapter(folder)
    except KilotuneError:
        return
    for key, value in file.tensors.items():
        assert value.dtype.is_floating_point, key
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", OtherBaseWarning)
            again = PeftModel.from_pretrained(mlp(), folder)
    except KilotuneError:
        return
    except OtherBaseWarning:  # told, and rightly: what the base is known by is not what was written
        assert file.metadata[BASE] != header[BASE]
        return
    assert again(torch.ones(4, 6)).shape == (4, 3)
