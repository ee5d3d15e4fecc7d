"""The issue's list of bad input: each has its message, and leaves the model and the disk as they were."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kilotune import (
    AdapterError,
    CheckpointError,
    ConfigError,
    KilotuneError,
    LoraConfig,
    MergeError,
    PeftModel,
    TargetError,
    VeraConfig,
    get_peft_model,
)
from tests.support.models import Nested, Snapshot, disk, mlp, randomize, untie

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
X = torch.linspace(-1, 1, 24).view(4, 6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter for ``mlp()``, to be damaged."""
    model = get_peft_model(mlp(), VeraConfig(r=3, target_modules="all-linear"))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rejected(folder: Path, make: Callable[[], Any] = mlp, **options: Any) -> str:
    """Loading must fail with one of our errors, into a fresh base and beside another adapter; returns the message."""
    base, files = make(), disk(folder)
    before = Snapshot.of(base)
    with pytest.raises(KilotuneError) as caught:
        PeftModel.from_pretrained(base, folder, **options)
    assert Snapshot.of(base) == before
    model = get_peft_model(make(), LoraConfig(r=2, target_modules="all-linear"), "mine")
    before, held = Snapshot.of(model), model.projections.extents()
    with pytest.raises(type(caught.value)):
        model.load_adapter(folder, "bad", **options)
    assert Snapshot.of(model) == before
    assert model.projections.extents() == held
    assert list(model.peft_config) == ["mine"]
    assert disk(folder) == files
    return str(caught.value)


def change_config(folder: Path, **values: Any) -> None:
    """As in a file that others wrote; that ours does not go with another config has its own tests."""
    untie(folder)
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_section(folder: Path, **values: Any) -> None:
    section = json.loads((folder / CONFIG).read_text())["kilotune"]
    change_config(folder, kilotune={**section, **values})


# -- configurations --------------------------------------------------------------------------------


def test_unknown_config_key() -> None:
    with pytest.raises(ConfigError, match=r"VeraConfig:\n  - unknown option 'rnak'|Did you mean") as caught:
        VeraConfig(target_module=["fc1"])
    assert "unknown option 'target_module'. Did you mean 'target_modules'? All: " in str(caught.value)


def test_unknown_config_key_in_a_file(folder: Path) -> None:
    change_config(folder, d_initail=0.3)
    text = rejected(folder)
    assert str(folder / CONFIG) in text
    assert "d_initail=0.3: unknown option 'd_initail'. Did you mean 'd_initial'?" in text


@pytest.mark.parametrize("r", [0, -3])
def test_a_rank_that_is_not_positive(r: int, folder: Path) -> None:
    for cls in (VeraConfig, LoraConfig):
        with pytest.raises(ConfigError, match=f"r: expected a whole number >= 1, got {r}"):
            cls(r=r)
    change_config(folder, r=r)
    text = rejected(folder)
    assert str(folder / CONFIG) in text
    assert f"r: expected a whole number >= 1, got {r}" in text


@pytest.mark.parametrize("r", [4, 10**9, 10**30, 1e400, "8", None])
def test_a_file_whose_rank_is_not_that_of_its_tensors(r: Any, folder: Path) -> None:
    change_config(folder, r=r)
    text = rejected(folder)
    assert "shape of 0.vera_lambda_d" in text or "r: expected a whole number" in text


def test_targets_that_match_nothing() -> None:
    base = Nested()
    before = Snapshot.of(base)
    with pytest.raises(TargetError) as caught:
        get_peft_model(base, VeraConfig(r=2, target_modules=["mix.upp", "norms"]))
    text = str(caught.value)
    assert "no module is called 'mix.upp', or ends with it. Nearest: 'up' (2 x Linear)" in text
    assert "no module is called 'norms', or ends with it. Nearest: 'norm' (2 x LayerNorm; cannot be taken: " in text
    with pytest.raises(TargetError, match=r"'blocks\.0\.norm': LayerNorm is not a kind of layer"):
        get_peft_model(base, VeraConfig(r=2, target_modules=["norm"]))
    assert Snapshot.of(base) == before


def test_an_unknown_method(folder: Path) -> None:
    change_config(folder, peft_type="VERRA")
    text = rejected(folder)
    assert str(folder / CONFIG) in text
    assert "unknown method 'VERRA'. Did you mean 'vera'? Methods: " in text


@pytest.mark.parametrize("kind", [None, 5, ["VERA"], "", "PREFIX_TUNING"])
def test_a_peft_type_that_is_none_of_ours(kind: Any, folder: Path) -> None:
    change_config(folder, peft_type=kind)
    assert f"unknown method {str(kind)!r}" in rejected(folder)


