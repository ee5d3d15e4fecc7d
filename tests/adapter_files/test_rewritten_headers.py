"""Other tools write a safetensors file anew, and its header's metadata with it: what decides how numbers are read does
not stand there alone. Merging, casting and sharding tools do so, and ``safetensors.torch.save_file`` by default.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kilotune import CheckpointError, LoraConfig, PeftModel, UnsupportedError, get_config, get_peft_model
from kilotune.adapter_files.reading import open_adapter
from kilotune.convert import rewrite
from tests.adapter_files.test_golden_ours import HERE, MANIFEST, check, script  # noqa: F401 - a fixture
from tests.support.models import Nested, mlp, randomize

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEADERS: dict[str, dict[str, str] | None] = {"gone": None, "another": {"format": "pt", "made_by": "a tool"}}


def rewritten(source: Path, folder: Path, header: str, **values: Any) -> Path:
    """The folder as another tool leaves it; ``values`` change its config, and None takes a key out."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(load_file(source / WEIGHTS), folder / WEIGHTS, HEADERS[header])
    config = {**json.loads((source / CONFIG).read_text()), **values}
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))
    return folder


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("case", MANIFEST)
def test_the_numbers_mean_the_same(case: str, header: str, script: ModuleType, tmp_path: Path) -> None:  # noqa: F811
    """Files of the first form, and of today's. A LoRA on an attention was read with a doubled out_proj."""
    script.make(case, tmp_path / "new")
    for source in (HERE / case, tmp_path / "new" / case):
        check(script, rewritten(source, tmp_path / "rewritten", header), MANIFEST[case])


def test_who_wrote_it_decides(script: ModuleType, tmp_path: Path) -> None:  # noqa: F811
    """The same numbers of PEFT's stand for twice the change of out_proj; PEFT names itself since 0.18."""
    plain = second_factor(script, rewritten(HERE / "lora_attention", tmp_path / "ours", "gone"))
    for name, values, factor in (
        ("PEFT", {"peft_version": "0.21.2"}, 2),
        ("a PEFT that names itself otherwise", {"peft_version": "main"}, 2),
        ("older PEFT", {"loftq_config": {}}, 2),
        ("mended PEFT", {"peft_version": "0.22.0"}, 1),
        ("ours", {"peft_version": None}, 1),
    ):
        folder = rewritten(HERE / "lora_attention", tmp_path / name, "gone", **values)
        assert torch.equal(second_factor(script, folder), factor * plain), name


def second_factor(script: ModuleType, folder: Path) -> torch.Tensor:  # noqa: F811
    model = PeftModel.from_pretrained(script.base("attention"), folder)
    return dict(model.adapter_parameters())["attn.out_proj.lora_B"].detach()


def test_what_cannot_be_told_is_refused(script: ModuleType, tmp_path: Path) -> None:  # noqa: F811
    """A config that some tool made of the options it knows, and no header."""
    short = dict.fromkeys(("auto_mapping", "fan_in_fan_out", "alpha_pattern", "revision"), "gone")
    folder = rewritten(HERE / "lora_attention", tmp_path / "short", "gone", **short)
    base = script.base("attention")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"'attn\.out_proj', and which program wrote it cannot be told.*null"):
        PeftModel.from_pretrained(base, folder)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert not any("adapters" in key for key in base.state_dict())
    assert second_factor(script, rewritten(folder, tmp_path / "told", "gone", peft_version=None)).any()


def test_nothing_is_refused_where_it_does_not_matter(tmp_path: Path) -> None:
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path / "lora")
    short = dict.fromkeys(("auto_mapping", "fan_in_fan_out", "alpha_pattern", "peft_version"), "gone")
    folder = rewritten(tmp_path / "lora", tmp_path / "short", "gone", **short)
    assert torch.equal(PeftModel.from_pretrained(mlp(), folder)(torch.ones(6)), model.eval()(torch.ones(6)))


def test_a_file_of_pefts_is_not_rewritten_as_ours_without_its_base(tmp_path: Path) -> None:
    """Under our header its numbers would mean what they say."""
    folder = rewritten(HERE / "lora_attention", tmp_path / "theirs", "gone", peft_version="0.21.2")
    with pytest.raises(UnsupportedError, match="is of an attention, whose change PEFT may add twice; give the base"):
        rewrite(open_adapter(folder))
    assert rewrite(open_adapter(HERE / "lora_attention")).state[1].keys() == load_file(folder / WEIGHTS).keys()


class Other(nn.Module):
    """The layers of Nested by their names, one of them with other sizes."""

    def __new__(cls) -> Any:
        net = Nested()
        net.stem = nn.Linear(7, 8)
        return net


METHODS: dict[str, dict[str, Any]] = {"unilora": {"theta_d_length": 9}, "intrinsic": {"d": 12}}


@pytest.mark.parametrize("method", METHODS)
def test_the_projections_are_still_held_against_their_checksum(method: str, tmp_path: Path) -> None:
    """A vector of the whole model has no layer's shape, so that only the checksum tells a base of other sizes."""
    model = get_peft_model(Nested(), get_config(method, target_modules=["stem", "head"], **METHODS[method]))
    randomize(model)
    model.save_pretrained(tmp_path / "ours")
    folder = rewritten(tmp_path / "ours", tmp_path / "rewritten", "gone")
    x = torch.linspace(-1, 1, 24).view(4, 6)
    assert torch.equal(PeftModel.from_pretrained(Nested(), folder)(x), model.eval()(x))
    with pytest.raises(CheckpointError, match="do(es)? not match the checkpoint: expected SHA-256"):
        PeftModel.from_pretrained(Other(), folder)


def test_a_checksum_that_is_none(tmp_path: Path) -> None:
    source = HERE / "unilora"
    shutil.copytree(source, tmp_path / "copy")
    section = {**json.loads((source / CONFIG).read_text())["kilotune"], "projections_sha256": [1]}
    folder = rewritten(source, tmp_path / "copy", "gone", kilotune=section)
    with pytest.raises(CheckpointError, match=r"projections_sha256: expected a checksum, got \[1\]"):
        open_adapter(folder)
