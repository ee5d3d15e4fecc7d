"""In what a base is held whose dtype is auto: a planted stopwatch says which products are slow."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from kilotune.cli._weights import Weights
from kilotune.errors import ConfigError
from kilotune.fleet.joint.users_from_files import text_users
from kilotune.serve.http.settings import EngineSettings
from kilotune.serve.http.startup import _base
from kilotune.train.results.scoring import open_scoring, scoring_settings
from kilotune.train.run import fit, open_session, train
from kilotune.train.running import held_dtype as module
from kilotune.train.running.base_model import quantised
from kilotune.train.running.held_dtype import AS_SAVED, WIDENED, Held, held_dtype, product_seconds
from kilotune.train.running.memory import Machine
from kilotune.train.running.planning import plan_run
from kilotune.train.settings.config_file import settings_from
from kilotune.train.settings.sections import ModelSettings, TrainSettings
from kilotune.train.trainer import output_folder
from tests.support.train_support import model_folder, prompts, write_jsonl

CPU = torch.device("cpu")
ROOMY = Machine("CPU", 10**9, 10**9)


def net(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)).to(dtype)


def slow(dtype: torch.dtype, backward: bool) -> float:
    """As on a CPU with AVX2 alone: only the backward is slow."""
    return 0.42 if dtype in (torch.bfloat16, torch.float16) and backward else 0.014


def even(dtype: torch.dtype, backward: bool) -> float:
    return 0.01


def never(dtype: torch.dtype, backward: bool) -> float:
    raise AssertionError("nothing is to be timed")


def test_slow_products_are_run_in_float32_and_the_numbers_stay() -> None:
    model, before = net(), dict(net().named_parameters())
    held = held_dtype(model, "auto", CPU, backward=True, seconds=slow, machine=ROOMY)
    assert held.how == WIDENED
    assert held.note == (
        "bfloat16 products are 30 times slower than float32's here: the weights are held in float32, 88 B more "
        "(model.dtype)"
    )
    assert held.apply(model) is model
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name].float())


def test_what_stays_as_it_is() -> None:
    assert held_dtype(net(), "auto", CPU, backward=True, seconds=even, machine=ROOMY) == Held(AS_SAVED)
    assert held_dtype(net(), "auto", CPU, backward=False, seconds=slow, machine=ROOMY) == Held(AS_SAVED)
    assert held_dtype(net(), "bfloat16", CPU, backward=True, seconds=never) == Held()  # the user said so
    assert held_dtype(net(torch.float32), "auto", CPU, backward=True, seconds=never) == Held()
    assert held_dtype(net(), "auto", torch.device("cuda"), backward=True, seconds=never) == Held()
    quantised = net()
    quantised.is_quantized = True  # type: ignore[assignment]  # as transformers marks it
    assert held_dtype(quantised, "auto", CPU, backward=True, seconds=never) == Held()
    model = net()
    assert next(Held().apply(model).parameters()).dtype == torch.bfloat16


def test_weights_that_would_not_fit_stay_and_that_is_told() -> None:
    held = held_dtype(net(), "auto", CPU, backward=True, seconds=slow, machine=Machine("CPU", 1000, 100))
    assert held == Held(
        note="bfloat16 products are 30 times slower than float32's here, but in float32 the weights would take 88 B "
        "more, and 100 B are free: they stay in bfloat16"
    )
    enough = Machine("CPU", 1000, 110)  # 88 bytes are 4/5 of it
    assert held_dtype(net(), "auto", CPU, backward=True, seconds=slow, machine=enough).how == WIDENED


def test_a_product_is_timed_in_earnest_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    product_seconds.cache_clear()
    monkeypatch.setattr(module, "SHAPE", (16, 24, 32))
    times = {
        (dtype, way): product_seconds(dtype, way) for dtype in (torch.float32, torch.bfloat16) for way in (False, True)
    }
    assert all(0 < seconds < 1 for seconds in times.values())
    assert product_seconds(torch.float32, True) == times[torch.float32, True]
    product_seconds.cache_clear()


@pytest.mark.parametrize(("timed", "found"), [(slow, torch.float32), (even, torch.bfloat16)])
def test_4_bit_weights_are_multiplied_in_what_is_fast(
    timed: Any, found: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(module, "product_seconds", timed)
    settings = ModelSettings(base="x", quantization="nf4")
    assert quantised(settings, transformers, CPU).bnb_4bit_compute_dtype == found
    assert quantised(settings, transformers, torch.device("cuda")).bnb_4bit_compute_dtype == torch.bfloat16
    explicit = settings.replace(dtype="float16")
    assert quantised(explicit, transformers, CPU).bnb_4bit_compute_dtype == torch.float16


# -- wherever a base is loaded -------------------------------------------------------------------------


def settings(folder: Path, data: Path, **training: Any) -> TrainSettings:
    return settings_from(
        {
            "output": str(folder),
            "model": {"base": str(model_folder("llama", dtype="bfloat16"))},
            "adapter": {"method": "lora", "options": {"r": 2}},
            "data": {"train": str(data)},
            "training": {"device": "cpu", "max_steps": 2, "batch_size": 4, **training},
            "logging": {"progress": "quiet", "report": False},
        }
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", prompts(8))


def dtypes(model: Any) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}


def test_a_training_says_so_and_goes_on_with_what_it_began_with(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(tmp_path / "out", data)
    monkeypatch.setattr(module, "product_seconds", even)
    as_saved = open_session(chosen)
    monkeypatch.setattr(module, "product_seconds", slow)
    session = open_session(chosen)
    assert dtypes(as_saved.model) == {torch.bfloat16}
    assert dtypes(session.model) == {torch.float32}
    assert {**as_saved.start, "held": WIDENED} == session.start  # the base is known by what its files hold
    assert any("the weights are held in float32" in line for line in plan_run(session).lines())
    train(chosen)
    record = json.loads((tmp_path / "out" / "checkpoints" / "run.json").read_text())
    assert record["held"] == WIDENED
    monkeypatch.setattr(module, "product_seconds", never)
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    again = train(chosen, resume=True)
    assert again is not None
    assert again.steps == 2
    assert output_folder.held_of_run(tmp_path / "out") == WIDENED
    with pytest.raises(ConfigError, match="how the weights of model.base are held: it was float32, and is as saved"):
        fit(as_saved, resume=True)
    explicit = open_session(chosen.replace(model=dataclasses.replace(chosen.model, dtype="bfloat16")))
    assert dtypes(explicit.model) == {torch.bfloat16}


def test_the_other_commands_do_the_same(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = str(model_folder("llama", dtype="bfloat16"))
    monkeypatch.setattr(module, "product_seconds", slow)
    train(settings(tmp_path / "out", data))
    # Products that are only run forward: planted slow as well.
    monkeypatch.setattr(module, "product_seconds", lambda dtype, backward: 1.0 if dtype == torch.bfloat16 else 0.1)
    scored = open_scoring(scoring_settings(tmp_path / "out", [str(data)], base), tmp_path / "out")
    assert dtypes(scored.model.get_base_model()) == {torch.float32}  # type: ignore[operator]
    assert any("held in float32" in note for note in scored.notes)
    users = text_users(
        base, write_jsonl(tmp_path / "users.jsonl", [{"user": "a", **r} for r in prompts(2)]), user_column="user"
    )
    assert {parameter.dtype for parameter in users.model.parameters()} == {torch.float32}
    assert len(users.notes) == 1
    for dtype, found in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        served, notes = _base(ModelSettings(base=base, dtype=dtype), "generate", EngineSettings(device="cpu"))
        assert len(notes) == (dtype == "auto")
        assert {parameter.dtype for parameter in served.parameters()} == {found}
        pooled, _ = _base(ModelSettings(base=base, dtype=dtype), "embed", EngineSettings(device="cpu"))
        assert {parameter.dtype for parameter in pooled.parameters()} == {found}
        written = Weights(dtype, "none", "cpu").placed(net())
        assert {parameter.dtype for parameter in written.parameters()} == {found}
