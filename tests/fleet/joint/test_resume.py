"""A joint training that is killed, by kill -9 at random moments, goes on: none is lost, none is trained twice."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kilotune import VeraConfig
from kilotune.adapter_files.files import read_weights
from kilotune.errors import CheckpointError, ConfigError
from kilotune.fleet import (
    AdapterStore,
    Finished,
    FleetSettings,
    FolderSink,
    Sink,
    StoreSink,
    User,
    UserReport,
    fit,
    open_store,
)
from kilotune.fleet.joint.saved_state import StateFolder
from tests.support import fleet_worker
from tests.support.fleet_support import Kept, furthest, points, stacked
from tests.support.models import Nested
from tests.support.paths import ROOT, SUPPORT

CONFIG = VeraConfig(r=4, target_modules="all-linear")
SETTINGS = FleetSettings(batch_size=2, users_per_step=2, epochs=2, learning_rate=0.05, save_every=2, only_gains=False)


@functools.cache
def unbroken() -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The adapters, and the reports by name, of the same training in one go."""
    kept = Kept()
    report = fleet_worker.run(None, kept, resume=False)
    return kept.adapters, {user.name: user for user in report.users}


def killed_until_done(place: Path, kind: str, seed: int, least: int) -> list[Path]:
    """The folders of the trainings, the last of which was killed ``least`` times or more; see fleet_worker.py."""
    command = [sys.executable, str(SUPPORT / "fleet_worker.py"), str(place), kind, str(seed), str(least)]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=SUPPORT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= least
    return sorted(path for path in place.iterdir() if path.is_dir())


def check(place: Path, kind: str) -> None:
    expected, reports = unbroken()
    lines = [json.loads(line) for line in (place / "state" / "finished.jsonl").read_text().splitlines()]
    assert sorted(line["name"] for line in lines) == sorted(reports), "a user is lost, or stands there twice"
    for line in lines:
        assert line["ended"] == reports[line["name"]].ended, line
        assert line["steps"] == reports[line["name"]].steps, line
    if kind == "folder":
        assert sorted(path.name for path in (place / "adapters").iterdir() if path.name[0] != ".") == sorted(expected)
        for name, tensors in expected.items():
            assert furthest(tensors, read_weights(place / "adapters" / name / "adapter_model.safetensors")[0]) < 1e-9
        return
    with open_store(f"sqlite:///{place / 'a.db'}") as store:
        assert sorted(version.name for version in store.ls(versions=True)) == sorted(expected)  # one version each
        for name, tensors in expected.items():
            assert furthest(tensors, store.get(name).tensors()) < 1e-6, name


@pytest.mark.heavy
def test_killed_at_random_moments(tmp_path: Path) -> None:
    for place in killed_until_done(tmp_path, "store", seed=1, least=3):
        check(place, "store")


@pytest.mark.full
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["folder", "store"])
def test_killed_again_and_again(kind: str, seed: int, tmp_path: Path) -> None:
    for place in killed_until_done(tmp_path, kind, seed, least=8):
        check(place, kind)


# -- each place where it may stop ------------------------------------------------------------------------


def people(count: int = 5) -> list[User]:
    return [User(f"u{i}", points(4 + i, i), points(3, 40 + i) if i % 2 else None, seed=i) for i in range(count)]


class Stop(Exception):
    """Where a process is killed."""


def go(sink: Any, folder: Path, resume: bool = False, users: Any = None, **changes: Any) -> Any:
    settings = SETTINGS.replace(**changes)
    chosen = people() if users is None else users
    return fit(
        Nested().double(),
        CONFIG,
        chosen,
        settings,
        collate=stacked,
        loss="classification",
        sink=sink,
        folder=folder,
        resume=resume,
    )


class Breaking(Sink):
    """Puts into a store; the ``at``-th call of :meth:`stop` is where the process is killed."""

    def __init__(self, store: AdapterStore, place: str, at: int) -> None:
        self.inner, self.place, self.left = StoreSink(store), place, at

    def stop(self, place: str) -> None:
        self.left -= place == self.place
        if self.left <= 0:  # a killed process does nothing more
            raise Stop

    def put(self, finished: Any) -> list[str | None]:
        self.stop("before the sink")
        told = self.inner.put(finished)
        self.stop("after the sink")
        return told

    def find(self, name: str, run: str) -> UserReport | None:
        return self.inner.find(name, run)


