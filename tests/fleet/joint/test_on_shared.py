"""Personal adapters on a shared one: what is trained, what it says it stands on, and when nothing is kept."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kilotune import AdapterConfig, LoraConfig, PeftModel, VeraConfig, get_config, get_peft_model
from kilotune.adapter_files.content import content_sha256, file_of
from kilotune.adapter_files.reading import open_adapter
from kilotune.errors import CheckpointError, ConfigError, UnsupportedError
from kilotune.fleet import FleetSettings, StandsOn, User, fit, open_store
from kilotune.fleet.store.stands_on import HEADER
from kilotune.model.last_blocks import in_last_blocks
from tests.support.fleet_support import (
    Kept,
    alone,
    furthest,
    mean_loss,
    padded,
    points,
    stacked,
    tensors_of,
    token_rows,
)
from tests.support.models import Nested, bits, randomize, tiny_llama

ALL = "all-linear"
VERA = VeraConfig(r=6, target_modules=ALL)
METHODS: dict[str, AdapterConfig] = {
    "vera": VERA,
    "vera-bias": VeraConfig(r=6, target_modules=ALL, bias="all"),
    "lora": LoraConfig(r=3, target_modules=ALL),
    "ia3": get_config("ia3", target_modules=["up", "down"], feedforward_modules=["down"]),
    "bitfit": get_config("bitfit", target_modules=["stem", "up", "head"]),
}
SETTINGS = FleetSettings(
    batch_size=3, users_per_step=3, epochs=3, learning_rate=0.02, warmup=2, max_grad_norm=0.5, only_gains=False
)
RUN: dict[str, Any] = {"collate": stacked, "loss": "classification"}


def house(shared: AdapterConfig | None = None, scale: float = 0.3) -> PeftModel:
    """The base with a shared adapter in it, not active."""
    model = get_peft_model(Nested().double(), shared or LoraConfig(r=2, target_modules=ALL), "house-style")
    model.double()
    randomize(model, "house-style", seed=4, scale=scale)
    model.set_adapter([])
    return model.eval()


def group(count: int = 4) -> list[User]:
    return [
        User(f"u{i}", points(5 + 2 * i, i), points(4, 100 + i) if i % 2 else None, seed=10 + i) for i in range(count)
    ]


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_each_is_what_a_lone_twin_over_the_merged_base_is(config: AdapterConfig) -> None:
    """What adds up, and what rescales: over a base that has the house style in its weights it is the same."""
    model, kept = house(), Kept()
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["house-style"])
    report = fit(model, config, group(), SETTINGS, sink=kept, on="house-style", **RUN)
    assert {user.ended for user in report.users} == {"done"}, report
    for user in group():
        twin, seen = alone(copy.deepcopy(merged), config, user, SETTINGS, stacked)
        own, theirs = kept.adapters[user.name], tensors_of(twin)
        if config is METHODS["vera-bias"]:  # kept whole, and the base's are the same
            assert {key for key in own if key.endswith("bias")}
        assert furthest(own, theirs) < 1e-8, user.name
        assert [loss for _, loss in report[user.name].validation] == pytest.approx(seen, abs=1e-8)
    elsewhere = Kept()
    fit(Nested().double(), config, group(), SETTINGS, sink=elsewhere, **RUN)
    assert furthest(kept.adapters["u0"], elsewhere.adapters["u0"]) > 1e-4, "the house style made no difference"


def test_a_name_a_folder_and_a_store_are_one_and_leave_the_model_as_it_was(tmp_path: Path) -> None:
    model = house()
    model.save_pretrained(tmp_path / "styles")
    folder = tmp_path / "styles" / "house-style"
    before = bits(model)
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    found: dict[str, Kept] = {}
    with open_store(f"sqlite:///{tmp_path / 'a.db'}") as store:
        store.put("house-style", folder)
        store.put("house-style", folder)
        given = {
            "name": "house-style",
            "folder": folder,
            "store": store.get("house-style"),
            "read": open_adapter(folder),
        }
        for what, on in given.items():
            found[what] = Kept()
            own = model if what == "name" else Nested().double()
            fit(own, VERA, group(2), SETTINGS, sink=found[what], on=on, **RUN)
            if what != "name":
                assert bits(own) == bits(Nested().double())
    assert bits(model) == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    assert model.active_adapters == []
    sums = {kept.finished[0].stands_on.sha256 for kept in found.values() if kept.finished[0].stands_on}
    assert sums == {content_sha256(open_adapter(folder))}
    assert found["store"].finished[0].stands_on == StandsOn("house-style", 2, *sums)
    assert found["name"].finished[0].stands_on == StandsOn("house-style", None, *sums)
    for kept in found.values():  # the file has float32
        assert furthest(kept.adapters["u1"], found["name"].adapters["u1"]) < 1e-5


def test_what_it_stands_on_is_in_the_store_and_in_the_file(tmp_path: Path) -> None:
    model = house()
    with open_store(f"sqlite:///{tmp_path / 'a.db'}") as store:
        fit(model, VERA, group(1), SETTINGS, sink=store, on="house-style", **RUN)
        record = store.get("u0")
        told = StandsOn.from_dict(record.info.metadata["stands_on"])
        shared = store.shared_of(record.info)
        assert (shared.info.name, content_sha256(shared.file())) == ("house-style", told.sha256)
        assert told == StandsOn("house-style", None, content_sha256(file_of(model.installed("house-style"))))
        assert StandsOn.of_header(record.file().metadata) == told
        record.save(tmp_path / "out")
    assert StandsOn.of_header(open_adapter(tmp_path / "out").metadata) == told
    fit(model, VERA, group(1), SETTINGS, sink=tmp_path / "folders", on="house-style", **RUN)
    assert StandsOn.of_header(open_adapter(tmp_path / "folders" / "u0").metadata) == told
    fit(model, VERA, group(1), SETTINGS, sink=tmp_path / "bare", **RUN)
    assert HEADER not in open_adapter(tmp_path / "bare" / "u0").metadata


def test_a_name_in_the_store_that_is_written_to(tmp_path: Path) -> None:
    house().save_pretrained(tmp_path)
    house(scale=0.1).save_pretrained(tmp_path / "new")
    with open_store(f"sqlite:///{tmp_path / 'a.db'}") as store:
        store.put("house-style", tmp_path / "house-style", alias="live")
        store.put("house-style", tmp_path / "new" / "house-style")
        for on, version in (("house-style/1", 1), ("house-style/live", 1), ("house-style", 2)):
            fit(Nested().double(), VERA, group(1), SETTINGS, sink=store, on=on, **RUN)
            info = store.get("u0").info
            assert info.stands_on is not None
            assert (info.stands_on.name, info.stands_on.version) == ("house-style", version)
            assert info.metadata["stands_on"]["version"] == version
        assert len(store.versions("house-style")) == 2, "it is there, and is not put again"
        still = SETTINGS.replace(learning_rate=1e-12)
        fit(Nested().double(), VERA, [User("u0", points(5, 0))], still, sink=store, on="house-style", start="u0", **RUN)
        torch.testing.assert_close(store.get("u0", 4).vector(), store.get("u0", 3).vector())
        with pytest.raises(ConfigError, match="start: 'u0' stands on 'house-style'.* the base alone"):
            fit(Nested().double(), VERA, [User("x", points(5, 0))], still, sink=store, start="u0", **RUN)
        with pytest.raises(ConfigError, match="(?s)on: 'haus' is no folder, and in the store: .*no such adapter"):
            fit(Nested().double(), VERA, group(1), SETTINGS, sink=store, on="haus", **RUN)


def test_the_hash_is_of_what_is_computed(tmp_path: Path) -> None:
    model = house(VeraConfig(r=4, target_modules=ALL, vera_dropout=0.1))
    first = content_sha256(file_of(model.installed("house-style")))
    model.save_pretrained(tmp_path)
    with open_store(f"sqlite:///{tmp_path / 'a.db'}") as store:
        store.put("house", tmp_path / "house-style")
        assert content_sha256(store.get("house").file()) == first
    again = PeftModel.from_pretrained(Nested(), tmp_path / "house-style", "other-name")
    assert content_sha256(file_of(again.installed("other-name"))) == first
    with torch.no_grad():
        next(iter(again.adapter_parameters()))[1].view(-1)[0] += 1e-3
    assert content_sha256(file_of(again.installed("other-name"))) != first
    other = get_peft_model(Nested(), VeraConfig(r=4, target_modules=ALL, projection_prng_key=1))
    twin = get_peft_model(Nested(), VeraConfig(r=4, target_modules=ALL, projection_prng_key=2))
    assert content_sha256(file_of(other.installed("default"))) != content_sha256(file_of(twin.installed("default")))


def test_with_the_last_blocks_alone_the_shared_one_is_in_what_enters_them() -> None:
    """What enters them is kept; over a base with the house style in its weights all blocks run each time."""
    model = get_peft_model(tiny_llama(layers=4).double(), LoraConfig(r=2, target_modules=ALL), "house-style")
    model.double()
    randomize(model, "house-style", seed=4, scale=0.3)
    model.set_adapter([])
    model.eval()
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["house-style"])
    users = [User(f"u{i}", token_rows(5 + i, i), token_rows(3, 50 + i), seed=i) for i in range(3)]
    ran: list[int] = []
    model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda _, args, y: ran.append(y.shape[0]))
    kept = Kept()
    settings = SETTINGS.replace(last_blocks=2)
    report = fit(model, VERA, users, settings, collate=padded, sink=kept, on="house-style")
    assert 0 < sum(ran) < 2 * sum(len(user.data) + len(user.validation or ()) for user in users)
    narrow = in_last_blocks(tiny_llama(layers=4), VERA, 2)
    for user in users:
        twin, seen = alone(copy.deepcopy(merged), narrow, user, SETTINGS, padded)
        assert furthest(kept.adapters[user.name], tensors_of(twin)) < 1e-8, user.name
        assert [loss for _, loss in report[user.name].validation] == pytest.approx(seen, abs=1e-8)
        with torch.no_grad():
            bare = mean_loss(merged, padded(list(user.validation or ())))
        assert report[user.name].without == pytest.approx(float(bare), abs=1e-8)


def test_another_shared_one_is_another_training(tmp_path: Path) -> None:
    model = house()
    fit(model, VERA, group(2), SETTINGS, sink=tmp_path / "out", folder=tmp_path / "state", on="house-style", **RUN)
    more: dict[str, Any] = {"sink": tmp_path / "out", "folder": tmp_path / "state", "resume": True, **RUN}
    report = fit(model, VERA, group(3), SETTINGS, on="house-style", **more)
    assert [user.name for user in report.users] == ["u0", "u1", "u2"]
    with pytest.raises(ConfigError, match="on: it is another one"):
        fit(model, VERA, group(2), SETTINGS, **more)
    randomize(model, "house-style", seed=8)
    with pytest.raises(ConfigError, match="on: it is another one"):
        fit(model, VERA, group(2), SETTINGS, on="house-style", **more)


def test_what_cannot_be_beneath_says_so(tmp_path: Path) -> None:
    model, kept = house(), Kept()
    model.add_adapter("eve", VERA)
    model.set_adapter("eve")
    for on, message in (
        ("house-style", r"\['eve'\] are active.*on 'house-style' without them.*on='eve'"),
        (None, r"\['eve'\] are active.*on the base without them"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit(model, VERA, group(1), SETTINGS, sink=kept, on=on, **RUN)
    model.set_adapter("house-style")  # the one that is named may be active
    assert fit(model, VERA, group(1), SETTINGS, sink=kept, on="house-style", **RUN).users[0].ended == "done"
    assert model.active_adapters == ["house-style"]
    assert all(p.requires_grad for _, p in model.adapter_parameters("house-style"))
    assert all(p.grad is None for _, p in model.adapter_parameters("house-style"))
    model.set_adapter([])
    with pytest.raises(ConfigError, match=r"on: there is no folder 'hous-style'.*Did you mean 'house-style'"):
        fit(model, VERA, group(1), SETTINGS, sink=Kept(), on="hous-style", **RUN)
    with pytest.raises(ConfigError, match="on: expected the name of an adapter.*got a float|on: expected.*float"):
        fit(model, VERA, group(1), SETTINGS, sink=Kept(), on=0.5, **RUN)  # type: ignore[arg-type]
    neck = get_config("bottleneck", target_modules=["mix.up"], width=2)
    with pytest.raises(UnsupportedError, match="users' adapters cannot stand on 'house-style'"):
        fit(house(neck), neck, group(1), SETTINGS, sink=Kept(), on="house-style", **RUN)
    fit(model, VERA, group(1), SETTINGS, sink=tmp_path, on="house-style", **RUN)
    with pytest.raises(UnsupportedError, match="on: 'u0' stands on 'house-style' .* itself"):
        fit(house(), VERA, group(1), SETTINGS, sink=Kept(), on=tmp_path / "u0", **RUN)
    users = [User("house-style", points(4, 1)), User("u", points(4, 1), metadata={"stands_on": 1}), *group(1)]
    report = fit(house(), VERA, users, SETTINGS, sink=Kept(), on="house-style", **RUN)
    assert [user.ended for user in report.users] == ["failed", "failed", "done"]
    assert "is called 'house-style' too" in str(report.users[0].error)
    assert "'stands_on' is written by the training itself" in str(report.users[1].error)


class Attends(nn.Module):
    """Attention whose parent multiplies with the packed weight itself, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0])
        return y


