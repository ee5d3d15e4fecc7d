"""Joint training: every adapter is what it would be alone, whatever company it kept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kilotune import AdapterConfig, LoraConfig, VeraConfig, get_config, get_peft_model, methods
from kilotune.errors import ConfigError, MergeError, UnsupportedError
from kilotune.fleet import FleetSettings, JointTraining, User, fit, wrap
from kilotune.model.last_blocks import in_last_blocks
from tests.support.fleet_support import Kept, Row, alone, furthest, padded, points, stacked, tensors_of, token_rows
from tests.support.models import Nested, bits, tiny_gpt2, tiny_llama

ALL = "all-linear"
VERA = VeraConfig(r=6, target_modules=ALL)
METHODS: dict[str, AdapterConfig] = {
    "vera": VERA,
    "vera-random-start": VeraConfig(r=6, target_modules=ALL, init_weights=False),
    "vera-bias": VeraConfig(r=6, target_modules=ALL, bias="all"),
    "lora": LoraConfig(r=3, target_modules=ALL),
    "dora": LoraConfig(r=3, target_modules=ALL, use_dora=True),
    "lora-fa": get_config("lora_fa", r=3, target_modules=ALL),
    "ia3": get_config("ia3", target_modules=["up", "down"], feedforward_modules=["down"]),
    "bitfit": get_config("bitfit", target_modules=["stem", "up", "head"]),
    "bottleneck": get_config("bottleneck", target_modules=["mix.up", "mix.down"]),
    "unilora": get_config("unilora", r=3, theta_d_length=32, target_modules=ALL),
    "unilora-dora": get_config("unilora", r=3, theta_d_length=32, target_modules=ALL, use_dora=True),
    "vblora": get_config("vblora", r=2, num_vectors=5, vector_length=2, target_modules=["stem", "up"]),
    "intrinsic": get_config("intrinsic", d=32, target_modules=ALL),
    "intrinsic-said": get_config("intrinsic", d=32, target_modules=ALL, structure="said"),
}
UNI = METHODS["unilora"]
# Every other method that is listed, as its class says.
METHODS |= {
    name: get_config(name, **{**method.example, "target_modules": ALL})
    for name, method in methods.METHODS.items()
    if name not in METHODS
}
TIGHT = 1e-9  # in float64
SETTINGS = FleetSettings(
    batch_size=3,
    users_per_step=3,
    epochs=3,
    learning_rate=0.02,
    warmup=2,
    max_grad_norm=0.5,
    weight_decay=0.1,
    only_gains=False,
)


def group(count: int = 5) -> list[User]:
    """Users with data of different sizes, some with validation."""
    users = []
    for i in range(count):
        validation = points(4, 100 + i) if i % 2 else None
        users.append(User(f"u{i}", points(5 + 2 * i, i), validation, seed=10 + i))
    return users


def double(base: Any) -> Any:
    return base.double().eval()


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_each_is_what_its_lone_twin_is(config: AdapterConfig) -> None:
    kept, users = Kept(), group()
    report = fit(double(Nested()), config, users, SETTINGS, collate=stacked, loss="classification", sink=kept)
    assert {user.ended for user in report.users} == {"done"}, report
    for user in users:
        model, seen = alone(double(Nested()), config, user, SETTINGS, stacked)
        assert furthest(kept.adapters[user.name], tensors_of(model)) < TIGHT, user.name
        assert [loss for _, loss in report[user.name].validation] == pytest.approx(seen, abs=TIGHT)
        torch.manual_seed(user.seed or 0)
        begun = get_peft_model(double(Nested()), config)
        assert furthest(kept.adapters[user.name], tensors_of(begun)) > 1e-3, "nothing was learned"


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(
    "changes",
    [
        {"max_grad_norm": None, "warmup": 0.2, "weight_decay": 0.0},
        {"max_steps": 7, "betas": (0.8, 0.95), "eps": 1e-4},
        {"epochs": 1.5, "eval_every": 2, "keep_best": False},
    ],
)
def test_settings_mean_what_they_mean_alone(schedule: str, changes: dict[str, Any]) -> None:
    kept, users, settings = Kept(), group(3), SETTINGS.replace(schedule=schedule, **changes)
    fit(double(Nested()), VERA, users, settings, collate=stacked, loss="classification", sink=kept)
    for user in users:
        model, _ = alone(double(Nested()), VERA, user, settings, stacked)
        assert furthest(kept.adapters[user.name], tensors_of(model)) < TIGHT, user.name


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("config", [VERA, LoraConfig(r=2, target_modules=ALL), UNI], ids=["vera", "lora", "unilora"])
def test_language_models_with_padding(make: Any, config: AdapterConfig) -> None:
    users = [User(f"u{i}", token_rows(4 + i, i, longest=4 + 3 * i), seed=i) for i in range(3)]
    kept = Kept()
    fit(double(make()), config, users, SETTINGS, collate=padded, sink=kept)
    for user in users:
        model, _ = alone(double(make()), config, user, SETTINGS, padded)
        assert furthest(kept.adapters[user.name], tensors_of(model)) < TIGHT, user.name


@pytest.mark.parametrize("users_per_step", [1, 2, 5])
@pytest.mark.parametrize("capacity", [None, 5])
def test_company_and_order_do_not_matter(users_per_step: int, capacity: int | None) -> None:
    whole, other = Kept(), Kept()
    run = partial(fit, config=VERA, collate=stacked, loss="classification")
    run(double(Nested()), users=group(), settings=SETTINGS, sink=whole)
    settings = SETTINGS.replace(users_per_step=users_per_step, capacity=capacity)
    run(double(Nested()), users=iter(group()[::-1]), settings=settings, sink=other)
    for name, tensors in whole.adapters.items():
        assert furthest(tensors, other.adapters[name]) < TIGHT, name


def test_patience_ends_a_user_as_alone_and_the_best_is_kept() -> None:
    settings = SETTINGS.replace(epochs=30, learning_rate=0.3, patience=2, schedule="constant", max_grad_norm=None)
    kept, users = Kept(), [User(f"u{i}", points(6, i), points(6, 50 + i), seed=i) for i in range(4)]
    report = fit(double(Nested()), VERA, users, settings, collate=stacked, loss="classification", sink=kept)
    assert "stopped early" in {user.ended for user in report.users}
    for user in users:
        model, seen = alone(double(Nested()), VERA, user, settings, stacked)
        assert len(report[user.name].validation) == len(seen)
        assert furthest(kept.adapters[user.name], tensors_of(model)) < 1e-7, user.name
        best = min(report[user.name].validation, key=lambda pair: pair[1])
        assert report[user.name].best_step == best[0]


def mask_again(x: Tensor, seed: int, step: int, layer: int, p: float) -> Tensor:
    """The documented dropout, in numpy: words of Philox with the key (seed, 8), their low halves first."""
    rows = []
    for row, values in enumerate(x):
        words = np.random.Philox(key=[seed, 8], counter=[0, row, step, 1 + layer]).random_raw(values.numel())
        halves = [half for word in words for half in (int(word) & 0xFFFFFFFF, int(word) >> 32)]
        kept = [half >= round(p * 2**32) for half in halves[: values.numel()]]
        rows.append(values * torch.tensor(kept).view(values.shape) / (1 - p))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["vera", "dora", "bottleneck", "unilora"])
def test_dropout_does_not_depend_on_company(name: str) -> None:
    option = next(key for key in METHODS[name].to_dict() if key.endswith("dropout"))
    config = METHODS[name].replace(**{option: 0.3})
    kept, users = Kept(), group(3)
    fit(double(Nested()), config, users, SETTINGS, collate=stacked, loss="classification", sink=kept)

    def prepare(user: User, model: Any, step: int) -> None:
        for number, slot in enumerate(model.installed("default").slots().values()):
            slot.train()
            slot.dropper = partial(mask_again, seed=user.seed, step=step, layer=number, p=0.3)

    for user in (users[0], users[2]):  # without validation, which runs without dropout
        model, _ = alone(double(Nested()), config, user, SETTINGS, stacked, partial(prepare, user))
        assert furthest(kept.adapters[user.name], tensors_of(model)) < TIGHT, user.name


def test_dropout_on_padded_tokens_and_left_padding() -> None:
    config = VERA.replace(vera_dropout=0.2)
    users = [User(f"u{i}", token_rows(4, i, longest=4 + 4 * i), seed=i) for i in range(2)]
    together, apart = Kept(), Kept()
    fit(double(tiny_llama()), config, users, SETTINGS, collate=padded, sink=together)
    fit(double(tiny_llama()), config, users, SETTINGS.replace(users_per_step=1), collate=padded, sink=apart)
    assert furthest(together.adapters["u0"], apart.adapters["u0"]) < TIGHT

    def left(rows: Sequence[Row]) -> dict[str, Tensor]:
        return {key: value.flip(1) for key, value in padded(rows).items()}

    with pytest.raises(UnsupportedError, match="padded on the right"):
        fit(double(tiny_llama()), config, users, SETTINGS, collate=left, sink=Kept())


def test_the_model_is_what_it_was() -> None:
    base = Nested().train()
    before = bits(base)
    base.stem.bias.requires_grad_(False)
    base.blocks[0].eval()
    fit(base, VERA, group(2), SETTINGS, collate=floats, loss="classification", sink=Kept())
    assert bits(base) == before
    assert type(base.stem) is torch.nn.Linear
    assert base.training
    assert not base.blocks[0].training
    assert base.head.weight.requires_grad
    assert not base.stem.bias.requires_grad


def floats(rows: Sequence[Row]) -> dict[str, Tensor]:
    batch = stacked(rows)
    return {**batch, "inputs": batch["inputs"].float()}


def fitted(model: Any) -> dict[str, dict[str, Tensor]]:
    kept, config = Kept(), LoraConfig(r=2, target_modules=ALL)
    fit(model, config, group(2), SETTINGS, collate=floats, loss="classification", sink=kept)
    return kept.adapters


def test_a_wrapped_model_and_its_own_adapter_stay() -> None:
    model = get_peft_model(Nested(), VERA)
    model.set_adapter([])
    before = bits(model)
    fitted(model)
    assert bits(model) == before
    model.set_adapter("default")
    assert all(p.requires_grad for _, p in model.adapter_parameters())
    fit(wrap(Nested()), VERA, group(1), SETTINGS, collate=floats, loss="classification", sink=Kept())


def test_an_active_adapter_is_not_passed_over_without_a_word() -> None:
    """Users' adapters were trained on the bare base, and belonged to another model than the one that was given."""
    model = get_peft_model(Nested(), LoraConfig(r=2, target_modules=ALL, init_lora_weights=False))
    with pytest.raises(ConfigError, match=r"\['default'\] are active, .* on='default'; .* set_adapter\(\[\]\)"):
        fitted(model)
    with model.disable_adapter(), pytest.raises(MergeError, match="cannot train users' adapters inside disable"):
        fitted(model)
    model.set_adapter([])
    bare = fitted(model)
    for user, tensors in fitted(Nested()).items():
        for key, value in tensors.items():
            assert torch.equal(value, bare[user][key])


