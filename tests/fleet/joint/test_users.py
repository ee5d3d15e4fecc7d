"""Users who are broken, who join and who leave: none of it is anything to the others."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kilotune import VeraConfig
from kilotune.errors import AdapterError, ConfigError, UnsupportedError
from kilotune.fleet import FleetSettings, FolderSink, JointTraining, Progress, RowLoss, StoreSink, User, fit, open_store
from tests.support.fleet_support import Kept, Row, furthest, padded, points, stacked, token_rows
from tests.support.models import Nested, tiny_classifier, tiny_llama

VERA = VeraConfig(r=4, target_modules="all-linear")
SETTINGS = FleetSettings(batch_size=3, users_per_step=4, epochs=2, learning_rate=0.05)
TIGHT = 1e-9


class Rows(Sequence[Any]):
    """Data of which one row cannot be read."""

    def __init__(self, rows: Sequence[Any], bad: int) -> None:
        self.rows, self.bad = rows, bad

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        if i == self.bad:
            raise OSError("the disk is gone\nand more")
        return self.rows[i]


class NoLength(Rows):
    def __len__(self) -> int:
        raise OSError("nobody knows")


def with_row(rows: list[Row], number: int, **changes: Any) -> list[Row]:
    return [{**row, **changes} if i == number else row for i, row in enumerate(rows)]


def without_key(rows: list[Row], number: int) -> list[Row]:
    return [{"input_ids": row["input_ids"]} if i == number else row for i, row in enumerate(rows)]


GOOD = token_rows(7, 9)
BROKEN: dict[str, tuple[Any, str]] = {
    "read": (Rows(GOOD, 5), r"step [123]: row 5: OSError: the disk is gone$"),
    "length": (NoLength(GOOD, 1), r"no length: OSError: nobody knows"),
    "empty": ([], r"its data has no rows"),
    "collate": (with_row(GOOD, 4, labels="abc"), r"row 4: TypeError: "),
    "id": (with_row(GOOD, 2, input_ids=[3, 99, 4]), r"row 2: ValueError: input_ids: 99 is not in 0 ... 31"),
    "label": (with_row(GOOD, 3, labels=[32] * 9), r"row 3: .*labels: 32 is not in 0 ... 31"),
    "negative": (with_row(GOOD, 3, labels=[-7] * 9), r"row 3: ValueError: labels: -7 is no class"),
    "key": (without_key(GOOD, 6), r"row 6: KeyError"),
    "nothing": ([{**row, "labels": [-100] * len(row["labels"])} for row in GOOD], r"nothing to learn \(no label\)"),
    "type": (with_row(GOOD, 0, input_ids=None), r"row 0: TypeError"),
}


def friends() -> list[User]:
    return [User(f"u{i}", token_rows(5 + i, i), seed=i) for i in range(3)]


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Tensor]]:
    """The adapters of the friends without anybody else."""
    kept = Kept()
    fit(tiny_llama().double(), VERA, friends(), SETTINGS, collate=padded, sink=kept)
    return kept.adapters


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_user_fails_alone(fault: str, place: int, expected: dict[str, dict[str, Tensor]]) -> None:
    data, message = BROKEN[fault]
    users = friends()
    users.insert(place, User("broken", data))
    kept = Kept()
    report = fit(tiny_llama().double(), VERA, users, SETTINGS, collate=padded, sink=kept)
    assert [user.name for user in report.failed] == ["broken"]
    assert report["broken"].error is not None

    assert re.search(message, report["broken"].error), report["broken"].error
    assert sorted(kept.adapters) == ["u0", "u1", "u2"]
    for name, tensors in expected.items():
        assert furthest(tensors, kept.adapters[name]) < TIGHT, name


def test_values_that_are_not_finite_fail_alone_and_the_row_is_named() -> None:
    whole, kept = Kept(), Kept()
    users = [User(f"u{i}", points(6, i), seed=i) for i in range(3)]
    fit(Nested().double(), VERA, users, SETTINGS, collate=stacked, loss="classification", sink=whole)
    bad = points(6, 7)
    bad[4]["x"] = bad[4]["x"] * float("nan")
    late = points(6, 8)
    late[1]["x"] = late[1]["x"] * float("inf")
    users = [User("nan", bad), *users, User("inf", points(6, 3), late)]
    report = fit(Nested().double(), VERA, users, SETTINGS, collate=stacked, loss="classification", sink=kept)
    assert {user.name for user in report.failed} == {"nan", "inf"}
    assert "the loss is not finite; row 4" in str(report["nan"].error)
    assert str(report["inf"].error).startswith("validation at step 2: the loss is not finite; row 1")
    for name, tensors in whole.adapters.items():
        assert furthest(tensors, kept.adapters[name]) < TIGHT, name


def test_broken_validation_names_and_seeds() -> None:
    users = [
        User("ok", points(5, 0)),
        User("v", points(5, 1), Rows(points(4, 2), 2)),
        User("a/b", points(5, 1)),
        User("s", points(5, 1), seed=-1),
        User("e", points(5, 1), []),
        User("m", points(5, 1), metadata={"x": object()}),
        User("ok", points(5, 3)),
        User("Jose\u0301", points(5, 4)),
        User("Jos\u00e9", points(5, 5)),
        User("ok\u202e", points(5, 6)),
    ]
    kept = Kept()
    report = fit(Nested().double(), VERA, users, SETTINGS, collate=stacked, loss="classification", sink=kept)
    errors = [(user.name, str(user.error)) for user in report.failed]
    told = dict(errors)
    assert list(kept.adapters) == ["ok", "Jose\u0301"]
    assert told["v"] == "step 2: validation row 2: OSError: the disk is gone"
    assert "must not be a path" in told["a/b"]
    assert "2**64" in told["s"]
    assert told["e"] == "validation has no rows"
    assert "metadata" in told["m"]
    assert told["ok"] == "a user of this name is in the training already"
    assert told["Jos\u00e9"] == told["ok"], "stores keep both under one name"
    assert "RIGHT-TO-LEFT OVERRIDE (U+202E), with which it shows as another" in told["ok\u202e"]


def test_a_loss_that_nobody_can_run_stops_all() -> None:
    def wrong(output: Any, batch: Any) -> RowLoss:
        raise RuntimeError("no such thing")

    users = [User(f"u{i}", points(6, i)) for i in range(3)]
    with pytest.raises(UnsupportedError, match=r"no user's first batch can be run.*'u0'.*RuntimeError: no such thing"):
        fit(Nested().double(), VERA, users, SETTINGS, collate=stacked, loss=wrong, sink=Kept())
    with pytest.raises(ConfigError, match="Did you mean 'causal-lm'"):
        fit(Nested(), VERA, users, SETTINGS, collate=stacked, loss="causal_lm", sink=Kept())
    with pytest.raises(ConfigError, match="sink: expected"):
        fit(Nested(), VERA, users, SETTINGS, collate=stacked, sink=3)  # type: ignore[arg-type]


def test_a_loss_of_ones_own_and_a_classifier() -> None:
    def squared(output: Tensor, batch: Any) -> RowLoss:
        wanted = torch.nn.functional.one_hot(batch["labels"], 3).to(output.dtype)
        each = (output - wanted).square().sum(1)
        return RowLoss(each, torch.ones_like(each))

    kept = Kept()
    users = [User(f"u{i}", points(8, i)) for i in range(3)]
    settings = SETTINGS.replace(epochs=20, schedule="constant")
    report = fit(Nested().double(), VERA, users, settings, collate=stacked, loss=squared, sink=kept)
    assert all(user.losses[-1] < user.losses[0] for user in report.users)
    rows = [User(f"t{i}", [{**row, "labels": i} for row in token_rows(6, i)]) for i in range(3)]

    def collate(batch: Sequence[Row]) -> dict[str, Tensor]:
        ids = padded([{**row, "labels": row["input_ids"]} for row in batch])
        return {**ids, "labels": torch.tensor([row["labels"] for row in batch])}

    config = VeraConfig(r=4, target_modules=["query", "value"])
    report = fit(tiny_classifier(), config, rows, settings, collate=collate, loss="classification", sink=kept)
    assert all(user.losses[-1] < user.losses[0] for user in report.users)


# -- joining and leaving -----------------------------------------------------------------------------------


def people(count: int) -> list[User]:
    return [User(f"u{i}", points(5 + i % 3, i), seed=i) for i in range(count)]


def training(kept: Any, told: Callable[[Progress], None], **changes: Any) -> JointTraining:
    return JointTraining(
        Nested().double(),
        VERA,
        SETTINGS.replace(**changes),
        collate=stacked,
        loss="classification",
        sink=kept,
        told=[told],
    )


def test_users_are_taken_as_there_is_room() -> None:
    taken: list[int] = []

    def lazily() -> Iterator[User]:
        for user in people(12):
            taken.append(1)
            yield user

    seen: list[tuple[int, int]] = []
    kept = Kept()
    run = training(kept, lambda p: seen.append((len(taken), p.active)), users_per_step=2, capacity=3)
    report = run.run(lazily())
    assert len(report.users) == len(kept.adapters) == 12
    assert seen[0] == (3, 3)
    assert max(active for _, active in seen) == 3
    steps = {user.name: user.steps for user in report.users}
    assert steps == {user.name: 2 * -(-len(user.data) // 3) for user in people(12)}


def test_users_join_and_leave_while_it_runs() -> None:
    whole, kept = Kept(), Kept()
    fit(Nested().double(), VERA, people(8), SETTINGS, collate=stacked, loss="classification", sink=whole)
    joining = people(8)

    def told(progress: Progress) -> None:
        if progress.kind == "step" and progress.step == 1:  # from another thread, while this one is in its step
            threads = [threading.Thread(target=run.add, args=(user,)) for user in joining[4:]]
            threads.append(threading.Thread(target=run.cancel, args=("u2",)))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    run = training(kept, told, users_per_step=3)
    report = run.run(joining[:4])
    assert report["u2"].ended == "cancelled"
    assert sorted(kept.adapters) == sorted({user.name for user in joining} - {"u2"})
    for name, tensors in kept.adapters.items():
        assert furthest(tensors, whole.adapters[name]) < TIGHT, name
    with pytest.raises(AdapterError, match="the training is over"):
        run.add(User("late", points(4, 0)))


def test_adding_and_cancelling_what_is_wrong() -> None:
    run = training(Kept(), lambda p: None)
    run.add(people(1)[0])
    with pytest.raises(AdapterError, match="has a user of this name"):
        run.add(people(1)[0])
    run.cancel("u1")  # is still to come
    report = run.run(people(3)[1:])
    assert {user.name: user.ended for user in report.users} == {"u0": "done", "u1": "cancelled", "u2": "done"}
    with pytest.raises(AdapterError, match="no such user. Did you mean 'u2'"):
        run.cancel("u22")


def test_each_has_its_turn() -> None:
    steps: list[set[str]] = []
    run = training(Kept(), lambda p: steps.append(set(p.losses)) if p.kind == "step" else None, users_per_step=2,
                   capacity=4, max_steps=3)  # fmt: skip
    run.run(people(4))
    assert steps == [{"u0", "u1"}, {"u2", "u3"}] * 3


# -- where adapters go -------------------------------------------------------------------------------------


def test_sinks_have_what_save_pretrained_writes(tmp_path: Any) -> None:
    from kilotune import PeftModel

    kept = Kept()
    run: dict[str, Any] = {"collate": collate_floats, "loss": "classification"}
    fit(Nested(), VERA, people(3), SETTINGS, sink=kept, **run)
    fit(Nested(), VERA, people(3), SETTINGS, sink=tmp_path / "folder", **run)
    with open_store(f"sqlite:///{tmp_path / 'a.db'}") as store:
        users = [User(user.name, user.data, seed=user.seed, metadata={"team": 7}) for user in people(3)]
        fit(Nested(), VERA, users, SETTINGS, sink=StoreSink(store, alias="live", tags=["joint"]), **run)
        x = torch.randn(4, 6)
        for name in kept.adapters:
            model = PeftModel.from_pretrained(Nested(), tmp_path / "folder" / name)
            other = PeftModel.from_pretrained(Nested(), store.get(name, "live").file())
            assert torch.equal(model(x), other(x))
            assert not torch.equal(model(x), Nested()(x))
            assert store.info(name).metadata["team"] == 7
            assert store.info(name).tags == ("joint",)
            assert store.info(name).base is not None
    with (
        open_store(f"sqlite:///{tmp_path / 'a.db'}", read_only=True) as store,
        pytest.raises(ConfigError, match="reading"),
    ):
        fit(Nested(), VERA, people(1), SETTINGS, sink=store, **run)
    with pytest.raises(ConfigError, match="is a URL"):
        fit(Nested(), VERA, people(1), SETTINGS, sink="sqlite:///a.db", **run)


def test_an_adapter_that_cannot_be_kept_fails_alone(tmp_path: Any) -> None:
    with open_store(f"sqlite:///{tmp_path / 'a.db'}", base=Nested(seed=1)) as store:
        report = fit(Nested(), VERA, people(2), SETTINGS, sink=store, collate=collate_floats, loss="classification")
        assert [user.ended for user in report.users] == ["failed", "failed"]
        assert "the adapter cannot be kept" in str(report["u0"].error)
        assert list(store.ls()) == []


def collate_floats(rows: Sequence[Row]) -> dict[str, Tensor]:
    batch = stacked(rows)
    return {**batch, "inputs": batch["inputs"].float()}


def test_a_folder_is_a_sink(tmp_path: Any) -> None:
    fit(Nested(), VERA, people(1), SETTINGS, sink=FolderSink(tmp_path), collate=collate_floats, loss="classification")
    assert sorted(path.name for path in (tmp_path / "u0").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
