"""Files in both directions with PEFT live: what it writes loads here, what we write loads there, outputs equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import kilotune
from tests.peft_parity.files import (
    check_ours_to_peft,
    check_outputs,
    check_peft_to_ours,
    files,
    peft_load,
    scrambled,
)
from tests.peft_parity.oracle import (
    IDS,
    METHODS,
    assert_close,
    assert_same,
    base,
    peft_parameters,
    quiet,
    run,
    scramble,
    twins,
)

TARGETS: dict[str, Any] = {
    "llama": None,
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "dense"],
    "bert-mlm": ["query", "dense"],
    "mlp": "all-linear",
}
# What a file can hold beside the plain adapter.
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vera with projections": ("mlp", "vera", {}),
    "vera with projections, Conv1D": ("gpt2", "vera", {}),
    "vera with projections, Llama": ("llama", "vera", {}),
    "vera seed-only": ("mlp", "vera", {"save_projection": False, "projection_prng_key": 12}),
    "vera seed-only, Conv1D": ("gpt2", "vera", {"save_projection": False, "projection_prng_key": 2**63 + 5}),
    "vera all biases": ("bert", "vera", {"bias": "all"}),
    "vera all biases, tied": ("bert-mlm", "vera", {"bias": "all"}),
    "vera own biases, Conv1D": ("gpt2", "vera", {"bias": "vera_only"}),
    "vera head, all biases": ("bert", "vera", {"task_type": "SEQ_CLS", "bias": "all"}),
    "vera whole module": ("mlp", "vera", {"modules_to_save": ["blocks.0"]}),
    "vera dropout": ("mlp", "vera", {"vera_dropout": 0.1, "d_initial": 1e-7}),
    "lora": ("mlp", "lora", {}),
    "lora, Conv1D": ("gpt2", "lora", {}),
    "lora all biases": ("bert", "lora", {"bias": "all"}),
    "lora all biases, tied": ("bert-mlm", "lora", {"bias": "all"}),
    "lora own biases": ("mlp", "lora", {"bias": "lora_only"}),
    "lora head": ("bert", "lora", {"task_type": "SEQ_CLS"}),
    "lora whole module": ("llama", "lora", {"modules_to_save": ["lm_head", "norm"]}),
    "lora ranks": ("llama", "lora", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.*": 3}}),
    "lora rslora": ("mlp", "lora", {"use_rslora": True, "lora_alpha": 5, "lora_dropout": 0.2}),
    "lora one block": ("llama", "lora", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "lora excluded": ("mlp", "lora", {"exclude_modules": [".*blocks.1.*", "head"]}),
    "lora gaussian": ("mlp", "lora", {"init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name, method, options", VARIANTS.values(), ids=VARIANTS)
def test_peft_to_ours_and_back(
    name: str, method: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    check_peft_to_ours(name, method, dtype, {"r": 6, "target_modules": TARGETS[name], **options}, tmp_path)


OURS: dict[str, Callable[[], kilotune.AdapterConfig]] = {
    "vera nested": lambda: kilotune.VeraConfig(r=5, save_projection=True),
    "vera nested, biases": lambda: kilotune.VeraConfig(
        r=5, save_projection=True, bias="all", projection_prng_key=2**64 - 1
    ),
    "vera shape": lambda: kilotune.VeraConfig(r=5, save_projection=True, sharing="shape"),
    "vera shape, biases": lambda: kilotune.VeraConfig(r=5, save_projection=True, sharing="shape", bias="vera_only"),
    "vera excluded": lambda: kilotune.VeraConfig(
        r=5, save_projection=True, bias="all", exclude_modules=r".*\.[01]\..*"
    ),
    "vera peft seed-only": lambda: kilotune.VeraConfig(r=5, generator="peft", projection_prng_key=9),
    "vera peft seed-only, excluded": lambda: kilotune.VeraConfig(
        r=5, generator="peft", exclude_modules=["1.1", "first"]
    ),
    "vera peft with projections": lambda: kilotune.VeraConfig(r=5, generator="peft", save_projection=True),
    "lora": lambda: kilotune.LoraConfig(r=5, lora_alpha=3),
    "lora, all options": lambda: kilotune.LoraConfig(
        r=5, use_rslora=True, bias="all", rank_pattern={"c_proj|3": 2}, exclude_modules=["head"]
    ),
}


# Those with names of the MLP in them run on the MLP only.
MLP_ONLY = ("excluded", "options")
PAIRS = [(n, key) for n in ("mlp", "gpt2", "opt") for key in OURS if n == "mlp" or not key.endswith(MLP_ONLY)]


@pytest.mark.parametrize("name, key", PAIRS)
def test_ours_to_peft_and_back(name: str, key: str, tmp_path: Path) -> None:
    check_ours_to_peft(name, OURS[key](), tmp_path)


def test_stacked_ranks() -> None:
    """sharing='shape' in PEFT's form: a block of ranks per shape, and zeros in the other blocks of d."""
    config = kilotune.VeraConfig(r=3, target_modules="all-linear", save_projection=True, sharing="shape")
    model = scrambled(kilotune.get_peft_model(base("mlp"), config))
    shapes = {
        (layer.base_layer.out_features, layer.base_layer.in_features) for layer in model.adapted_layers().values()
    }
    values, tensors = kilotune.adapter_files.writing.state_of(model.installed("default"))[:2]
    assert_same(len(shapes), 4, "shapes of the MLP's layers")
    assert_same(values["r"], 3 * 4, "stacked rank")
    for key, d in tensors.items():
        if key.endswith("vera_lambda_d"):
            blocks = [bool(block.any()) for block in d.reshape(4, 3)]
            assert_same(sum(blocks), 1, f"blocks of {key} in use")


