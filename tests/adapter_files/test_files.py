"""save_pretrained, load_adapter and from_pretrained: folders, subfolders, hub ids, what a file may hold."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kilotune import (
    AdapterConfig,
    AdapterError,
    CheckpointError,
    ConfigError,
    LoraConfig,
    LoraModel,
    PeftModel,
    VeraConfig,
    VeraModel,
    get_config,
    get_peft_model,
)
from kilotune.adapter_files import files, writing
from kilotune.adapter_files.files import not_finite, tensors_checksum
from kilotune.adapter_files.peft_layout import full_key
from kilotune.fleet import open_store
from tests.support.guards import refusal_leaves_the_disk, saved_is_loaded
from tests.support.models import Nested, Snapshot, disk, mlp, randomize

X = torch.linspace(-1, 1, 24).view(4, 6)
FILES = ["adapter_config.json", "adapter_model.safetensors"]

CONFIGS: dict[str, AdapterConfig] = {
    "vera": VeraConfig(r=4, target_modules="all-linear"),
    "vera, seed": VeraConfig(r=3, target_modules=["up", "head"], projection_prng_key=2**63),
    "vera, by shape": VeraConfig(r=3, target_modules="all-linear", sharing="shape"),
    "vera, peft's": VeraConfig(r=3, target_modules=["up", "down"], generator="peft"),
    "vera, all biases": VeraConfig(r=3, target_modules=["up", "down"], bias="all"),
    "vera, some layers": VeraConfig(r=3, target_modules=["up"], layers_to_transform=1, layers_pattern="blocks"),
    "vera, some not": VeraConfig(r=3, target_modules="all-linear", exclude_modules=["head", "stem"]),
    "vera, regex": VeraConfig(r=3, target_modules=r".*\.(up|down)", exclude_modules=r".*0.*"),
    "lora": LoraConfig(r=2, target_modules=["stem", "down"], lora_dropout=0.25),
    "lora, rs": LoraConfig(r=2, lora_alpha=3.5, use_rslora=True, target_modules="all-linear", bias="lora_only"),
    "lora, patterns": LoraConfig(r=2, target_modules="all-linear", rank_pattern={"up": 5}, alpha_pattern={"stem": 1}),
    "lora, head": LoraConfig(r=2, target_modules=["up"], modules_to_save=["head", "norm"]),
    "lora, some not": LoraConfig(r=2, target_modules="all-linear", exclude_modules=["head"]),
}
every_config = pytest.mark.parametrize("name", CONFIGS)


@every_config
def test_saving_and_loading_keeps_every_bit_and_every_option(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    saved_is_loaded(Nested, config, X)
    model = get_peft_model(Nested(), config)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(Nested(), tmp_path / "adapter", is_trainable=True)
    assert again.peft_config == model.peft_config
    assert list(again.adapted_layers()) == list(model.adapted_layers())


@pytest.mark.parametrize("name", [n for n in CONFIGS if n.startswith("vera")])
def test_with_saved_projections_the_layers_are_the_same_to_rounding(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name].replace(save_projection=True)
    model = get_peft_model(Nested(), config).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Nested(), tmp_path)
    torch.testing.assert_close(again(X), model(X), rtol=1e-5, atol=1e-5)
    assert list(again.adapted_layers()) == list(model.adapted_layers())
    again.save_pretrained(tmp_path / "again")
    third = PeftModel.from_pretrained(Nested(), tmp_path / "again")
    assert torch.equal(third(X), again(X))


@every_config
def test_the_same_adapter_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        torch.manual_seed(3)
        model = get_peft_model(Nested(), CONFIGS[name])
        model.save_pretrained(tmp_path / folder)
    assert disk(tmp_path / "one") == disk(tmp_path / "two")
    model.save_pretrained(tmp_path / "one")  # and over what is there
    assert disk(tmp_path / "one") == disk(tmp_path / "two")


def test_a_file_is_as_small_as_the_adapter(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(2000, 3000)), VeraConfig(r=256, target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    numbers = 3000 + 256
    assert 4 * numbers < (tmp_path / FILES[1]).stat().st_size < 4 * numbers + 1000
    assert (tmp_path / FILES[0]).stat().st_size < 2000


def test_no_projection_is_in_the_file_unless_asked_for(tmp_path: Path) -> None:
    for save, keys in ((False, set()), (True, {"base_model.vera_A", "base_model.vera_B"})):
        config = VeraConfig(r=4, target_modules=["0"], save_projection=save)
        get_peft_model(mlp(), config).save_pretrained(tmp_path / str(save))
        with safe_open(tmp_path / str(save) / FILES[1], "pt") as file:
            found = set(file.keys())
        assert found == keys | {f"base_model.model.0.vera_lambda_{name}" for name in "bd"}


# -- several ---------------------------------------------------------------------------------------


def several() -> PeftModel:
    model = get_peft_model(Nested(), CONFIGS["vera"])
    model.add_adapter("second", CONFIGS["lora"])
    model.add_adapter("third", CONFIGS["vera, all biases"])
    for seed, name in enumerate(model.peft_config):
        randomize(model, name, seed=seed)
    return model.eval()


def test_default_goes_into_the_folder_and_others_into_subfolders(tmp_path: Path) -> None:
    model = several()
    model.save_pretrained(tmp_path / "all")
    assert sorted(disk(tmp_path / "all")) == sorted(
        [*FILES, "second", "third", *(f"{name}/{file}" for name in ("second", "third") for file in FILES)]
    )
    again = PeftModel.from_pretrained(Nested(), tmp_path / "all")
    again.load_adapter(tmp_path / "all" / "second", "second")
    again.load_adapter(tmp_path / "all", "third", subfolder="third")
    for name in model.peft_config:
        model.set_adapter(name)
        again.set_adapter(name)
        assert torch.equal(again(X), model(X)), name
    model.save_pretrained(tmp_path / "one", selected_adapters=["third"])
    assert sorted(disk(tmp_path / "one")) == ["third", *(f"third/{file}" for file in FILES)]
    with pytest.raises(AdapterError, match=r"no adapter 'fourth'"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["third", "fourth"])
    assert not (tmp_path / "none").exists()


def test_the_subfolders_are_named_when_the_folder_holds_no_adapter(tmp_path: Path) -> None:
    several().save_pretrained(tmp_path, selected_adapters=["second", "third"])
    with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json\. Adapters are in .*: second, third"):
        PeftModel.from_pretrained(Nested(), tmp_path)


def test_saving_while_merged_or_disabled_saves_the_adapter(tmp_path: Path) -> None:
    model = several()
    model.set_adapter(["default", "third"])
    model.save_pretrained(tmp_path / "plain")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    with model.disable_adapter():
        model.save_pretrained(tmp_path / "disabled")
    assert disk(tmp_path / "merged") == disk(tmp_path / "plain") == disk(tmp_path / "disabled")


def test_loading_into_a_merged_model_leaves_it_merged(tmp_path: Path) -> None:
    model = several()
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    y = model(X)
    model.load_adapter(tmp_path / "second", "again")
    assert torch.equal(model(X), y)
    model.unmerge_adapter()
    model.set_adapter("again")
    twin = several()
    twin.set_adapter("second")
    assert torch.equal(model(X), twin(X))


def test_loaded_adapters_are_frozen_unless_trainable(tmp_path: Path) -> None:
    get_peft_model(mlp(), VeraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(mlp(), tmp_path)
    assert model.get_nb_trainable_parameters()[0] == 0
    assert not model.training
    assert model.peft_config["default"].inference_mode
    model.load_adapter(tmp_path, "more", is_trainable=True)
    assert model.active_adapters == ["default"]
    model.set_adapter("more")
    assert model.get_nb_trainable_parameters()[0] == 2 + 5


def test_the_models_of_one_method_load_their_own_only(tmp_path: Path) -> None:
    get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    model = VeraModel(mlp(), VeraConfig(r=2, target_modules=["0"]), "a")
    before = Snapshot.of(model)
    with pytest.raises(ConfigError, match="VeraModel cannot load a LoraConfig adapter; use PeftModel"):
        model.load_adapter(tmp_path, "b")
    assert Snapshot.of(model) == before
    lora = LoraModel(mlp(), LoraConfig(r=3, target_modules=["0"]), "a")
    lora.load_adapter(tmp_path, "b")
    assert list(lora.peft_config) == ["a", "b"]


class WithNorm(nn.Module):
    """A head whose norm keeps running statistics, an integer among them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 4)
        self.head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_a_head_with_running_statistics_is_saved_and_loaded(tmp_path: Path) -> None:
    model = get_peft_model(WithNorm(), VeraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    for _ in range(3):
        model(X)
    model.eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(WithNorm(), tmp_path)
    assert torch.equal(again(X), model(X))
    assert again.state_dict()["model.head.modules_to_save.default.0.num_batches_tracked"] == 3


def test_the_base_models_name_is_noted(tmp_path: Path) -> None:
    base = mlp()
    base.name_or_path = "me/my-model"
    model = get_peft_model(base, VeraConfig(r=2, target_modules=["0"]))
    assert model.peft_config["default"].base_model_name_or_path == "me/my-model"
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / FILES[0]).read_text())["base_model_name_or_path"] == "me/my-model"