@pytest.mark.parametrize("place", ["before the sink", "after the sink", "after the line", "before the state"])
@pytest.mark.parametrize("at", [1, 3])
def test_stopped_in_each_place(place: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Kept()
    expected = {user.name: user for user in go(whole, tmp_path / "whole").users}
    store = open_store(f"sqlite:///{tmp_path / 'a.db'}")
    sink = Breaking(store, place, at)
    save, note = StateFolder.save, StateFolder.note

    def saving(self: StateFolder, *args: Any) -> None:
        sink.stop("before the state")
        save(self, *args)

    def noting(self: StateFolder, reports: Any) -> None:
        note(self, reports)
        sink.stop("after the line")

    with monkeypatch.context() as patch:
        patch.setattr(StateFolder, "save", saving)
        patch.setattr(StateFolder, "note", noting)
        with pytest.raises(Stop):
            go(sink, tmp_path / "state")
    report = go(store, tmp_path / "state", resume=True)
    assert {user.name: (user.ended, user.steps, len(user.losses)) for user in report.users} == {
        user.name: (user.ended, user.steps, len(user.losses)) for user in expected.values()
    }
    assert sorted(version.name for version in store.ls(versions=True)) == sorted(whole.adapters), "not one version each"
    for name, tensors in whole.adapters.items():
        assert furthest(tensors, store.get(name).tensors()) < 1e-6, name
    store.close()


def test_a_torn_line_is_cut_off_and_other_damage_is_told(tmp_path: Path) -> None:
    go(Kept(), tmp_path)
    path = tmp_path / "finished.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    kept = Kept()
    report = go(kept, tmp_path, resume=True)
    assert len(report.users) == 5
    assert len(kept.adapters) == 1, "only whose line was torn is trained again, for a function cannot be asked"
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(CheckpointError, match="damaged"):
        go(Kept(), tmp_path, resume=True)
    path.write_bytes(whole)
    state = (tmp_path / "state.safetensors").read_bytes()
    (tmp_path / "state.safetensors").write_bytes(state[: len(state) // 2])
    with pytest.raises(CheckpointError):
        go(Kept(), tmp_path, resume=True)


def test_a_flipped_bit_of_the_state_is_not_trained_on(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, {"settings": {}}, resume=False)
    rows = {"a.m": torch.arange(12.0), "b.v": torch.ones(3, 2, dtype=torch.bfloat16)}
    folder.save(7, [{"name": "ann", "step": 3}], rows)
    path = tmp_path / "state.safetensors"
    whole = path.read_bytes()
    steps, members, found = folder.load()
    assert (steps, members) == (7, [{"name": "ann", "step": 3}])
    assert all(torch.equal(found[key], value) for key, value in rows.items())
    for at in (len(whole) - 1, len(whole) - 30, whole.index(b'step\\": 3') + 8):  # a number, and a member's step
        path.write_bytes(bytes([*whole[:at], whole[at] ^ 1, *whole[at + 1 :]]))
        with pytest.raises(CheckpointError, match="state.safetensors is not as it was written"):
            folder.load()
    folder.close()


def test_another_training_is_not_gone_on_with(tmp_path: Path) -> None:
    go(Kept(), tmp_path)
    with pytest.raises(ConfigError, match="holds a joint training"):
        go(Kept(), tmp_path)
    with pytest.raises(ConfigError, match=r"settings.learning_rate: it has 0.05, this one 0.1"):
        go(Kept(), tmp_path, resume=True, learning_rate=0.1)
    go(Kept(), tmp_path, resume=True, users_per_step=1, save_every=9)  # what changes no adapter may change
    with pytest.raises(ConfigError, match="resume: needs the folder"):
        fit(Nested(), CONFIG, [], collate=stacked, sink=Kept(), resume=True)


def test_another_sink_is_not_gone_on_with(tmp_path: Path) -> None:
    """Who has ended is passed over: with another sink their adapters would be nowhere, and nobody would say so."""
    go(tmp_path / "adapters", tmp_path / "state")
    with pytest.raises(ConfigError, match="the adapter of 'u.', whom this training has seen to the end, is not there"):
        go(tmp_path / "other", tmp_path / "state", resume=True)
    assert not (tmp_path / "other").exists()
    (tmp_path / "adapters").rename(tmp_path / "moved")
    assert len(go(tmp_path / "moved", tmp_path / "state", resume=True).users) == 5
    with open_store(f"sqlite:///{tmp_path / 'a.db'}") as store:
        go(StoreSink(store), tmp_path / "second")
        go(StoreSink(store), tmp_path / "second", resume=True)
    with (
        open_store(f"sqlite:///{tmp_path / 'b.db'}") as store,
        pytest.raises(ConfigError, match="go on with the sink of before"),
    ):
        go(StoreSink(store), tmp_path / "second", resume=True)


def test_two_are_not_at_one_training(tmp_path: Path) -> None:
    """Both would write the state. A lock goes with its process, as all tests of kills need."""
    seen: list[str] = []

    def second(one: Finished) -> None:
        with pytest.raises(ConfigError, match=r"process \d+ on .* is training in .* now; wait for it"):
            go(Kept(), tmp_path, resume=True)
        seen.append(one.name)

    go(second, tmp_path)
    assert len(seen) == 5
    assert len(go(Kept(), tmp_path, resume=True).users) == 5
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot make .*file for the state"):
        go(Kept(), tmp_path / "file")
    with pytest.raises(ConfigError, match="file is a file; adapters go into a folder"):
        go(tmp_path / "file", tmp_path / "other")
    with pytest.raises(ConfigError, match="is a file"):
        go(FolderSink(tmp_path / "file"), tmp_path / "other")


def test_data_that_changed_meanwhile_fails_alone_and_missing_users_are_named(tmp_path: Path) -> None:
    class Broken(Kept):
        def __call__(self, one: Finished) -> None:
            raise Stop

    with pytest.raises(Stop):
        go(Broken(), tmp_path)
    users = people()
    with pytest.raises(ConfigError, match="users: u0"):
        go(Kept(), tmp_path, resume=True, users=users[2:])
    users[1] = User("u1", points(9, 1), points(3, 41), seed=1)
    kept = Kept()
    report = go(kept, tmp_path, resume=True, users=users)
    assert [user.name for user in report.failed] == ["u1"]
    assert "9 rows, and had 5" in str(report["u1"].error)
    assert sorted(kept.adapters) == ["u0", "u2", "u3", "u4"]