@pytest.mark.parametrize("sharing", ["nested", "shape"])
@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_a_seed_only_portable_file_makes_peft_raise(name: str, sharing: str, tmp_path: Path) -> None:
    """PEFT would draw other matrices for the seed, so it must not load the file at all; we must."""
    config = kilotune.VeraConfig(r=5, target_modules="all-linear", sharing=sharing)
    model = scrambled(kilotune.get_peft_model(base(name), config))
    model.save_pretrained(tmp_path)
    with pytest.raises(KeyError, match="KILOTUNE_VERA"), quiet():
        peft.PeftModel.from_pretrained(base(name), tmp_path)
    loaded = kilotune.PeftModel.from_pretrained(base(name), tmp_path)
    with torch.no_grad():
        assert torch.equal(run(loaded), run(model))


def test_several_adapters_in_subfolders(tmp_path: Path) -> None:
    """PEFT writes 'default' to the folder and others below it; so do we, and each side loads all of the other's."""
    ours_cls, theirs_cls = METHODS["lora"]
    with quiet():
        theirs = peft.get_peft_model(base("mlp"), theirs_cls(r=3, target_modules=["0.1"]))
        theirs.add_adapter("second", theirs_cls(r=5, lora_alpha=2, target_modules=["first", "2.3"]))
        theirs.add_adapter("default-2", theirs_cls(r=2, target_modules=["first"], bias="none"))
        theirs.save_pretrained(tmp_path / "theirs")
    names = {"default": ".", "second": "second", "default-2": "default-2"}
    for name in names:
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for _, p in sorted(peft_parameters(theirs, name).items()):
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    ours = kilotune.PeftModel.from_pretrained(base("mlp"), tmp_path / "theirs")
    for name in list(names)[1:]:
        ours.load_adapter(tmp_path / "theirs" / name, name)
    ours.save_pretrained(tmp_path / "ours")
    back = peft_load(tmp_path / "ours", base("mlp"))
    for name in list(names)[1:]:
        back.load_adapter(tmp_path / "ours" / name, name)
    outputs = []
    for name in names:
        for model in (theirs, ours, back):
            model.eval()
            model.set_adapter(name)
        check_outputs(ours, theirs)
        check_outputs(back, theirs)
        outputs.append(run(ours).detach())
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    assert not torch.allclose(outputs[1], outputs[2], atol=1e-3)
    assert isinstance(ours.peft_config["second"], ours_cls)


