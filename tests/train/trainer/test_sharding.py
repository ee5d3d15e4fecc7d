"""DistributedDataParallel and FSDP2 in two real processes (gloo): tests/support/layers_worker.py, run once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed as dist

from kilotune import LoraConfig, VeraConfig, get_peft_model
from kilotune.errors import UnsupportedError
from kilotune.storage.sharded import is_sharded, processes, whole
from kilotune.train.trainer.parallel import blocks, ignore_sharded, shard_base
from tests.support.models import Nested, randomize
from tests.support.paths import ROOT, SUPPORT

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]


def launch(worker: str, *arguments: str, processes: int = 2, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    """Run a worker of tests/support under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        [*command, str(SUPPORT / worker), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each check of the worker gave, in each process."""
    folder = tmp_path_factory.mktemp("layers")
    run = launch("layers_worker.py", str(folder))
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    held: list[dict[str, Any]] = json.loads((folder / "found.json").read_text())
    assert len(held) == 2
    for one in held:
        for name, value in one.items():
            assert not (isinstance(value, str) and "Traceback" in value), f"{name}: {value}"
    return held


@pytest.mark.parametrize("form", ["replicated", "base_in_shards", "added_to_shards", "adapters_in_shards"])
def test_two_processes_give_the_adapter_of_one(form: str, found: list[dict[str, Any]]) -> None:
    for one in found:
        assert len(one[form]) == 13
        for method, (difference, change) in one[form].items():
            assert change > 0.05, method
            assert difference < 1e-6, method


def test_an_adapter_that_came_after_the_shards_is_not_trained_apart(found: list[dict[str, Any]]) -> None:
    """Its gradients were those of each process's own rows."""
    for one in found:
        late = one["added_to_shards_and_not_reduced"]
        assert "nobody reduces the adapter's gradients" in late["refused"]
        assert late["runs"]
        assert late["in order"] < 1e-6


def test_projections_are_not_sent_not_sharded_and_held_once(found: list[dict[str, Any]]) -> None:
    for one in found:
        seen = one["projections_stay_at_home"]
        assert seen.pop("numbers sent") == seen.pop("trained numbers") == 99
        assert seen == {"pairs": 2, "sharded": False, "moved": False, "among the parameters": False, "sent": 0}


def test_each_process_holds_half_of_the_frozen_weights_and_all_that_is_trained(found: list[dict[str, Any]]) -> None:
    parts = [one["each_process_holds_its_part"] for one in found]
    assert sum(part["here"] for part in parts) == parts[0]["whole"] == 523
    for part in parts:
        assert part["here"] < 0.6 * part["whole"]
        assert part["frozen and whole"] == 0
        assert part["trained and whole"]


def test_adding_gathers_nothing_but_what_the_lengths_of_dora_need(found: list[dict[str, Any]]) -> None:
    for one in found:
        counts = dict(one["gathered_once"])
        dora, layers = counts.pop("dvora")
        assert layers == 6
        assert dora == 10  # each weight and each bias once
        assert counts == {"vera": [0, 6], "lora_fa": [0, 6], "intrinsic": [0, 6], "ia3": [0, 6]}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("read", "UnsupportedError: the weight of a Linear is sharded over processes, so it can be read only while"),
        ("merge", "MergeError: stem: its weight is sharded over processes"),
        ("merge for good", "MergeError: stem: its weight is sharded over processes"),
        ("again", "UnsupportedError: shard_base: the model is sharded already"),
        ("a layer alone", "the block around its layer runs; shard the blocks, and no layer by itself"),
        ("copied", "head: FSDPLinear (sharded by itself; add the adapter first, and shard afterwards)"),
    ],
)
def test_what_cannot_be_done_with_shards_is_refused(what: str, message: str, found: list[dict[str, Any]]) -> None:
    for one in found:
        assert message in one["refusals"][what]


def test_a_layer_that_is_sharded_by_itself_runs_where_its_weight_is_not_read(found: list[dict[str, Any]]) -> None:
    assert [one["a_layer_by_itself"] for one in found] == [0.0, 0.0]