def test_a_shared_one_that_is_one_for_all_rows_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = get_peft_model(Attends().double(), LoraConfig(r=2, target_modules=["attention"]), "house-style")
    model.set_adapter([])
    with open_store(f"sqlite:///{tmp_path / 'a.db'}") as store:
        with pytest.raises(UnsupportedError, match="(?s)cannot stand on 'house-style'.*the weight itself"):
            fit(
                model, VeraConfig(r=2, target_modules=["head"]), group(1), SETTINGS, sink=store, on="house-style", **RUN
            )
        assert not list(store.ls())


@pytest.mark.parametrize("header", ["{", "3", '{"name": 3, "version": null, "sha256": "a"}', '{"name": "a"}'])
def test_a_header_that_says_nonsense_is_refused(header: str) -> None:
    with pytest.raises(CheckpointError):
        StandsOn.of_header({HEADER: header})


# -- starts -------------------------------------------------------------------------------------------


def trained(model: Any, name: str, tensors: dict[str, Tensor], folder: Path) -> Path:
    model.save_pretrained(folder, selected_adapters=[name])
    return folder / name


def test_users_start_from_an_existing_adapter_all_or_one(tmp_path: Path) -> None:
    model = get_peft_model(Nested(), VERA, "common")
    model.add_adapter("anns", VERA)
    for i, name in enumerate(("common", "anns")):
        randomize(model, name, seed=i, scale=0.3)
    model.set_adapter([])
    model.save_pretrained(tmp_path)
    still = SETTINGS.replace(learning_rate=1e-12, epochs=1)
    users = [
        User("ann", points(4, 1), start=tmp_path / "anns"),
        User("bob", points(4, 2)),
        User("cy", points(4, 3), start="anns"),
    ]
    kept = Kept()
    float32 = {"collate": lambda rows: {k: v.float() if k == "inputs" else v for k, v in stacked(rows).items()}}
    fit(model, VERA, users, still, sink=kept, start="common", **{**RUN, **float32})
    expected = {name: dict(open_adapter(tmp_path / name).files.tensors) for name in ("common", "anns")}
    for user, start in (("ann", "anns"), ("bob", "common"), ("cy", "anns")):
        assert furthest(kept.adapters[user], expected[start]) < 1e-6, user
    assert kept.finished[0].stands_on is None