def test_vera_adapters_that_peft_cannot_hold_together(tmp_path: Path) -> None:
    """Two keys, ranks and target sets: written by two PEFT models, here they live in one."""
    singles = {}
    for name, options in {
        "one": {"r": 6, "projection_prng_key": 1, "target_modules": ["0.1"]},
        "two": {"r": 3, "projection_prng_key": 2, "target_modules": "all-linear", "save_projection": False},
    }.items():
        both = twins("mlp", "vera", **options)
        scramble(both)
        with quiet():
            both.theirs.save_pretrained(tmp_path / name)
        singles[name] = both.theirs
    model = kilotune.PeftModel.from_pretrained(base("mlp"), tmp_path / "one", "one")
    model.load_adapter(tmp_path / "two", "two")
    for name, single in singles.items():
        model.set_adapter(name)
        check_outputs(model, single)
    assert_same(len(model.projections.extents()), 2, "pairs held")


def test_trained_tensors_are_float32_whatever_the_file_has(tmp_path: Path) -> None:
    """PEFT raises 16-bit adapters to float32 when it loads them; so do we, or small steps would be rounded away."""
    with quiet():
        theirs = peft.get_peft_model(
            base("mlp", torch.bfloat16),
            peft.LoraConfig(target_modules="all-linear", bias="all"),
            autocast_adapter_dtype=False,
        )
        theirs.save_pretrained(tmp_path)
    assert {t.dtype for t in files(tmp_path)[1].values()} == {torch.bfloat16}
    loaded = kilotune.PeftModel.from_pretrained(base("mlp", torch.bfloat16), tmp_path, is_trainable=True)
    assert {p.dtype for _, p in loaded.adapter_parameters()} == {torch.float32}


def test_an_option_of_peft_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with quiet():
        theirs = peft.get_peft_model(base("mlp"), peft.LoraConfig(target_modules=["0.1"]))
        theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "lora_bias": True}))
    with pytest.raises(kilotune.KilotuneError, match="lora_bias=True"):
        kilotune.PeftModel.from_pretrained(base("mlp"), tmp_path)


def test_starts_that_leave_the_base_alone_are_read(tmp_path: Path) -> None:
    """The file holds what came of it; EVA leaves its settings behind as well."""
    with quiet():
        theirs = peft.get_peft_model(
            base("mlp"), peft.LoraConfig(target_modules="all-linear", init_lora_weights="orthogonal")
        ).eval()
        theirs.save_pretrained(tmp_path)
    check_outputs(kilotune.PeftModel.from_pretrained(base("mlp"), tmp_path), theirs)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    settings = {"rho": 2.0, "tau": 0.99, "use_label_mask": True, "label_mask_value": -100, "whiten": False}
    path.write_text(json.dumps({**values, "init_lora_weights": "eva", "eva_config": settings}))
    loaded = kilotune.PeftModel.from_pretrained(base("mlp"), tmp_path)
    check_outputs(loaded, theirs)
    loaded.save_pretrained(tmp_path / "ours")
    check_outputs(peft_load(tmp_path / "ours", base("mlp")), theirs)


@pytest.mark.parametrize("gone", ["peft_version", "auto_mapping", "bias", "layers_pattern", "inference_mode"])
def test_files_of_older_peft_lack_keys(gone: str, tmp_path: Path) -> None:
    both = twins("mlp", "lora", r=4, target_modules="all-linear")
    with quiet():
        both.theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    del values[gone]
    path.write_text(json.dumps(values))
    check_outputs(kilotune.PeftModel.from_pretrained(base("mlp"), tmp_path), both.theirs)


class Slices(nn.Module):
    """PEFT's documented example: weights of shapes (100, 20) and (80, 50)."""

    def __init__(self) -> None:
        super().__init__()
        self.tall, self.wide = nn.Linear(20, 100), nn.Linear(50, 80)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(torch.tanh(self.tall(x))[..., :50])


def slices() -> Slices:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return Slices()