def test_a_file_of_another_method(folder: Path) -> None:
    change_config(folder, peft_type="LORA")
    assert "unknown option" in rejected(folder)
    values = LoraConfig(r=3, target_modules="all-linear").to_dict()
    untie(folder)
    (folder / CONFIG).write_text(json.dumps(values))
    text = rejected(folder)
    assert "missing: 0.lora_A.weight (3, 6)" in text
    assert "unexpected: 0.vera_lambda_b (5,)" in text


@pytest.mark.parametrize("version", [2, 99, "1", 0, None])
def test_a_format_of_another_version(version: Any, folder: Path) -> None:
    change_section(folder, format=version)
    text = rejected(folder)
    assert f"format {version!r}, but this version reads format 1" in text
    assert "a newer kilotune is needed" in text


@pytest.mark.parametrize("section", [5, "x", [1], None, True])
def test_a_section_that_is_no_object(section: Any, folder: Path) -> None:
    change_config(folder, kilotune=section)
    assert f"'kilotune': expected an object, got {section!r}" in rejected(folder)


def test_an_unknown_key_in_our_section(folder: Path) -> None:
    change_section(folder, sharring="shape")
    assert "unknown option 'sharring'. Did you mean 'sharing'?" in rejected(folder)


# -- adapters in the model -------------------------------------------------------------------------

PATHS = ["a/b", "/etc/x", "..", ".", "a\\b", "../up", "C:\\x", "a/", "\\"]


@pytest.mark.parametrize("name", PATHS)
def test_adapter_names_with_path_separators(name: str, folder: Path) -> None:
    base = mlp()
    before = Snapshot.of(base)
    message = r"adapter name .*: must not be a path, because it names a folder; leave out / and \\"
    with pytest.raises(AdapterError, match=message):
        get_peft_model(base, VeraConfig(r=2, target_modules=["0"]), name)
    with pytest.raises(AdapterError, match=message):
        PeftModel.from_pretrained(base, folder, adapter_name=name)
    assert Snapshot.of(base) == before
    model = get_peft_model(base, VeraConfig(r=2, target_modules=["0"]))
    before = Snapshot.of(model)
    with pytest.raises(AdapterError, match=message):
        model.add_adapter(name, VeraConfig(r=2, target_modules=["0"]))
    with pytest.raises(AdapterError, match=message):
        model.load_adapter(folder, name)
    assert Snapshot.of(model) == before


@pytest.mark.parametrize("name", ["", None, 5, b"x", ["a"], "a\nb", "a\0b", "x" * 201], ids=repr)
def test_adapter_names_that_are_none(name: Any) -> None:
    base = mlp()
    before = Snapshot.of(base)
    with pytest.raises(AdapterError, match="adapter name"):
        get_peft_model(base, VeraConfig(r=2, target_modules=["0"]), name)
    assert Snapshot.of(base) == before


def test_an_adapter_name_that_is_taken(folder: Path) -> None:
    model = get_peft_model(mlp(), VeraConfig(r=2, target_modules=["0"]), "ann")
    randomize(model)
    before = Snapshot.of(model)
    for again in (
        lambda: model.add_adapter("ann", LoraConfig(r=2, target_modules=["2"])),
        lambda: model.load_adapter(folder, "ann"),
    ):
        with pytest.raises(AdapterError, match=r"'ann' is taken; delete_adapter\('ann'\) first, or take another"):
            again()
        assert Snapshot.of(model) == before


def test_deleting_an_adapter_that_is_not_there() -> None:
    model = get_peft_model(mlp(), VeraConfig(r=2, target_modules=["0"]), "ann")
    model.add_adapter("bob", LoraConfig(r=2, target_modules=["0"]))
    before = Snapshot.of(model)
    with pytest.raises(AdapterError, match=r"there is no adapter 'anne'\. Did you mean 'ann'\? There: 'ann', 'bob'"):
        model.delete_adapter("anne")
    assert Snapshot.of(model) == before


def test_merging_twice() -> None:
    model = get_peft_model(mlp(), VeraConfig(r=2, target_modules=["0"], init_weights=False))
    model.merge_adapter()
    before = Snapshot.of(model)
    with pytest.raises(MergeError, match=r"\['default'\] are merged already; call unmerge_adapter\(\) first"):
        model.merge_adapter()
    with pytest.raises(MergeError, match=r"\['default'\] are merged already"):
        model.merge_adapter(["default"])
    assert Snapshot.of(model) == before
    model.unmerge_adapter()
    once = get_peft_model(mlp(), VeraConfig(r=2, target_modules=["0"]))
    randomize(once)
    y = once(X)
    once.merge_adapter(["default", "default"])  # a name given twice is merged once
    torch.testing.assert_close(once(X), y)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_safe_merge_of_a_non_finite_adapter(value: float) -> None:
    model = get_peft_model(mlp(), VeraConfig(r=2, target_modules="all-linear", init_weights=False, bias="all"))
    with torch.no_grad():
        dict(model.adapter_parameters())["2.vera_lambda_b"][1] = value
        dict(model.adapter_parameters())["2.vera_lambda_d"].fill_(5.0)
    before = Snapshot.of(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError) as caught:
            merge(safe_merge=True)
        text = str(caught.value)
        assert "safe_merge refused adapters ['default']; nothing was changed:" in text
        assert "2: the merged weight would hold values that are not finite" in text
        assert "\n  - 0:" not in text  # the first layer is fine
        assert Snapshot.of(model) == before
    model.merge_adapter()  # without it, the caller has what he asked for
    assert model.merged_adapters == ["default"]


