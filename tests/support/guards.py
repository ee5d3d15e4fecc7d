"""Checks of safety and equality, as functions: the tests call them, and test_planted.py shows that each can fail."""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from kilotune import AdapterConfig, PeftModel, get_peft_model
from kilotune.model.adapter_model import AdapterModel
from kilotune.projections.matrices import Projections
from tests.support.models import bits, disk, places, randomize

Make = Callable[[], nn.Module]


def unmerging_is_exact(make: Make, config: AdapterConfig, dtype: torch.dtype) -> None:
    """Merge and unmerge give the base's very bits."""
    model = get_peft_model(make().to(dtype), config)
    randomize(model)
    before = bits(model)
    model.merge_adapter()
    assert bits(model) != before, "merging changed nothing"
    model.unmerge_adapter()
    assert bits(model) == before, "unmerging did not give the base's bits back"


def merging_is_equal(make: Make, config: AdapterConfig, x: Tensor) -> None:
    """The merged model gives the unmerged one's outputs, and so does merging with another adapter unmerged."""
    model = get_peft_model(make(), config)
    randomize(model)
    y = model(x)
    model.merge_adapter()
    assert torch.allclose(model(x), y, rtol=1e-4, atol=1e-4), "merged gives other outputs"
    assert torch.allclose(model.merge_and_unload()(x), y, rtol=1e-4, atol=1e-4), "unloaded gives other outputs"


def disabled_is_the_base(make: Make, config: AdapterConfig, x: Tensor) -> None:
    """Bit for bit, before, in and after the context, while merged, nested, and after an exception."""
    expected = make().eval()(x)
    model = get_peft_model(make().eval(), config)
    randomize(model)
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        y = model(x)
        assert not torch.equal(y, expected)
        with model.disable_adapter():
            assert torch.equal(model(x), expected), f"disabled is not the base (merged={merged})"
            with model.disable_adapter():
                assert torch.equal(model(x), expected), f"disabled twice is not the base (merged={merged})"
            assert torch.equal(model(x), expected), f"the inner context ended the outer one (merged={merged})"
        assert torch.equal(model(x), y), f"afterwards the adapter is not what it was (merged={merged})"
        try:
            with model.disable_adapter():
                raise KeyError("inside")
        except KeyError:
            pass
        assert torch.equal(model(x), y), f"after an exception the adapter is not what it was (merged={merged})"


def adapters_act(model: AdapterModel, run: Callable[[], Tensor]) -> None:
    """Each adapted layer ran: moving its parameters alone moves the output, in eval and without gradients too."""
    layers = model.adapted_layers()
    assert layers
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            before = run()
            for name, layer in layers.items():
                kept = [p.clone() for p in layer.adapters.parameters()]
                for parameter in layer.adapters.parameters():
                    parameter.add_(1.0)
                shared = {slot: slot.shared for slot in layer.adapters.children()}
                for slot, common in shared.items():  # what the model trains in one vector, moved for this layer alone
                    slot.shared = copy.copy(common)
                    slot.shared.trained = {key: p + 1.0 for key, p in common.trained.items()}
                assert not torch.equal(run(), before), f"{name}: its adapter never ran (training={training})"
                for slot, common in shared.items():
                    slot.shared = common
                for parameter, value in zip(layer.adapters.parameters(), kept):
                    parameter.copy_(value)
            assert torch.equal(run(), before)


def no_base_weight_is_copied(make: Make, config: AdapterConfig, x: Tensor) -> None:
    """Wrapping, running, saving, loading, adding and unloading leave every base weight where it lies."""
    base = make()
    where = places(base)
    model = get_peft_model(base, config)

    def held() -> dict[str, int]:
        found = {n.replace(".base_layer", "").replace(".original_module", ""): p for n, p in places(base).items()}
        return {name: place for name, place in found.items() if name in where}

    assert held() == where, "wrapping moved a base weight"
    model(x).sum().backward()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.load_adapter(folder, "loaded")
    model.add_adapter("more", config)
    model.set_adapter(["default", "loaded", "more"])
    model(x)
    assert held() == where, "adding or loading moved a base weight"
    model.merge_adapter()
    model.unmerge_adapter()
    assert held() == where, "unmerging moved a base weight"
    assert places(model.unload()) == where, "unloading moved a base weight"


def frozen_matrices_are_one(model: AdapterModel, run: Callable[[AdapterModel], Tensor]) -> None:
    """One copy of each pair, whatever is done; none of it in a state dict, a parameter list or a buffer."""
    y = run(model)
    (holder,) = (m for m in model.modules() if isinstance(m, Projections))
    held = {t.data_ptr() for t in holder.tensors()}
    assert len(held) == 2 * len(holder.extents()), "more than one copy of a pair"
    used = set()
    for layer in model.adapted_layers().values():
        for slot in layer.adapters.values():
            delta = slot.delta()
            used |= {delta.a.untyped_storage().data_ptr(), delta.b.untyped_storage().data_ptr()}
    assert used == held, "a layer uses matrices of its own"
    sizes = {tuple(t.shape) for t in holder.tensors()}
    named = {**dict(model.named_parameters()), **dict(model.named_buffers()), **model.state_dict()}
    assert not {tuple(v.shape) for v in named.values()} & sizes, "a projection is registered"
    assert not {v.data_ptr() for v in named.values()} & held, "a projection is registered"
    twin = copy.deepcopy(model)
    (twins,) = (m for m in twin.modules() if isinstance(m, Projections))
    assert {t.data_ptr() for t in twins.tensors()} <= held, "deepcopy copied the frozen matrices"
    assert torch.equal(run(twin), y)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    numbers = sum(v.numel() for v in model.state_dict().values())
    assert file.tell() < 4 * numbers + 1500 * len(model.state_dict()) + 5000


def inactive_adapters_stay(model: AdapterModel, x: Tensor, inactive: str) -> None:
    """No gradient, and bit-equal after optimizer steps with weight decay over all parameters."""
    parameters = dict(model.adapter_parameters(inactive))
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        model(x).square().sum().backward()
        for name, parameter in parameters.items():
            assert parameter.grad is None, f"{name} has a gradient"
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, before[name]), f"{name} was changed"


def saved_is_loaded(make: Make, config: AdapterConfig, x: Tensor) -> None:
    """An adapter that was saved and loaded gives the same bits, and the same files again."""
    model = get_peft_model(make(), config).eval()
    randomize(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "one")
        again = PeftModel.from_pretrained(make(), folder / "one")
        assert torch.equal(again(x), model(x)), "the loaded adapter gives other outputs"
        again.save_pretrained(folder / "two")
        one, two = (disk(folder / part)["adapter_model.safetensors"] for part in ("one", "two"))
        assert one == two, "saved again, the file differs"


def refusal_leaves_the_disk(folder: Path, save: Callable[[], object]) -> Exception:
    """``save`` must fail and leave ``folder`` as it was; returns what it raised."""
    before = disk(folder)
    try:
        save()
    except Exception as error:
        assert disk(folder) == before, "something half-written stays on disk"
        return error
    raise AssertionError("saving did not fail")