def test_faults_of_settings_come_together() -> None:
    with pytest.raises(ConfigError, match="batch_size.*\n.*betas") as caught:
        FleetSettings(batch_size=0, betas=(0.9, 1.0))
    assert "below 1" in str(caught.value)
    with pytest.raises(ConfigError, match="Did you mean 'users_per_step'"):
        FleetSettings(users_per_steps=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"capacity: 2 is less than .*users_per_step, 8"):
        FleetSettings(users_per_step=8, capacity=2)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (VeraConfig(r=2, target_modules=["stem"], modules_to_save=["head"]), "whole modules"),
    ],
    ids=["head"],
)
def test_what_does_not_stack_is_refused(config: AdapterConfig, why: str) -> None:
    base = Nested()
    with pytest.raises(UnsupportedError, match=why):
        fit(base, config, group(1), SETTINGS, collate=stacked, loss="classification", sink=Kept())
    assert type(base.stem) is torch.nn.Linear


def test_a_training_runs_once() -> None:
    training = JointTraining(Nested(), VERA, SETTINGS, collate=floats, loss="classification", sink=Kept())
    training.run(group(1))
    with pytest.raises(ConfigError, match="runs once"):
        training.run()


# -- the last blocks alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("config", [VERA, METHODS["lora"]], ids=["vera", "lora"])
def test_last_blocks_give_what_all_blocks_give_where_only_those_are_adapted(config: AdapterConfig) -> None:
    """What enters them is kept; a user alone, with these layers named, runs all blocks each time."""
    users = [User(f"u{i}", token_rows(5 + i, i), token_rows(3, 50 + i), seed=i) for i in range(3)]
    kept, base = Kept(), double(tiny_llama(layers=4))
    ran: list[int] = []
    base.model.layers[0].mlp.register_forward_hook(lambda _, args, output: ran.append(output.shape[0]))
    fit(base, config, users, SETTINGS.replace(last_blocks=2), collate=padded, sink=kept)
    rows = sum(len(user.data) + len(user.validation or ()) for user in users)
    assert len(ran) < rows
    narrow = in_last_blocks(tiny_llama(layers=4), config, 2)
    for user in users:
        model, _ = alone(double(tiny_llama(layers=4)), narrow, user, SETTINGS, padded)
        assert furthest(kept.adapters[user.name], tensors_of(model)) < TIGHT, user.name


def test_a_bound_without_last_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="input_cache_mb: has no effect without fleet.last_blocks"):
        FleetSettings(input_cache_mb=5)