def test_safe_merge_sees_what_16_bits_cannot_hold() -> None:
    model = get_peft_model(mlp().half(), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    with torch.no_grad():
        dict(model.adapter_parameters())["0.lora_B"].fill_(1e6)
    before = Snapshot.of(model)
    with pytest.raises(MergeError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert Snapshot.of(model) == before


# -- another base ----------------------------------------------------------------------------------


def test_a_checkpoint_of_another_base_lists_every_misfit_at_once(tmp_path: Path) -> None:
    other = Nested()
    other.name_or_path = "ann/other"
    get_peft_model(other, VeraConfig(r=2, target_modules=["stem", "up", "head"])).save_pretrained(tmp_path / "x")
    tensors = load_file(tmp_path / "x" / WEIGHTS)
    tensors["base_model.model.extra.vera_lambda_b"] = torch.zeros(2)
    tensors["base_model.model.head.vera_lambda_b"] = torch.zeros(9)
    del tensors["base_model.model.stem.vera_lambda_d"]
    save_file(tensors, tmp_path / "x" / WEIGHTS)
    text = rejected(tmp_path / "x", Nested)
    assert f"the adapter in {tmp_path / 'x'} does not fit this Nested; it was trained on 'ann/other':" in text
    assert "missing: stem.vera_lambda_d (2,)" in text
    assert "unexpected: extra.vera_lambda_b (2,)" in text
    assert "shape of head.vera_lambda_b: the model expects (3,), the file has (9,)" in text
    assert text.count("\n  - ") == 3


def test_a_base_whose_layers_have_other_shapes(folder: Path) -> None:
    def wider() -> Any:
        base = mlp()
        base[0], base[2] = torch.nn.Linear(6, 7), torch.nn.Linear(7, 3)
        return base

    text = rejected(folder, wider)
    assert "shape of 0.vera_lambda_b: the model expects (7,), the file has (5,)" in text


def test_a_base_without_the_layers(folder: Path) -> None:
    text = rejected(folder, lambda: torch.nn.Sequential(torch.nn.Linear(6, 5)))
    assert "unexpected: 2.vera_lambda_b (3,)" in text
    change_config(folder, target_modules=["fc1", "fc2"])
    assert "no module is called 'fc1'" in rejected(folder)


@pytest.mark.filterwarnings("ignore::kilotune.OtherBaseWarning")  # the error says more
def test_the_same_names_and_other_input_sizes_are_found_by_the_projections_checksum(folder: Path) -> None:
    def other() -> Any:
        base = mlp()
        base[0] = torch.nn.Linear(60, 5)
        return base

    assert "the projections do not match the checkpoint: expected SHA-256" in rejected(folder, other)


def test_another_seed_in_the_config_is_found_by_the_checksum(folder: Path) -> None:
    change_config(folder, projection_prng_key=1)
    assert "the projections do not match the checkpoint" in rejected(folder)


# -- paths -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../x", "..", "..\\x", "sub\\x"])
def test_a_config_that_names_a_path_outside_its_folder(path: str, folder: Path) -> None:
    (folder.parent / "secret").write_bytes((folder / WEIGHTS).read_bytes())
    change_section(folder, weights=path)
    text = rejected(folder)
    assert f"{CONFIG}: weights {path!r} names a path outside the adapter's folder {folder}" in text


def test_a_config_may_name_another_file_in_its_folder(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "w.safetensors")
    change_section(folder, weights="w.safetensors")
    assert PeftModel.from_pretrained(mlp(), folder).active_adapters == ["default"]
    change_section(folder, weights="v.safetensors")
    assert f"{folder / 'v.safetensors'} is not there" in rejected(folder)
    for strange in ("", ".", CONFIG, "a\0b", 5):
        change_section(folder, weights=strange)
        assert str(folder) in rejected(folder)


@pytest.mark.parametrize("path", ["../adapter", "/", "..", "a/../..", "..\\x"])
def test_a_subfolder_outside_the_folder(path: str, folder: Path) -> None:
    assert f"subfolder {path!r} names a path outside the adapter's folder" in rejected(folder, subfolder=path)


# -- files -----------------------------------------------------------------------------------------


def test_a_folder_without_a_config(folder: Path) -> None:
    (folder / CONFIG).unlink()
    assert f"{folder} holds no {CONFIG}" in rejected(folder)


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        PeftModel.from_pretrained(mlp(), folder / CONFIG)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "is no JSON"),
        (b"{", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"[" * 200_000, "is no JSON"),
        (b"[]", "expected an object with the key 'peft_type'"),
        (b"null", "expected an object with the key 'peft_type'"),
        (b"{}", "expected an object with the key 'peft_type'"),
        (b" " * 10_000_001, "10000001 bytes; a configuration has a few thousand"),
        (b'{"peft_type": ' + b"9" * 10_000 + b"}", "is no JSON"),
    ],
    ids=range(9),
)
def test_a_config_that_is_no_config(raw: bytes, text: str, folder: Path) -> None:
    (folder / CONFIG).write_bytes(raw)
    message = rejected(folder)
    assert text in message
    assert str(folder / CONFIG) in message


