"""Models that are told what to do, operation by operation: as alone, whoever trains beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kilotune import AdapterConfig, Ia3Config, LoraConfig, VeraConfig, get_config, get_peft_model, optimizer_groups
from kilotune.adapter_files.files import TwoFiles, write
from kilotune.adapter_files.reading import parse
from kilotune.adapter_files.writing import state_of
from kilotune.errors import AdapterError, ConfigError, ResourceError, UnsupportedError
from kilotune.fleet.stepper.adam import Adam
from kilotune.fleet.stepper.objectives import Dpo, Kto, Objective, Ppo, Supervised
from kilotune.fleet.stepper.operations import Forward, ForwardBackward, Keep, OptimStep, Save, Scored
from kilotune.fleet.stepper.stepper import Stepper
from kilotune.fleet.stepper.token_rows import INPUTS, collate
from kilotune.model.kept_rows import KeptRows
from tests.support.fleet_support import token_rows
from tests.support.models import tiny_llama

Row = dict[str, Any]
CONFIGS: dict[str, tuple[AdapterConfig, int]] = {
    "vera": (VeraConfig(r=8, target_modules="all-linear"), 0),
    "vera-other-seed": (VeraConfig(r=4, target_modules=["q_proj", "up_proj"], projection_prng_key=3), 1),
    "lora": (LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), 2),
    "dora": (LoraConfig(r=3, target_modules="all-linear", use_dora=True), 3),
    "ia3": (Ia3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]), 4),
    "loraxs": (get_config("loraxs", r=2, target_modules=["o_proj"]), 5),
}
HOW = Adam(rate=2e-2)


def model() -> Any:
    return tiny_llama().double()


def rows_for(seed: int, objective: Objective | None = None, count: int = 4) -> list[Row]:
    draws = torch.Generator().manual_seed(100 + seed)
    found = token_rows(count, seed)
    for number, row in enumerate(found):
        for name in getattr(objective, "lists", ()):
            row[name] = (-torch.rand(len(row["input_ids"]), generator=draws)).tolist()
        for name in getattr(objective, "numbers", ()):
            row[name] = -float(torch.rand(1, generator=draws)) if name == "reference" else float(number < 2)
    return found


def finished(stepper: Stepper, *asked: Future[Any]) -> list[Any]:
    while stepper.work():
        pass
    return [one.result(timeout=0) for one in asked]


def lone(config: AdapterConfig, seed: int, batches: Sequence[Sequence[Row]], objective: Objective) -> dict[str, Tensor]:
    """A plain torch loop over one adapter: clipping, AdamW."""
    base = model()
    torch.manual_seed(seed)
    made = get_peft_model(base, config).double()
    optimizer = torch.optim.AdamW(optimizer_groups(made, HOW.rate, weight_decay=0.0), lr=HOW.rate)
    for rows in batches:
        batch = collate(rows)
        found = objective(made(**{key: batch[key] for key in INPUTS}), batch)
        (found.totals.sum() / objective.count(rows)).backward()
        torch.nn.utils.clip_grad_norm_([p for p in made.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return dict(made.installed("default").parameters())


def assert_equal(contents: Any, own: dict[str, Tensor], config: AdapterConfig) -> None:
    """What was saved are the numbers of the lone adapter."""
    torch.manual_seed(0)
    made = get_peft_model(model(), config).double()
    for name, value in made.installed("default").parameters():
        value.data.copy_(own[name])
    _, expected, _ = state_of(made.installed("default"))
    assert expected.keys() == contents.tensors.keys()
    for key, value in expected.items():
        torch.testing.assert_close(contents.tensors[key].double(), value.double(), rtol=0, atol=1e-9, msg=key)


def test_six_unlike_models_in_company_are_what_each_is_alone() -> None:
    """Methods, ranks, targets, seeds, objectives and lengths of their own, mixed in the same passes."""
    several = (Supervised(), Ppo(), Dpo(), Kto(), Supervised(), Dpo(beta=0.4))
    objectives: dict[str, Objective] = dict(zip(CONFIGS, several, strict=True))
    batches = {
        name: [rows_for(10 * seed + i, objectives[name]) for i in range(3)] for name, (_, seed) in CONFIGS.items()
    }
    saved = {}
    with Stepper(model(), tokens=10_000) as stepper:
        for name, (config, seed) in CONFIGS.items():
            stepper.open(name, config, seed=seed)
        for i in range(3):
            for name in CONFIGS:
                stepper.submit(name, ForwardBackward(batches[name][i], objectives[name]))
                stepper.submit(name, OptimStep(HOW))
        for name in CONFIGS:
            saved[name] = stepper.submit(name, Save())
        passes = 0
        while stepper.work():
            passes += 1
    assert passes <= 2 + 3  # a pass is of all six
    for name, (config, seed) in CONFIGS.items():
        own = lone(config, seed, batches[name], objectives[name])
        assert_equal(saved[name].result(timeout=0), own, config)


def test_gradients_add_up_and_a_large_operation_runs_in_pieces() -> None:
    config, rows = CONFIGS["lora"][0], rows_for(3, count=6)
    with Stepper(model(), tokens=16) as stepper:
        stepper.open("whole", config)
        stepper.open("halves", config)
        stepper.submit("whole", ForwardBackward(rows))
        weight = Supervised().count(rows)
        for half in (rows[:3], rows[3:]):
            stepper.submit("halves", ForwardBackward(half, divisor=weight))
        asked = [stepper.submit(name, one) for name in ("whole", "halves") for one in (OptimStep(HOW), Save())]
        _, first, _, second = finished(stepper, *asked)
    for key, value in first.tensors.items():
        torch.testing.assert_close(value, second.tensors[key], rtol=0, atol=1e-9)
    assert_equal(first, lone(config, 0, [rows], Supervised()), config)


def test_log_probabilities_and_the_base_beneath() -> None:
    rows = rows_for(5)
    base = model()
    with torch.no_grad():
        batch = collate(rows)
        expected = torch.log_softmax(base(**{key: batch[key] for key in INPUTS}).logits, -1)
    with Stepper(model()) as stepper:
        stepper.open("ann", CONFIGS["lora"][0])
        stepper.submit("ann", ForwardBackward(rows))
        stepper.submit("ann", OptimStep(HOW))
        without, own = finished(
            stepper, stepper.submit("ann", Forward(rows, without=True)), stepper.submit("ann", Forward(rows))
        )
    assert isinstance(without, Scored)
    for i, row in enumerate(rows):
        for place, label in list(enumerate(row["labels"]))[1:]:
            assert float(without.logprobs[i][place]) == pytest.approx(float(expected[i, place - 1, label]))
    assert own.loss < without.loss
    assert own.weight == without.weight == sum(len(row["labels"]) - 1 for row in rows)


def test_operations_are_done_in_the_order_of_their_numbers_and_once() -> None:
    rows = rows_for(1)
    with Stepper(model()) as stepper:
        stepper.open("ann", CONFIGS["lora"][0])
        late = stepper.submit("ann", OptimStep(HOW), number=1)
        assert stepper.work() is False  # number 0 is not there yet
        first = stepper.submit("ann", ForwardBackward(rows), number=0)
        again = stepper.submit("ann", ForwardBackward(rows), number=0)
        assert again is first
        scored, stepped = finished(stepper, first, late)
        assert stepped.step == 1
        assert stepped.norm > 0
        assert stepper.submit("ann", OptimStep(HOW), number=1) is late  # done, and asked for once more
        assert scored.loss > 0


def test_an_operation_that_fails_fails_alone_and_leaves_the_gradient() -> None:
    """Its first piece is fine, and has added to the gradient when the second one is found to be broken."""
    rows = rows_for(2)
    weights = [1.0, 1.0, 1e308, 1e308]
    broken = [{**row, "weights": [own] * len(row["input_ids"])} for row, own in zip(rows_for(4), weights, strict=True)]
    with Stepper(model(), tokens=12) as stepper:
        for name in ("ann", "bob"):
            stepper.open(name, CONFIGS["lora"][0])
            stepper.submit(name, ForwardBackward(rows, divisor=1.0))
        wrong = stepper.submit("ann", ForwardBackward(broken, divisor=1.0))
        asked = [stepper.submit(name, one) for name in ("ann", "bob") for one in (OptimStep(HOW), Save())]
        _, ann, _, bob = finished(stepper, *asked)
        with pytest.raises(UnsupportedError, match="not finite"):
            wrong.result(timeout=0)
    for key, value in ann.tensors.items():
        torch.testing.assert_close(value, bob.tensors[key], rtol=0, atol=1e-12)


def test_a_step_without_a_gradient_is_refused() -> None:
    with Stepper(model()) as stepper:
        stepper.open("ann", CONFIGS["lora"][0])
        (asked,) = (stepper.submit("ann", OptimStep(HOW)),)
        while stepper.work():
            pass
        with pytest.raises(UnsupportedError, match="nothing was learned since the last step"):
            asked.result(timeout=0)


def test_a_model_on_a_shared_one_and_one_that_starts_from_another() -> None:
    rows = rows_for(8)
    with Stepper(model()) as stepper:
        stepper.open("house", CONFIGS["lora"][0])
        stepper.submit("house", ForwardBackward(rows))
        stepper.submit("house", OptimStep(HOW))
        (house,) = finished(stepper, stepper.submit("house", Save()))
        file = parse(TwoFiles(Path("house"), house.config, house.tensors, house.header))
        stepper.open("ann", CONFIGS["vera"][0], on=file)
        stepper.open("more", CONFIGS["lora"][0], start=file)
        of_house, above, more, under = finished(
            stepper,
            stepper.submit("house", Forward(rows)),
            stepper.submit("ann", Forward(rows)),
            stepper.submit("more", Forward(rows)),
            stepper.submit("ann", Forward(rows, without=True)),
        )
        (saved,) = finished(stepper, stepper.submit("ann", Save()))
    for one in (above, more, under):  # VeRA starts at no change
        assert one.loss == pytest.approx(of_house.loss, abs=1e-6)
    assert any("stands_on" in key or "stand" in key for key in saved.header)


def test_models_come_and_go() -> None:
    base = model()
    with Stepper(base) as stepper:
        for number in range(20):  # more than the rows that there are at first
            stepper.open(f"u{number}", CONFIGS["lora"][0], seed=number)
        with pytest.raises(AdapterError, match="there is a model of this name already"):
            stepper.open("u3", CONFIGS["lora"][0])
        waiting = stepper.submit("u3", ForwardBackward(rows_for(0)))
        for number in range(20):
            stepper.close(f"u{number}")
        with pytest.raises(AdapterError, match="was closed"):
            waiting.result(timeout=0)
        with pytest.raises(AdapterError, match="there is no model 'u3'"):
            stepper.submit("u3", Save())
        assert stepper.work() is False
    assert not [name for name, _ in base.named_modules() if "base_layer" in name]


@pytest.mark.parametrize(
    ("rows", "objective", "said"),
    [
        ([], Supervised(), "expected at least one row, got 0"),
        ([{"input_ids": [1, 2]}], Supervised(), "row 0: it has no labels"),
        ([{"input_ids": [1, 99], "labels": [1, 2]}], Supervised(), "input_ids: 99 is not in 0 ... 31"),
        ([{"input_ids": [1, 2], "labels": [1, 2, 3]}], Supervised(), "labels: expected a list of 2, as input_ids has"),
        ([{"input_ids": [1, 2], "labels": [1, 2], "weights": [1, math.nan]}], Supervised(), "finite numbers, got nan"),
        ([{"input_ids": [1, 2], "labels": [1, 2], "reference": 0.0}], Dpo(), "a multiple of 2"),
        ([{"input_ids": [1, 2], "labels": [1, 2]}] * 2, Dpo(), "row 0: it has no reference"),
    ],
)
def test_rows_are_seen_to_when_they_come_in(rows: list[Row], objective: Objective, said: str) -> None:
    with Stepper(model()) as stepper:
        stepper.open("ann", CONFIGS["lora"][0])
        with pytest.raises(ConfigError, match=said):
            stepper.submit("ann", ForwardBackward(rows, objective))


def test_only_so_many_operations_wait() -> None:
    with Stepper(model(), waiting=2) as stepper:
        stepper.open("ann", CONFIGS["lora"][0])
        for _ in range(2):
            stepper.submit("ann", Forward(rows_for(0)))
        with pytest.raises(ResourceError, match="2 operations are waiting already"):
            stepper.submit("ann", Forward(rows_for(0)))


@pytest.mark.parametrize("case", ["vera", "dora"])
def test_a_model_goes_on_elsewhere_from_what_was_kept(case: str) -> None:
    config, seed = CONFIGS[case]

    def steps(stepper: Stepper, first: int, last: int) -> None:
        for step in range(first, last):
            stepper.submit("a", ForwardBackward(rows_for(step)))
            stepper.submit("a", OptimStep(HOW))

    with Stepper(model()) as stepper:
        stepper.open("a", config, seed=seed)
        steps(stepper, 0, 5)
        (whole,) = finished(stepper, stepper.submit("a", Save()))
    with Stepper(model()) as stepper:
        stepper.open("a", config, seed=seed)
        steps(stepper, 0, 2)
        (kept,) = finished(stepper, stepper.submit("a", Keep()))
        assert (kept.step, kept.pieces) == (2, 2)
    with Stepper(model()) as stepper:
        stepper.open("a", config, seed=seed, state=kept)
        steps(stepper, 2, 5)
        (again,) = finished(stepper, stepper.submit("a", Save()))
        with pytest.raises(ConfigError, match="state: values: expected"):
            stepper.open("b", CONFIGS["ia3"][0], state=kept)
    for key, tensor in whole.tensors.items():
        assert torch.equal(tensor, again.tensors[key]), key


def test_logits_are_made_where_a_label_follows_alone() -> None:
    """Most of a chat is read and not learned: its tokens need no logits, and the numbers are the same."""
    found = []
    for keeps in (True, False):
        base = model()
        seen: list[int] = []
        base.lm_head.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0].shape[1]))
        with Stepper(base) as stepper:
            stepper._passes._keeps = stepper._passes._keeps and keeps
            stepper.open("a", CONFIGS["lora"][0])
            rows = [
                {"input_ids": [3, 4, 5, 6, 7, 8], "labels": [-100, -100, -100, -100, 7, 8]},
                {"input_ids": [9, 4, 5], "labels": [-100, -100, 5]},
            ]
            asked = [stepper.submit("a", ForwardBackward(rows)), stepper.submit("a", OptimStep(HOW))]
            asked += [stepper.submit("a", Forward(rows)), stepper.submit("a", Save())]
            first, _, second, saved = finished(stepper, *asked)
        assert set(seen) == {3 if keeps else 6}  # those before tokens 2, 4 and 5
        found.append((first, second, saved))
    (first, second, saved), (other_first, other_second, other_saved) = found
    for one, other in ((first, other_first), (second, other_second)):
        assert one.loss == pytest.approx(other.loss, rel=1e-12)
        for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    for key, tensor in saved.tensors.items():
        torch.testing.assert_close(tensor, other_saved.tensors[key], rtol=0, atol=1e-9)


# -- the last blocks alone ---------------------------------------------------------------------------------------


def test_what_enters_the_last_blocks_is_kept_and_nothing_else_changes() -> None:
    last = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
    batches = [rows_for(i % 2) for i in range(4)]
    contents, losses, calls = {}, {}, {}
    base = model()
    seen: list[int] = []
    blocks = base.model.layers
    for keep in (0.0, 8.0):
        with Stepper(base) as stepper:
            handle = blocks[0].self_attn.register_forward_hook(lambda *_: seen.append(1))
            stepper.open("a", last, seed=1, keep_inputs=keep)
            stepper.open("b", CONFIGS["lora"][0], seed=2)
            found = []
            for rows in batches:
                found.append(stepper.submit("a", ForwardBackward(rows)))
                stepper.submit("a", OptimStep(HOW))
                found.append(stepper.submit("a", Forward(rows, without=True)))
            asked = finished(stepper, *found, stepper.submit("a", Save()))
            losses[keep], contents[keep], calls[keep] = [one.loss for one in asked[:-1]], asked[-1], len(seen)
            seen.clear()
            handle.remove()
    assert calls == {0.0: 8, 8.0: 2}  # each row once
    assert losses[8.0] == pytest.approx(losses[0.0], abs=1e-12)
    for key, value in contents[0.0].tensors.items():
        torch.testing.assert_close(contents[8.0].tensors[key], value, rtol=0, atol=1e-12)


def test_what_was_kept_for_all_is_taken_by_each_and_not_added_to() -> None:
    last = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
    base, kept = model(), KeptRows(8.0)
    seen: list[int] = []
    base.model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1))
    common, own = rows_for(0), rows_for(1)
    found = []
    with Stepper(base) as stepper:
        for name, keep in (("all", kept), ("ann", KeptRows(8.0, beneath=kept)), ("bob", KeptRows(0.0, beneath=kept))):
            stepper.open(name, last, seed=1, keep_inputs=keep)
            asked = [stepper.submit(name, Forward(rows)) for rows in (common, *([] if name == "all" else [own]))]
            found.append([one.loss for one in finished(stepper, *asked)])
            stepper.close(name)
    assert found == [found[1][:1], found[1], found[1]]
    assert len(kept.places) == len(common)
    # "ann" runs the first block to see its form, and for her own rows; "bob", for whom nothing is kept, for all.
    assert len(seen) == 1 + 2 + 2


def test_what_a_model_takes_is_known_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one model of a large form has no room for seven more beside it."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    trained = sum(
        parameter.numel() for parameter in get_peft_model(model(), config).parameters() if parameter.requires_grad
    )
    with Stepper(model()) as stepper:
        before = stepper.bytes_of(config)
        assert before == 5 * 8 * trained
        assert not stepper._homes
        monkeypatch.setattr("kilotune.fleet.stepper.stepper.FIRST_NUMBERS", 1)
        stepper.open("ann", config)
        assert stepper.bytes_of(config) == before
        (home,) = stepper._homes.values()
        assert home.rows.capacity == 1
        for name in ("bob", "carl"):
            stepper.open(name, config)
        asked = [stepper.submit(name, ForwardBackward(rows_for(1))) for name in ("ann", "carl")]
        first, second = finished(stepper, *asked)
        assert first.loss == pytest.approx(second.loss, abs=1e-12)


def test_what_comes_between_two_looks_is_done_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may ask for a save just when all steps and saves are done, and a pass is about to be chosen."""
    with Stepper(model()) as stepper:
        stepper.open("ann", CONFIGS["vera"][0])
        stepper.open("ben", CONFIGS["vera"][0])
        late: list[Future[Any]] = []
        chosen = stepper._chosen

        def choose() -> Any:
            if not late:
                late.append(stepper.submit("ann", Save()))
            return chosen()

        monkeypatch.setattr(stepper, "_chosen", choose)
        asked = stepper.submit("ben", ForwardBackward(rows_for(0)))
        (scored, saved) = (finished(stepper, asked)[0], late[0].result(timeout=0))
        assert scored.weight > 0
        assert saved.tensors


def test_what_is_saved_stays_as_it_was_and_can_be_written(tmp_path: Path) -> None:
    with Stepper(model()) as stepper:
        stepper.open("ann", CONFIGS["lora"][0])
        (before,) = finished(stepper, stepper.submit("ann", Save()))
        kept = {key: value.clone() for key, value in before.tensors.items()}
        told = [stepper.submit("ann", ForwardBackward(rows_for(0))), stepper.submit("ann", OptimStep(HOW))]
        (_, _, after) = finished(stepper, *told, stepper.submit("ann", Save()))
        assert all(torch.equal(before.tensors[key], value) for key, value in kept.items())
        assert any(not torch.equal(after.tensors[key], value) for key, value in kept.items())
        write(tmp_path / "ann", after.config, after.tensors, after.header)
        found = load_file(tmp_path / "ann" / "adapter_model.safetensors")
        assert all(torch.equal(found[key], value) for key, value in after.tensors.items())