def test_a_start_is_of_the_same_form_and_stands_on_the_same(tmp_path: Path) -> None:
    model = house()
    model.add_adapter("low", LoraConfig(r=3, target_modules=ALL))
    model.add_adapter("wide", VeraConfig(r=8, target_modules=ALL))
    model.set_adapter([])
    fit(model, VERA, group(1), SETTINGS, sink=tmp_path, on="house-style", **RUN)
    for start, message in (
        (
            "low",
            "start: the adapter 'low' is of another configuration than the users' adapters:.*method: theirs have Vera",
        ),
        ("wide", "(?s)start: the adapter 'wide' is of another.*r: theirs have 6, the adapter 8"),
        (tmp_path / "u0", "start: 'u0' stands on 'house-style'.*and this training is on the base alone"),
        ("lo", "start: there is no folder 'lo'.*Did you mean 'low'"),
    ):
        with pytest.raises(ConfigError, match="(?s)" + message):
            fit(model, VERA, group(1), SETTINGS, sink=Kept(), start=start, **RUN)
    users = [*group(2), User("bad", points(4, 1), start="low")]
    report = fit(model, VERA, users, SETTINGS, sink=Kept(), on="house-style", start=tmp_path / "u0", **RUN)
    assert [user.ended for user in report.users] == ["failed", "done", "done"]
    assert "start: the adapter 'low' is of another configuration" in str(report["bad"].error)


