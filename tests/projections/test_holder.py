"""The holder of the frozen matrices: one copy for all, exact in every dtype and place, in no state dict."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kilotune
from kilotune.projections.matrices import Extent, Pair, PortableSource, Projections, unit_rows
from tests.support.models import Nested

CPU, META = torch.device("cpu"), torch.device("meta")
X = torch.sin(torch.arange(24.0)).reshape(4, 6)


def vera(r: int = 4, **options: Any) -> kilotune.VeraConfig:
    return kilotune.VeraConfig(**{"r": r, "target_modules": "all-linear", **options})


def adapted(config: kilotune.VeraConfig | None = None, dtype: torch.dtype = torch.float32) -> kilotune.PeftModel:
    model = kilotune.get_peft_model(Nested().to(dtype), config or vera())
    return stirred(model, "default")


def stirred(model: kilotune.PeftModel, adapter: str) -> kilotune.PeftModel:
    with torch.no_grad():
        for i, (_, parameter) in enumerate(model.adapter_parameters(adapter)):
            parameter.copy_(torch.cos(torch.arange(parameter.numel()) + i).reshape(parameter.shape))
    return model


def factors(model: kilotune.PeftModel, adapter: str = "default") -> list[tuple[Tensor, Tensor]]:
    """(a, b) of every layer as they enter the product."""
    found = []
    for layer in model.adapted_layers().values():
        slot = layer.slot(adapter)
        if slot is not None:
            delta = slot.delta()
            assert isinstance(delta, kilotune.deltas.LowRank)
            found.append((delta.a, delta.b))
    return found


def check_one_copy(model: kilotune.PeftModel, pairs: int = 1) -> None:
    """All layers and adapters take views of the same tensors, of which there are 2 for each pair and dtype."""
    used = {
        (m.untyped_storage().data_ptr(), m.dtype)
        for name in model.peft_config
        for ab in factors(model, name)
        for m in ab
    }
    held = {(m.untyped_storage().data_ptr(), m.dtype) for m in model.projections.tensors()}
    assert used == held, f"the layers use {len(used)} tensors, the holder has {len(held)}"
    assert len(held) == 2 * pairs


def check_definition(model: kilotune.PeftModel, dtype: torch.dtype) -> None:
    """Every copy holds the bits of the definition, rounded once to ``dtype``."""
    for source, extent in model.projections.extents().items():
        assert isinstance(source, PortableSource)
        a, b, exponent = model.projections.pair(source, CPU, dtype)
        assert a.dtype == b.dtype == dtype
        for matrix, number, columns, power in ((a, 0, extent.inn, exponent), (b, 1, extent.out, 0)):
            defined = torch.from_numpy(unit_rows(source.seed, number, extent.rank, columns, shape=source.shape))
            assert torch.equal(matrix, (defined * 2.0**-power).to(dtype))


def test_one_copy_for_all_layers() -> None:
    model = adapted()
    check_one_copy(model)
    assert len(factors(model)) == 6
    assert model.projections.extents() == {PortableSource(0): Extent(4, 12, 12)}


def test_one_copy_for_adapters_of_other_ranks_and_targets() -> None:
    model = adapted(vera(4, target_modules=["up"]))
    first = factors(model)[0][0]
    expected = model(X).detach()
    model.add_adapter("large", vera(9))
    model.add_adapter("small", vera(2, target_modules=["down", "head"]))
    check_one_copy(model)
    assert model.projections.extents() == {PortableSource(0): Extent(9, 12, 12)}
    assert torch.equal(factors(model)[0][0], first)
    assert torch.equal(model(X), expected)  # growing what is shared moves nobody's output
    assert model.report().pairs == 1
    model.delete_adapter("large")
    check_one_copy(model)
    assert model.projections.extents() == {PortableSource(0): Extent(4, 12, 12)}
    assert torch.equal(model(X), expected)
    model.delete_adapter("small")
    assert model.projections.extents() == {PortableSource(0): Extent(4, 8, 12)}
    model.delete_adapter("default")
    assert model.projections.tensors() == []
    assert model.projections.owners() == []


def test_a_pair_for_each_seed_generator_and_shape() -> None:
    model = adapted(vera(3))
    model.add_adapter("seed", vera(3, projection_prng_key=1))
    assert model.report().pairs == 2
    model.add_adapter("peft", vera(3, generator="peft"))
    assert model.report().pairs == 3
    model.add_adapter("shapes", vera(3, sharing="shape"))  # (8, 6), (12, 8), (8, 12), (3, 8)
    assert model.report().pairs == 7
    check_one_copy(model, 7)


@pytest.mark.parametrize("sharing, numbers", [("nested", 4 * (12 + 12)), ("shape", 4 * (14 + 20 + 20 + 11))])
def test_the_report_counts_each_copy_once(sharing: str, numbers: int) -> None:
    model = adapted(vera(4, sharing=sharing))
    model.add_adapter("other", vera(3, sharing=sharing, target_modules=["up"]))
    report = model.report()
    assert report.frozen_shared == numbers
    parameters = sum(p.numel() for p in model.parameters())
    assert report.total == parameters + numbers
    assert report.total_bytes == 4 * report.total
    assert model.get_nb_trainable_parameters()[1] == parameters
    half = adapted(vera(4, sharing=sharing), torch.bfloat16).report()
    assert half.frozen_shared == numbers
    assert half.total_bytes == 2 * (half.frozen_base + numbers) + 4 * half.trainable


@pytest.mark.parametrize("sharing", ["nested", "shape"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_is_derived_from_the_definition(dtype: torch.dtype, sharing: str) -> None:
    model = adapted(vera(4, sharing=sharing), dtype)
    check_definition(model, dtype)
    check_one_copy(model, 4 if sharing == "shape" else 1)


MOVES: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "half": (lambda m: m.half(), torch.float16),
    "half, float": (lambda m: m.half().float(), torch.float32),
    "bfloat16, double, float": (lambda m: m.bfloat16().double().float(), torch.float32),
    "to bfloat16": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to double": (lambda m: m.to(dtype=torch.float64), torch.float64),
    "cpu": (lambda m: m.cpu(), torch.float32),
    "to nothing new": (lambda m: m.to(CPU, torch.float32), torch.float32),
}


@pytest.mark.parametrize("move, dtype", MOVES.values(), ids=MOVES)
def test_moves_keep_the_bits(move: Callable[[nn.Module], nn.Module], dtype: torch.dtype) -> None:
    model = adapted()
    move(model)
    check_definition(model, dtype)
    check_one_copy(model)
    assert {(t.device, t.dtype) for t in model.projections.tensors()} == {(CPU, dtype)}


def test_layers_of_two_dtypes_have_a_copy_each() -> None:
    base = Nested()
    base.blocks[1].to(torch.float64)
    model = kilotune.get_peft_model(base, vera())
    check_one_copy(model, 2)
    check_definition(model, torch.float32)
    check_definition(model, torch.float64)
    assert model.report().frozen_shared == 2 * 4 * 24


def test_in_no_state_dict_and_no_list_of_parameters() -> None:
    model = adapted()
    pointers = {t.untyped_storage().data_ptr() for t in model.projections.tensors()}
    everything = [*model.parameters(), *model.buffers(), *model.state_dict().values()]
    assert not pointers & {t.untyped_storage().data_ptr() for t in everything}
    assert not [key for key in model.state_dict() if "projection" in key or "vera_A" in key or "vera_B" in key]
    assert list(model.projections.state_dict()) == []
    assert list(model.projections.buffers()) == []
    assert not any(t.requires_grad for t in model.projections.tensors())


def test_a_state_dict_goes_into_another_model() -> None:
    model, other = adapted(), kilotune.get_peft_model(Nested(seed=1), vera())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))


def saved_and_loaded(model: nn.Module) -> tuple[nn.Module, int]:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    size = buffer.tell()
    buffer.seek(0)
    return torch.load(buffer, weights_only=False), size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_save_writes_no_matrices(dtype: torch.dtype) -> None:
    model = adapted(vera(512), dtype)
    again, size = saved_and_loaded(model)
    matrices = sum(t.numel() * t.element_size() for t in model.projections.tensors())
    assert size < 100_000 + sum(p.numel() * p.element_size() for p in model.parameters()) - matrices / 2
    check_definition(again, dtype)
    check_one_copy(again)
    assert torch.equal(again(X.to(dtype)), model(X.to(dtype)))
    again.add_adapter("more", vera(600))  # it is whole: it can grow
    check_one_copy(again)


def test_torch_save_keeps_stored_matrices(tmp_path: Any) -> None:
    """Matrices that came with a file have no other definition, so they travel along."""
    model = adapted(vera(5, save_projection=True))
    model.save_pretrained(tmp_path)
    loaded = kilotune.PeftModel.from_pretrained(Nested(), tmp_path)
    again, _ = saved_and_loaded(loaded)
    assert torch.equal(again(X), loaded(X))
    check_one_copy(again)


def test_deepcopy_shares_the_matrices_and_nothing_else() -> None:
    model = adapted()
    expected = model(X).detach()
    twin = copy.deepcopy(model)
    shared = {t.untyped_storage().data_ptr() for t in model.projections.tensors()}
    assert {t.untyped_storage().data_ptr() for t in twin.projections.tensors()} == shared
    check_one_copy(twin)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not own & {p.untyped_storage().data_ptr() for p in twin.parameters()}
    twin.add_adapter("large", vera(20))
    twin.half()
    assert torch.equal(model(X), expected)
    check_definition(model, torch.float32)
    check_definition(twin, torch.float16)
    twin.delete_adapter("default")
    twin.delete_adapter("large")
    check_one_copy(model)
    assert torch.equal(model(X), expected)


def test_on_meta_nothing_is_made() -> None:
    with torch.device("meta"):
        base = Nested()
    model = kilotune.get_peft_model(base, vera(1024))
    assert {t.device for t in model.projections.tensors()} == {META}
    assert model.report().frozen_shared == 1024 * 24
    assert model.report().trainable == 6 * 1024 + 8 + 2 * (12 + 8) + 3
    assert model(X.to(META)).shape == (4, 3)


def test_from_meta_to_memory() -> None:
    """to_empty gives the layers memory, and the matrices their values."""
    with torch.device("meta"):
        model = kilotune.get_peft_model(Nested(), vera())
    model.to_empty(device=CPU)
    check_definition(model, torch.float32)
    check_one_copy(model)


def test_a_copy_made_in_inference_mode_serves_training() -> None:
    model = adapted()
    model.get_base_model().double()  # behind the holder's back: the copy is derived at the first use
    with torch.inference_mode():
        model(X.double())
        model.add_adapter("larger", vera(8))
    check_definition(model, torch.float64)
    assert not any(t.is_inference() for t in model.projections.tensors())
    model.train()
    model(X.double()).sum().backward()
    assert all(p.grad is not None for _, p in model.adapter_parameters())


# -- planted faults -------------------------------------------------------------------------------------


def test_planted_a_copy_for_each_asking_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def pair(self: Projections, source: Any, device: torch.device, dtype: torch.dtype) -> Pair:
        built = source.build(self.extents()[source])
        return Pair(built.a.to(dtype), built.b.to(dtype))

    model = adapted()
    monkeypatch.setattr(Projections, "pair", pair)
    with pytest.raises(AssertionError, match="the layers use"):
        check_one_copy(model)


def test_planted_casting_the_copy_itself_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a buffer would behave: half and back loses bits."""

    def _apply(self: Projections, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Projections:
        moved = {key: Pair(fn(pair.a), fn(pair.b), pair.exponent) for key, pair in self._copies.items()}
        self._copies = {(key[0], pair.a.device, pair.a.dtype): pair for key, pair in moved.items()}
        return self

    monkeypatch.setattr(Projections, "_apply", _apply)
    model = adapted()
    model.half()
    check_definition(model, torch.float16)
    model.float()
    with pytest.raises(AssertionError):
        check_definition(model, torch.float32)