def test_weights_that_are_read_have_the_adapter_in_shards_too(found: list[dict[str, Any]]) -> None:
    for one in found:
        for name, differences in one["weights_that_are_read"].items():
            assert max(differences) < 1e-4, name


def test_disabling_and_inactive_adapters(found: list[dict[str, Any]]) -> None:
    assert [one["disabled_and_switched"] for one in found] == [0.0, 0.0]


def test_shards_are_saved_whole_and_by_one_process(found: list[dict[str, Any]]) -> None:
    assert found[0]["saved_from_shards"] == {
        "vera": True,
        "dora": True,
        "unilora": True,
        "head": True,
        "other processes write": False,
    }
    assert found[1]["saved_from_shards"] == {"other processes write": False}


def test_an_adapter_is_loaded_onto_shards(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one["loaded_onto_shards"] == {"vera": 0.0, "dora": 0.0, "unilora": 0.0, "head": 0.0}


def test_a_base_that_is_whole_nowhere(found: list[dict[str, Any]]) -> None:
    assert max(one["meta_then_shards"] for one in found) < 1e-6


def test_numbers_are_counted_as_of_the_whole_model(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one["counted"][0] == one["counted"][1]


# -- in this process -----------------------------------------------------------------------------------


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_without_a_process_group_nothing_is_sharded() -> None:
    model = get_peft_model(Nested(), VeraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(UnsupportedError, match=r"no process group; start with torchrun and call torch\.distributed"):
        shard_base(model)
    assert not any(is_sharded(p) for p in model.parameters())


@pytest.mark.usefixtures("alone")
def test_merged_and_quantised_weights_are_refused() -> None:
    pytest.importorskip("bitsandbytes")
    from tests.support.engine_support import adapted, nf4_llama

    model = get_peft_model(Nested(), LoraConfig(r=2, target_modules="all-linear"))
    randomize(model)
    model.merge_adapter()
    with pytest.raises(UnsupportedError, match=r"merged into the weights; unmerge_adapter\(\) first"):
        shard_base(model)
    quantised = adapted("vera", base=nf4_llama())
    with pytest.raises(UnsupportedError, match=r"'model\.layers\.0\.self_attn\.q_proj' is quantised \(.*nf4"):
        shard_base(quantised)
    assert not any(is_sharded(p) for p in quantised.parameters())


@pytest.mark.usefixtures("alone")
def test_one_process_is_a_group_too() -> None:
    model = get_peft_model(Nested(), VeraConfig(r=4, target_modules="all-linear"))
    randomize(model)
    x = torch.randn(3, 6)
    expected = model(x)
    assert shard_base(model) is model
    assert processes() == 1
    table = model.get_base_model().get_submodule("stem.base_layer").weight
    assert is_sharded(table)
    assert torch.equal(whole(table), Nested().stem.weight)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    plain = model.unload()
    assert "_ddp_params_and_buffers_to_ignore" not in plain.__dict__


def test_the_units_are_the_blocks() -> None:
    from tests.support.models import tiny_gpt2, tiny_llama

    nested, llama = Nested(blocks=3), tiny_llama()
    assert blocks(nested) == list(nested.blocks)
    assert blocks(llama) == list(llama.model.layers)
    model = get_peft_model(tiny_gpt2(), VeraConfig(r=2))
    assert blocks(model.get_base_model()) == list(model.transformer.h)
    assert blocks(torch.nn.Linear(2, 2)) == []


@pytest.mark.usefixtures("alone")
def test_what_ddp_ignores_follows_the_model() -> None:
    base = Nested()
    ignore_sharded(base)
    assert list(base._ddp_params_and_buffers_to_ignore) == []
    shard_base(base)
    assert "stem.weight" in set(base._ddp_params_and_buffers_to_ignore)
    model = get_peft_model(base, VeraConfig(r=2, target_modules="all-linear"))
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    names = set(model._ddp_params_and_buffers_to_ignore)
    frozen = [name for name, _ in model.named_parameters() if ".adapters." not in name]
    assert "model.stem.base_layer.weight" in frozen
    assert names == {*frozen, *(name.removeprefix("model.") for name in frozen)}