def test_a_pickle_is_never_opened(folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.write_text, (folder / "boom", "x"))

    (folder / WEIGHTS).unlink()
    assert f"{folder / WEIGHTS} is not there" in rejected(folder)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    text = rejected(folder)
    assert "is a pickle, which can run any code when it is loaded, so it is never opened" in text
    assert "safe_serialization=True" in text
    (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb()))
    assert "no safetensors file" in rejected(folder)
    assert not (folder / "boom").exists()


def with_header(folder: Path, header: bytes, body: bytes = b"", length: int | None = None) -> None:
    size = len(header) if length is None else length
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + header + body)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 40, -1, -4, -100])
def test_a_truncated_file(keep: int, folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[:keep])
    text = rejected(folder)
    assert str(folder / WEIGHTS) in text
    assert "truncated" in text


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 100_000_001, 10**12, 0xFFFFFFFF, 500])
def test_an_oversized_header(length: int, folder: Path) -> None:
    with_header(folder, b'{"a":{}}', length=length)
    text = rejected(folder)
    assert f"the header claims {length} bytes, but the file has 8 after its first 8" in text


def entry(**changes: Any) -> bytes:
    values = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}
    return json.dumps({"base_model.model.0.vera_lambda_b": values}).encode()


HOSTILE: dict[str, bytes] = {
    "no JSON": b"nonsense",
    "empty": b"",
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
    "a list": b"[1]",
    "a number": b"5",
    "null": b"null",
    "an entry that is a list": b'{"a":[0,4]}',
    "an entry that is null": b'{"a":null}',
    "no offsets": b'{"a":{"dtype":"F32","shape":[1]}}',
    "one offset": entry(data_offsets=[4]),
    "no list of offsets": entry(data_offsets=4),
    "offsets that are text": entry(data_offsets=["0", "x"]),
    "negative offset": entry(data_offsets=[-4, 4]),
    "negative end": entry(data_offsets=[0, -4]),
    "reversed offsets": entry(data_offsets=[8, 4]),
    "end beyond the file": entry(data_offsets=[0, 8]),
    "end far beyond": entry(data_offsets=[0, 2**63]),
    "huge end": entry(data_offsets=[0, 10**300]),
    "infinite end": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,Infinity]}}',
    "end that is no number": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,NaN]}}',
    "fractional end": entry(data_offsets=[0, 4.5]),
    "huge shape": entry(shape=[2**62, 2**62]),
    "negative shape": entry(shape=[-1]),
    "shape that does not fit": entry(shape=[2]),
    "unknown dtype": entry(dtype="F33"),
    "no UTF-8": b'{"\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "overlap": json.dumps(
        {k: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for k in ("base_model.a", "base_model.b")}
    ).encode(),
    "hole": entry(data_offsets=[1, 4]),
    "metadata that is a list": b'{"__metadata__":[1],' + entry()[1:],
    "metadata that is nested": b'{"__metadata__":{"a":{}},' + entry()[1:],
    "metadata only": b'{"__metadata__":{"a":"b"}}',
    "integers": entry(dtype="I32"),
    "key without prefix": b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header(name: str, folder: Path) -> None:
    with_header(folder, HOSTILE[name], b"\0\0\0\0")
    assert str(folder) in rejected(folder)


def test_tensors_whose_bytes_were_damaged(folder: Path) -> None:
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-3] ^= 1
    (folder / WEIGHTS).write_bytes(raw)
    text = rejected(folder)
    assert f"{folder / WEIGHTS} is damaged: expected SHA-256 " in text
    assert " of its tensors, got " in text


def test_integers_where_floats_belong(folder: Path) -> None:
    tensors = {key: value.to(torch.int32) for key, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    text = rejected(folder)
    assert "type of 0.vera_lambda_b: expected a floating-point tensor, the file has torch.int32" in text