def test_a_path_object_a_string_and_a_relative_path_name_a_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(mlp(), VeraConfig(r=2, target_modules=["0"], init_weights=False))
    for target in ("plain", Path("a") / "b", str(tmp_path / "c"), "."):
        model.save_pretrained(target)
        again = PeftModel.from_pretrained(mlp(), target)
        assert torch.equal(again(X), model(X))
    assert {p.name for p in tmp_path.iterdir()} == {"plain", "a", "c", *FILES}


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_what_is_written_has_the_modes_of_any_new_file(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)  # a folder that all may write to does not make the adapter's such a one
    mask = os.umask(0o027)
    try:
        get_peft_model(mlp(), VeraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path / "new")
    finally:
        os.umask(mask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o750
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "new").iterdir()} == {0o640}


# -- hub -------------------------------------------------------------------------------------------


def hub_cache(cache: Path, source: Path, repo: str, revision: str = "main") -> None:
    """A cache folder as huggingface_hub keeps it: links from the snapshot to blobs."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / revision).write_text(commit)
    (home / "blobs").mkdir()
    for number, path in enumerate(p for p in sorted(source.rglob("*")) if p.is_file()):
        blob = home / "blobs" / f"{number:040x}"
        blob.write_bytes(path.read_bytes())
        link = home / "snapshots" / commit / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


def test_a_hub_id_is_loaded_from_the_cache(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    model = several()
    model.save_pretrained(tmp_path / "files")
    hub_cache(tmp_path / "cache", tmp_path / "files", "ann/small", "v1")
    where = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True, "revision": "v1"}
    again = PeftModel.from_pretrained(Nested(), "ann/small", **where)
    assert torch.equal(again(X), model(X))
    again.load_adapter("ann/small", "second", subfolder="second", **where)
    model.set_adapter("second")
    again.set_adapter("second")
    assert torch.equal(again(X), model(X))


@pytest.mark.parametrize("repo", ["ann/missing", "missing"])
def test_a_hub_id_that_cannot_be_had_says_so(repo: str, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    base = Nested()
    before = Snapshot.of(base)
    message = rf"'{repo}' is no folder here, and adapter_config\.json cannot be had from the hub: "
    for local in (True, False):  # the tests run offline
        with pytest.raises(CheckpointError, match=message):
            PeftModel.from_pretrained(base, repo, cache_dir=str(tmp_path), local_files_only=local)
    assert Snapshot.of(base) == before


@pytest.mark.parametrize("source", [None, "", 5])
def test_what_names_nothing_is_refused(source: Any) -> None:
    with pytest.raises(CheckpointError, match=r"expected a folder or a hub id \(owner/name\), got "):
        PeftModel.from_pretrained(Nested(), source)


@pytest.mark.parametrize("source", ["no/such/folder", "../elsewhere", "a b", "~/x", "owner/na me", "http://x/y"])
def test_what_is_no_folder_and_no_hub_id_says_so(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"is no folder here, and no hub id|is no folder in \.\."):
        PeftModel.from_pretrained(Nested(), source)


# -- writing that fails ----------------------------------------------------------------------------


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


FAILURES = [(call, there) for call in ("save_file", "config", "sync") for there in (True, False)]
FAILURES += [("rename", False), ("replace", True), ("second replace", True)]


@pytest.mark.parametrize(("fails", "there"), FAILURES)
def test_a_full_disk_leaves_nothing_half_written(
    fails: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a" / "b"
    if there:
        get_peft_model(Nested(), CONFIGS["vera"]).save_pretrained(target)
    model = several()
    calls = []

    def second(source: Any, place: Any) -> None:
        calls.append(place)
        if len(calls) == 2:
            full_disk()
        Path(source).rename(place)

    def half_config(self: Path, text: str, **options: Any) -> None:
        self.write_bytes(text[: len(text) // 2].encode())
        full_disk()

    {
        "save_file": lambda: monkeypatch.setattr(files, "save_file", full_disk),
        "rename": lambda: monkeypatch.setattr(Path, "rename", full_disk),
        "replace": lambda: monkeypatch.setattr(os, "replace", full_disk),
        "second replace": lambda: monkeypatch.setattr(os, "replace", second),
        "config": lambda: monkeypatch.setattr(Path, "write_text", half_config),
        "sync": lambda: monkeypatch.setattr(os, "fsync", full_disk),
    }[fails]()
    error = refusal_leaves_the_disk(tmp_path, lambda: model.save_pretrained(target, selected_adapters=["default"]))
    assert isinstance(error, CheckpointError)
    assert f"cannot write the adapter to {target}" in str(error)
    assert "No space left on device" in str(error)


def test_safetensors_own_error_of_a_full_disk_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise files.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", fails)
    error = refusal_leaves_the_disk(tmp_path, lambda: several().save_pretrained(tmp_path / "x"))
    assert isinstance(error, CheckpointError)


def test_saving_where_a_file_stands_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    error = refusal_leaves_the_disk(tmp_path, lambda: several().save_pretrained(tmp_path / "file"))
    assert isinstance(error, CheckpointError)
    assert "it is a file, expected a folder or nothing" in str(error)
    error = refusal_leaves_the_disk(tmp_path, lambda: several().save_pretrained(tmp_path / "file" / "inside"))
    assert isinstance(error, CheckpointError)


def test_an_adapter_that_cannot_be_written_out_stops_before_the_first_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = several()
    real = writing.state_of

    def broken(installed: Any) -> Any:
        if installed.adapter == "third":
            raise CheckpointError("cannot be exported")
        return real(installed)

    monkeypatch.setattr(writing, "state_of", broken)
    error = refusal_leaves_the_disk(tmp_path, lambda: model.save_pretrained(tmp_path / "x"))
    assert str(error) == "cannot be exported"


@pytest.mark.parametrize("name", ["float8_e8m0fnu", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("method", ["lora", "vera", "intrinsic", "unilora"])
def test_numbers_of_eight_bits_are_read_or_refused_in_one_line(name: str, method: str, tmp_path: Path) -> None:
    """A scale's type, which safetensors itself cannot read, and types that hold numbers; of layers and of the model."""
    model = get_peft_model(mlp(), get_config(method, target_modules=["0"]))
    randomize(model)
    model.save_pretrained(tmp_path)
    tensors = {key: value.to(getattr(torch, name)) for key, value in load_file(tmp_path / files.WEIGHTS_NAME).items()}
    save_file(tensors, tmp_path / files.WEIGHTS_NAME)
    if name == "float8_e8m0fnu":
        with pytest.raises(CheckpointError, match=r"has numbers of the type 'F8_E8M0', which no adapter is kept in"):
            PeftModel.from_pretrained(mlp(), tmp_path)
        with pytest.raises(CheckpointError, match="'F8_E8M0'"):
            open_store(f"sqlite:///{tmp_path}/a.db").put("a", tmp_path)
        return
    loaded = dict(PeftModel.from_pretrained(mlp(), tmp_path).adapter_parameters())
    assert {parameter.dtype for parameter in loaded.values()} == {torch.float32}
    assert sorted(float(p.sum()) for p in loaded.values()) == sorted(float(t.float().sum()) for t in tensors.values())