# -- no gain ------------------------------------------------------------------------------------------


def labelled(count: int, seed: int, label: int) -> list[dict[str, Any]]:
    return [{**row, "labels": label} for row in points(count, seed)]


@pytest.mark.parametrize("keep_best", [True, False])
@pytest.mark.parametrize("on", [None, "house-style"])
def test_nothing_is_kept_for_whom_it_is_no_gain(on: str | None, keep_best: bool, tmp_path: Path) -> None:
    """Who validates on other labels than it trains on is made worse; who has no validation rows is kept."""
    model = house(scale=0.05)
    users = [
        User("good", labelled(8, 1, 0), labelled(6, 2, 0)),
        User("worse", labelled(8, 3, 1), labelled(8, 3, 2)),
        User("unseen", labelled(8, 5, 1)),
    ]
    settings = SETTINGS.replace(only_gains=True, learning_rate=0.1, keep_best=keep_best, max_grad_norm=None)
    told: list[str] = []
    with open_store(f"sqlite:///{tmp_path / 'a.db'}") as store:
        more: dict[str, Any] = {"sink": store, "folder": tmp_path / "state", "on": on, **RUN}
        report = fit(model, VERA, users, settings, told=[lambda p: told.append(p.kind)], **more)
        assert [version.name for version in store.ls()] == sorted(["good", "unseen", *([] if on is None else [on])])
        again = fit(model, VERA, users, settings, resume=True, **more)
    assert again.users == report.users
    assert {user.name: user.ended for user in report.users} == {"good": "done", "worse": "no gain", "unseen": "done"}
    assert [user.name for user in report.no_gain] == ["worse"]
    assert told.count("no gain") == 1
    model.set_adapter([] if on is None else on)
    for name, gains in (("good", True), ("worse", False)):
        user = report[name]
        batch = stacked(list(users[0 if gains else 1].validation or ()))
        loss = torch.nn.functional.cross_entropy(model(batch["inputs"]), batch["labels"])
        assert user.without == pytest.approx(float(loss.detach()), abs=1e-6)
        best = min(loss for _, loss in user.validation) if keep_best else user.validation[-1][1]
        assert user.with_own == best
        assert (best < float(loss.detach())) is gains
    assert report["unseen"].without is report["unseen"].with_own is None
    document = json.loads(json.dumps(report.to_dict()))["users"][[u.name for u in report.users].index("worse")]
    assert (document["ended"], document["without"] > 0, document["with_own"] > 0) == ("no gain", True, True)
    everyone = Kept()
    fit(model, VERA, users, settings.replace(only_gains=False), sink=everyone, on=on, **RUN)
    assert sorted(everyone.adapters) == ["good", "unseen", "worse"]