@pytest.mark.parametrize("r", [1, 16, 128])
def test_the_documented_slicing_example(r: int) -> None:
    """A is (r, 50), B is (100, r); each layer takes the leading columns of A and the leading rows of B."""
    options = {"r": r, "target_modules": ["tall", "wide"], "projection_prng_key": 3}
    with quiet():
        theirs = peft.get_peft_model(slices(), peft.VeraConfig(**options)).eval()
    ours = kilotune.get_peft_model(slices(), kilotune.VeraConfig(generator="peft", **options)).eval()
    a, b = theirs.base_model.vera_A["default"], theirs.base_model.vera_B["default"]
    assert_same((tuple(a.shape), tuple(b.shape)), ((r, 50), (100, r)), "shapes of A and B")
    mine, other = dict(ours.adapter_parameters()), peft_parameters(theirs)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key in sorted(mine):
            mine[key].copy_(torch.randn(mine[key].shape, generator=generator))
            other[key].copy_(mine[key])
    x = torch.sin(torch.arange(60.0)).reshape(3, 20)
    plain = slices()
    with torch.no_grad():
        for name, layer in (("tall", plain.tall), ("wide", plain.wide)):
            d, lam = mine[f"{name}.vera_lambda_d"], mine[f"{name}.vera_lambda_b"]
            out, inn = layer.weight.shape
            layer.weight += torch.diag(lam) @ b[:out] @ torch.diag(d) @ a[:, :inn]  # eq. 2 of the paper
        assert_close(ours(x), theirs(x), "output")
        assert_close(ours(x), plain(x), "output against the formula")
        assert_close(ours.merge_and_unload()(x), plain(x), "merged output against the formula")


def test_adapters_named_like_layers(tmp_path: Path) -> None:
    """PEFT 0.21 leaves a layer's tensors out of the file when another adapter has the layer's name; we do not."""
    model = scrambled(kilotune.get_peft_model(base("mlp"), kilotune.LoraConfig(r=3, target_modules="all-linear")))
    for name in ("first", "head", "blocks.0", "weight", "lora_A"):
        model.add_adapter(name, kilotune.LoraConfig(r=2, target_modules="all-linear"))
        scrambled(model, name)
    model.save_pretrained(tmp_path)
    for name in model.peft_config:
        model.set_adapter(name)
        folder = tmp_path if name == "default" else tmp_path / name
        check_outputs(peft_load(folder, base("mlp")), model)


LLAMA_NAMES = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
BLOCKS: dict[str, tuple[bool, dict[str, Any]]] = {
    "as in PEFT": (False, {"target_modules": ["q_proj"]}),
    "with a pattern": (False, {"target_modules": ["q_proj"], "layers_pattern": "layers"}),
    "whole names": (False, {"target_modules": LLAMA_NAMES}),
    "a whole name of another block": (False, {"target_modules": [LLAMA_NAMES[0], "v_proj"]}),
    "blocks at the root": (True, {"target_modules": ["q_proj"]}),
}


@pytest.mark.parametrize("method", ["vera", "lora"])
@pytest.mark.parametrize("at_root, options", BLOCKS.values(), ids=BLOCKS)
def test_blocks_that_peft_would_take_otherwise(
    at_root: bool, options: dict[str, Any], method: str, tmp_path: Path
) -> None:
    """Where PEFT reads layers_to_transform differently, our file names the layers one by one."""

    def plain() -> nn.Module:
        return base("llama").model if at_root else base("llama")

    more = {"save_projection": True} if method == "vera" else {}
    config = METHODS[method][0](r=3, layers_to_transform=[1], **options, **more)
    model = scrambled(kilotune.get_peft_model(plain(), config))
    model.save_pretrained(tmp_path)
    theirs = peft_load(tmp_path, plain())
    taken = {name.rpartition(".")[0] for name in peft_parameters(theirs)}
    assert_same(taken, set(model.adapted_layers()), "layers that PEFT takes")
    again = kilotune.PeftModel.from_pretrained(plain(), tmp_path)
    with torch.no_grad():
        outputs = [(m(IDS).last_hidden_state if at_root else m(IDS).logits) for m in (model, theirs, again)]
    for output in outputs[1:]:
        assert_close(output, outputs[0], "output")