def test_pickles_are_never_written(tmp_path: Path) -> None:
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path / "safe", safe_serialization=True)
    with pytest.raises(ConfigError, match="safe_serialization: expected True, got False"):
        model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    assert not (tmp_path / "pickle").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_are_not_loaded(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path / "good")
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(tmp_path / "good" / FILES[1]).items()}
    tensors["base_model.model.0.lora_B.weight"][1, 1] = value
    save_file(tensors, tmp_path / "good" / FILES[1])  # as another tool writes it, without a checksum
    base = mlp()
    before = Snapshot.of(base)
    with pytest.raises(CheckpointError, match=r"values of .*0\.lora_B\.weight are not finite"):
        PeftModel.from_pretrained(base, tmp_path / "good")
    assert Snapshot.of(base) == before


def test_a_version_of_peft_of_thousands_of_digits_is_no_raw_error(tmp_path: Path) -> None:
    """Python refuses to make a number of them."""
    adapted_folder = tmp_path / "a"
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(adapted_folder)
    config = json.loads((adapted_folder / "adapter_config.json").read_text())
    (adapted_folder / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "9" * 5000 + ".1"}))
    assert PeftModel.from_pretrained(mlp(), adapted_folder).peft_config["default"].r == 2


def test_all_tensors_that_are_not_finite_are_named_small_large_and_of_any_type() -> None:
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
    sizes = (1, 7, 70_000)
    tensors = {f"{kind}-{size}": torch.ones(size).to(kind) for kind in kinds for size in sizes}
    tensors |= {"whole": torch.ones(3, dtype=torch.int64), "none": torch.ones(0), "view": torch.ones(4, 3).T}
    assert not_finite(tensors) == []
    for key in [key for key in tensors if key not in ("whole", "none")]:
        bad = {name: value.clone() for name, value in tensors.items()}
        bad[key][..., -1:] = torch.tensor([math.nan]).to(bad[key].dtype)
        assert not_finite(bad) == [key]
    bad = {name: torch.full_like(value, math.inf) for name, value in tensors.items() if value.dtype == torch.float32}
    assert sorted(not_finite(bad)) == sorted(name for name in bad if name != "none")


