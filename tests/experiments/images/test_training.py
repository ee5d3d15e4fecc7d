"""Training and measuring: the numbers that the experiment reports, against plain loops."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kilotune.errors import ConfigError, KilotuneError
from kilotune.experiments.cnn.settings import CnnSettings, choose
from kilotune.experiments.images.digits_data import ImageSet
from kilotune.experiments.images.settings import Recipe
from kilotune.experiments.images.training import (
    accuracy_among,
    count_steps,
    logits_of,
    one_thread,
    per_class,
    thin,
    train,
)


def images(count: int = 22) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return ImageSet(pictures, torch.arange(count) % 10)


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))


def test_accuracy_is_counted_per_class() -> None:
    logits = torch.randn(500, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 10, (500,), generator=torch.Generator().manual_seed(1))
    logits[torch.arange(500), labels] += 1.0
    for label, share in enumerate(per_class(logits, labels, 10)):
        answers = [int(row.argmax()) for row, wanted in zip(logits, labels, strict=True) if wanted == label]
        assert share == pytest.approx(answers.count(label) / len(answers))


def test_accuracy_among_some_classes_ignores_the_others() -> None:
    logits = torch.tensor([[9.0, 1.0, 0.0, 2.0], [9.0, 2.0, 0.0, 1.0], [9.0, 0.0, 5.0, 1.0], [9.0, 3.0, 0.0, 1.0]])
    labels = torch.tensor([3, 3, 2, 1])
    assert accuracy_among(logits, labels, (3, 1)) == pytest.approx(2 / 3)
    assert accuracy_among(logits, labels, (2,)) == 1.0
    assert accuracy_among(logits, labels, range(4)) == 0.0


def test_training_is_sgd_with_momentum_on_shuffled_batches() -> None:
    model, reference, data = net(), net(), images()
    recipe = Recipe(rate=1e-3, epochs=2, batch=4)
    losses = train(model, data, recipe, seed=5)
    parameters = list(reference.parameters())
    speed = [torch.zeros_like(p) for p in parameters]
    order, expected = torch.Generator().manual_seed(5), []
    for _ in range(2):
        for rows in torch.randperm(len(data), generator=order).split(4):
            pictures = data.images[rows].float() / 127.5 - 1
            loss = nn.functional.cross_entropy(reference(pictures), data.labels[rows])
            expected.append(loss.item())
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for p, v, g in zip(parameters, speed, gradients, strict=True):
                    v.mul_(0.9).add_(g)
                    p.sub_(1e-3 * v)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert len(losses) == count_steps(len(data), recipe) == 12
    for trained, wanted in zip(model.parameters(), parameters, strict=True):
        assert torch.allclose(trained, wanted, atol=1e-5)


def test_training_repeats_exactly_and_the_seed_matters() -> None:
    first = net()
    runs = [train(copy.deepcopy(first), images(), Recipe(1e-3, 2), seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_training_tells_of_every_step() -> None:
    ticks: list[int] = []
    losses = train(net(), images(), Recipe(1e-3, 10), 0, ticks.append)
    assert sum(ticks) == len(losses) == 60
    assert len(ticks) == 3


def test_frozen_parameters_stay() -> None:
    model = net()
    model[1].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    before = copy.deepcopy(model.state_dict())
    train(model, images(), Recipe(1e-2, 1), 0)
    assert torch.equal(model.state_dict()["1.weight"], before["1.weight"])
    assert not torch.equal(model.state_dict()["1.bias"], before["1.bias"])


def test_divergence_is_a_clear_error() -> None:
    with pytest.raises(KilotuneError, match=r"diverged: the loss became \S+ at step \d+, at learning rate 1e\+38"):
        train(net(), images(), Recipe(1e38, 3), 0)


def test_logits_come_in_order_and_in_evaluation_mode() -> None:
    data = images(600)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3072, 10))
    logits = logits_of(model.train(), data)
    assert logits.shape == (600, 10)
    assert torch.allclose(logits[599], model(data.images[599:].float() / 127.5 - 1)[0], atol=1e-4)


def test_one_thread_gives_the_threads_back() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def work() -> None:
        with one_thread():
            seen.append(torch.get_num_threads())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        work()
    assert seen == [1]
    assert torch.get_num_threads() == before


def test_thinning_keeps_the_mean_and_the_last_step() -> None:
    assert thin([1.0, 2.0, 3.0, 4.0, 5.0], 2) == [(3, 2.0), (5, 4.5)]
    assert thin([1.0, 2.0], 60) == [(1, 1.0), (2, 2.0)]
    assert thin([], 60) == []


# -- settings --------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_data_set() -> None:
    digits = choose("digits", quick=False, chosen={})
    assert digits == CnnSettings()
    assert (digits.seeds, digits.batch) == (3, 4)
    cifar = choose("cifar10", quick=False, chosen={})
    assert (cifar.epochs, cifar.batch, cifar.pretrain_rate, cifar.rotation) == (6, 4, 1e-3, 0.0)
    for settings in (digits, cifar):
        assert 10 <= round(settings.rates["vera"] / settings.rates["lora"]) <= 100
        assert len(settings.classes) == 3
        assert sorted([*settings.classes, *settings.other_classes]) == list(range(10))


def test_what_is_chosen_wins_over_quick_and_defaults() -> None:
    chosen = {"epochs": 5, "seeds": None, "rates": {"vera": 0.5, "lora": None}, "classes": "cat, 5"}
    settings = choose("cifar10", quick=True, chosen=chosen)
    assert (settings.epochs, settings.seeds, settings.adapt_epochs) == (5, 1, 1)
    assert settings.rates == {"vera": 0.5, "lora": 1e-3, "full": 1e-3}
    assert settings.classes == (3, 5)
    assert settings.adaptation("vera") == Recipe(0.5, 1, 4)


def test_everything_that_is_wrong_is_said_at_once(tmp_path: object) -> None:
    with pytest.raises(ConfigError) as caught:
        CnnSettings(
            data="digit",
            classes=(1, 1, 12),
            rotation=float("nan"),
            seeds=0,
            first_seed=-1,
            epochs=0,
            pretrain_rate=float("inf"),
            rates={"vera": -1.0, "lorra": 1.0},
        )
    text = str(caught.value)
    for part in (
        "data is 'digit', not 'digits' or 'cifar10'. Did you mean 'digits'?",
        "there is no class 12: they are 0 to 9",
        "classes (1, 1, 12) repeat",
        "rotation is nan",
        "seeds is 0, and must be 1 or more",
        "epochs is 0",
        "first_seed is -1",
        "pretrain_rate is inf",
        "rate of vera is -1.0",
        "rates are needed for vera, lora, full",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ({"classes": "cta,dog"}, "'cta' is no class. Did you mean 'cat'?"),
        ({"classes": "1"}, "1 classes to adapt to: choose 2 to 9"),
        ({"classes": "0,1,2,3,4,5,6,7,8,9"}, "10 classes to adapt to"),
        ({"classes": ""}, "0 classes to adapt to"),
    ],
)
def test_wrong_classes_are_named(chosen: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose("cifar10", quick=False, chosen=chosen)
    assert reason in str(caught.value)