def test_the_checksum_is_that_of_names_types_shapes_and_bytes() -> None:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)
    draws = torch.Generator().manual_seed(0)
    tensors = {f"{kind}": (torch.randn(3, 4, generator=draws) * 3).to(kind) for kind in kinds}
    tensors |= {"turned": torch.arange(12.0).view(3, 4).T, "one": torch.tensor(2.5), "none": torch.ones(0, 2)}
    tensors["trained"] = torch.nn.Parameter(torch.arange(3.0))
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().clone(memory_format=torch.contiguous_format)
        raw = bytes(value.view(-1).view(torch.uint8).tolist())
        digest.update(f"{key};{value.dtype};{tuple(value.shape)};".encode() + raw)
    assert tensors_checksum(tensors) == digest.hexdigest()


def test_keys_of_layers_lie_below_the_model_and_others_beside_it() -> None:
    layers = dict.fromkeys(["a", "a.b", "model.layers.1.q"])
    for key in ("a.w", "a.b.w", "a.b.c.w", "model.layers.1.q.w", "model.layers.1.q.w.x"):
        assert full_key(key, layers) == f"base_model.model.{key}"
    for key in ("w", "ab.w", "a", "model.layers.1.w", "model.layers.10.q.w", "x.a.w", "vera_A"):
        assert full_key(key, layers) == f"base_model.{key}"
