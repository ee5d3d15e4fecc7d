"""LoRA's starts against PEFT, live: the numbers they start with, outputs, gradients, and files both ways."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import kilotune
from kilotune import peft as shim
from kilotune.convert import to_lora
from tests.peft_parity.files import check_acts, check_outputs, files, peft_load, scrambled
from tests.peft_parity.oracle import (
    Twins,
    assert_all_close,
    assert_close,
    base,
    check_gradients,
    check_training,
    peft_parameters,
    quiet,
    run,
)

ALL = "all-linear"


def test_orthogonal_is_as_large_as_pefts() -> None:
    """Not the same numbers, which are drawn in another order, but of the same size, with a product of zero."""
    options = {"r": 4, "target_modules": ["first"], "init_lora_weights": "orthogonal"}
    with quiet():
        theirs = peft.get_peft_model(base("mlp"), peft.LoraConfig(**options))
    own = peft_parameters(theirs)
    ours = dict(kilotune.get_peft_model(base("mlp"), kilotune.LoraConfig(**options)).adapter_parameters())
    for mine in (own, ours):
        a, b = mine["first.lora_A"].detach(), mine["first.lora_B"].detach()
        assert float((b @ a).abs().max()) < 1e-6
        assert float(a.std()) > 0.03
        assert float(b.std()) > 0.03


def test_orthogonal_files_go_both_ways(tmp_path: Path) -> None:
    options = {"r": 4, "target_modules": ALL, "init_lora_weights": "orthogonal"}
    ours = kilotune.get_peft_model(base("mlp"), kilotune.LoraConfig(**options))
    with torch.no_grad():
        for _, parameter in ours.adapter_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft_load(tmp_path / "ours", base("mlp"))
    check_outputs(theirs, ours)
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    loaded = kilotune.PeftModel.from_pretrained(base("mlp"), tmp_path / "theirs")
    check_outputs(loaded, theirs)
    assert loaded.peft_config["default"].init_lora_weights == "orthogonal"
    with torch.no_grad(), loaded.disable_adapter():
        plain = loaded(torch.ones(1, 12))
    assert_close(plain, base("mlp")(torch.ones(1, 12)).detach(), "without the adapter", 0.0)


# -- starts from the base --------------------------------------------------------------------------


FROM_BASE = ("pissa", "olora")
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", {"r": 4, "lora_alpha": 6, "target_modules": ALL}),
    "rslora": ("mlp", {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ALL, "bias": "lora_only"}),
    "patterns": ("mlp", {"r": 2, "rank_pattern": {"first": 4}, "alpha_pattern": {"head": 3}, "target_modules": ALL}),
    "dora": ("mlp", {"r": 4, "use_dora": True, "target_modules": ALL}),
    "llama": ("llama", {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
}


def both(start: str, name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Twins:
    """Both models, as they start."""
    ours = kilotune.get_peft_model(base(name, dtype), kilotune.LoraConfig(init_lora_weights=start, **options))
    with quiet():
        theirs = peft.get_peft_model(base(name, dtype), peft.LoraConfig(init_lora_weights=start, **options))
    return Twins(ours, theirs.eval())


def with_our_signs(pair: Twins) -> None:
    """Turn PEFT's vectors, whose signs are LAPACK's, as ours are: B A stays as it is."""
    mine, other = dict(pair.ours.adapter_parameters()), peft_parameters(pair.theirs)
    with torch.no_grad():
        for name in [key for key in other if key.endswith(".lora_A")]:
            sign = (mine[name] * other[name]).sum(1, keepdim=True).sign()
            other[name].mul_(sign)
            other[f"{name.removesuffix('A')}B"].mul_(sign.T)


def moved(model: peft.PeftModel) -> None:
    """A little further, as after some steps: the factors are near those that they started as."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted(peft_parameters(model).items()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("start", FROM_BASE)
@pytest.mark.parametrize("case", OPTIONS)
def test_they_start_alike_and_train_alike(start: str, case: str) -> None:
    name, options = OPTIONS[case]
    pair = both(start, name, **options)
    with_our_signs(pair)
    mine, other = dict(pair.ours.adapter_parameters()), peft_parameters(pair.theirs)
    assert_all_close({k: p.detach() for k, p in mine.items()}, {k: p.detach() for k, p in other.items()}, "start", 1e-4)
    check_outputs(pair.ours, pair.theirs)
    check_outputs(pair.ours, base(name), 1e-5)
    check_gradients(pair, 1e-3)
    check_training(pair, "sgd", 3)


@pytest.mark.parametrize("start", FROM_BASE)
@pytest.mark.parametrize("case", OPTIONS)
def test_their_files_are_read_and_ours_are(start: str, case: str, tmp_path: Path) -> None:
    """Each takes the start from the base again when it loads."""
    name, options = OPTIONS[case]
    theirs = both(start, name, **options).theirs
    moved(theirs)
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    loaded = kilotune.PeftModel.from_pretrained(base(name), tmp_path / "theirs")
    check_acts(loaded)
    check_outputs(loaded, theirs)
    loaded.save_pretrained(tmp_path / "ours")
    check_outputs(peft_load(tmp_path / "ours", base(name)), theirs)
    with torch.no_grad(), loaded.disable_adapter():
        assert torch.equal(run(loaded), run(base(name)))
    loaded.merge_adapter()
    check_outputs(loaded, theirs)
    with torch.no_grad():
        assert torch.equal(run(loaded.unload()), run(base(name)))


@pytest.mark.parametrize("start", FROM_BASE)
def test_a_16_bit_base(start: str, tmp_path: Path) -> None:
    """PEFT rounds what is left of the base to 16 bits; we do not."""
    options = {"r": 4, "target_modules": ALL}
    theirs = both(start, "mlp", torch.bfloat16, **options).theirs
    moved(theirs)
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    loaded = kilotune.PeftModel.from_pretrained(base("mlp", torch.bfloat16), tmp_path / "theirs")
    check_acts(loaded)
    check_outputs(loaded, theirs, 8 * 2.0**-8)
    loaded.save_pretrained(tmp_path / "ours")
    check_outputs(peft_load(tmp_path / "ours", base("mlp", torch.bfloat16)), theirs, 8 * 2.0**-8)


@pytest.mark.parametrize("start", FROM_BASE)
def test_conv1d(start: str, tmp_path: Path) -> None:
    """PEFT takes PiSSA's part of the matrix as a linear layer has it, and OLoRA's of its transpose."""
    options = {"r": 4, "target_modules": ["attn.c_proj"], "fan_in_fan_out": True}
    pair = both(start, "gpt2", **options)
    moved(pair.theirs)
    with quiet():
        pair.theirs.save_pretrained(tmp_path / "theirs")
    if start == "olora":
        with pytest.raises(kilotune.ConfigError, match="takes the QR of the transposed weight"):
            kilotune.PeftModel.from_pretrained(base("gpt2"), tmp_path / "theirs")
        pair.ours.save_pretrained(tmp_path / "ours")
        assert files(tmp_path / "ours")[0]["peft_type"] == "KILOTUNE_LORA"
        check_outputs(kilotune.PeftModel.from_pretrained(base("gpt2"), tmp_path / "ours"), pair.ours)
        return
    loaded = kilotune.PeftModel.from_pretrained(base("gpt2"), tmp_path / "theirs")
    check_acts(loaded)
    check_outputs(loaded, pair.theirs)
    loaded.save_pretrained(tmp_path / "ours")
    check_outputs(peft_load(tmp_path / "ours", base("gpt2")), pair.theirs)


def test_an_embedding_starts_plain_in_both(tmp_path: Path) -> None:
    options = {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}
    theirs = both("pissa", "llama", **options).theirs
    moved(theirs)
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    loaded = kilotune.PeftModel.from_pretrained(base("llama"), tmp_path / "theirs")
    check_acts(loaded)
    check_outputs(loaded, theirs)


def test_a_part_that_was_drawn_at_random_is_refused(tmp_path: Path) -> None:
    """PEFT itself takes another part away when it loads such a file; ours are closed to it, and come back here."""
    theirs = both("pissa_niter_2", "mlp", r=4, target_modules=ALL).theirs
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(kilotune.ConfigError, match="drew at random.*path_initial_model_for_weight_conversion"):
        kilotune.PeftModel.from_pretrained(base("mlp"), tmp_path / "theirs")


def test_as_a_plain_lora_it_is_read_by_peft(tmp_path: Path) -> None:
    ours = scrambled(both("pissa_niter_2", "mlp", r=4, target_modules=ALL).ours)
    to_lora(ours).save(tmp_path)
    check_outputs(peft_load(tmp_path, base("mlp")), ours)


def test_pefts_conversion_is_a_plain_lora(tmp_path: Path) -> None:
    """Which it makes of the adapter as it started, and of what became of it."""
    theirs = both("pissa", "mlp", r=4, lora_alpha=6, target_modules=ALL).theirs
    with quiet():
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "start")
        theirs.peft_config["default"].init_lora_weights = "pissa"
        moved(theirs)
        warnings.filterwarnings("ignore", message="PiSSA changes the base weights of the model", category=UserWarning)
        theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    loaded = kilotune.PeftModel.from_pretrained(base("mlp"), tmp_path / "plain")
    check_acts(loaded)
    check_outputs(loaded, theirs)


# -- EVA -------------------------------------------------------------------------------------------


def plain_batches(count: int = 4, rows: int = 64) -> list[torch.Tensor]:
    """Inputs of the MLP whose directions vary by very different amounts."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q * 0.6 ** torch.arange(12.0)[:, None]
    return [torch.randn(rows, 12, generator=generator) @ mix + 0.5 for _ in range(count)]


PLAIN: dict[str, Any] = {
    "forward_fn": lambda model, batch: model(batch),
    "prepare_model_inputs_fn": None,
    "prepare_layer_inputs_fn": None,
    "show_progress_bar": False,
}


def uneven(inputs: Any, batch: Any, name: str) -> torch.Tensor:
    """The head's inputs vary in one direction more than in all others, so its ranks go to other layers."""
    rows = inputs[0] if isinstance(inputs, tuple) else inputs
    return rows * 0.2 ** torch.arange(rows.shape[-1]) if name.endswith("head") else rows


TARGETS = ["first", "blocks.0.1", "blocks.1.3", "head"]


def eva_pair(name: str = "mlp", **options: Any) -> tuple[Any, Any]:
    settings = options.pop("eva", {})
    given = {"r": 2, "lora_alpha": 6, "init_lora_weights": "eva", "target_modules": TARGETS, **options}
    with quiet():
        theirs = peft.get_peft_model(
            base(name), peft.LoraConfig(**given, eva_config=peft.EvaConfig(**settings)), low_cpu_mem_usage=True
        )
    ours = shim.get_peft_model(base(name), shim.LoraConfig(**given, eva_config=shim.EvaConfig(**settings)))
    return ours, theirs


EVA: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"rho": 1.0}, {}),
    ({"rho": 2.0}, {"use_rslora": True}),
    ({"rho": 2.0, "whiten": True}, {"rank_pattern": {"head": 3}}),
    ({"rho": 2.0, "adjust_scaling_factors": False}, {}),
]


@pytest.mark.heavy
@pytest.mark.parametrize(("settings", "options"), EVA, ids=str)
def test_eva_gives_the_ranks_and_factors_of_pefts(
    settings: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    ours, theirs = eva_pair(eva=settings, **options)
    batches = plain_batches()
    how = {**PLAIN, "prepare_layer_inputs_fn": uneven}
    with quiet():
        peft.initialize_lora_eva_weights(theirs, batches, **how)
    shim.initialize_lora_eva_weights(ours, batches, **how)
    told, expected = ours.peft_config["default"], theirs.peft_config["default"]
    assert told.rank_pattern == expected.rank_pattern
    assert bool(told.rank_pattern) == (settings["rho"] > 1 or bool(options.get("rank_pattern")))
    assert told.alpha_pattern == pytest.approx(expected.alpha_pattern)
    mine, other = peft_like(ours), {k: p.detach() for k, p in peft_parameters(theirs).items()}
    assert sorted(mine) == sorted(other)
    for name, value in mine.items():
        if name.endswith("lora_A"):
            alike = torch.nn.functional.cosine_similarity(value.detach(), other[name], dim=1)
            assert float(alike.min()) > 0.98, name
            torch.testing.assert_close(value.detach().norm(dim=1), other[name].norm(dim=1), rtol=0.02, atol=0)
        else:
            assert not value.any()
    check_outputs(ours, base("mlp"))
    with torch.no_grad():
        for parameter in mine.values():
            parameter.add_(0.1)
    ours.save_pretrained(tmp_path)
    check_outputs(peft_load(tmp_path, base("mlp")), ours)
    check_outputs(kilotune.PeftModel.from_pretrained(base("mlp"), tmp_path), ours)


def peft_like(model: Any) -> dict[str, torch.nn.Parameter]:
    return dict(model.base_model.adapter_parameters())


@pytest.mark.heavy
def test_eva_on_a_language_model_leaves_out_padding_and_masked_labels() -> None:
    """The default functions; layers that read one tensor get the same components."""
    options = {"target_modules": ["q_proj", "k_proj", "o_proj"], "r": 2, "eva": {"rho": 1.0}}
    ours, theirs = eva_pair("llama", **options)
    generator = torch.Generator().manual_seed(4)
    batches = []
    for _ in range(3):
        ids = torch.randint(0, 40, (6, 10), generator=generator)
        mask = torch.ones_like(ids)
        mask[:3, 7:] = 0
        labels = ids.masked_fill(ids < 25, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    state = shim.get_eva_state_dict(ours, batches)
    with quiet():
        expected = peft.get_eva_state_dict(theirs, batches, show_progress_bar=False)
    assert sorted(state) == sorted(expected)
    for name, value in state.items():
        ratio = torch.linalg.svdvals(value @ expected[name].float().T)  # one subspace, whatever the order in it
        assert value.shape == expected[name].shape
        assert float(ratio.min()) > 0.97, name
    layer = "base_model.model.model.layers.0.self_attn"
    assert torch.equal(state[f"{layer}.q_proj"], state[f"{layer}.k_proj"])
    shim.initialize_lora_eva_weights(ours, eva_state_dict=state)
    given = ours.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert torch.equal(given, state[f"{layer}.q_proj"])


def test_a_layer_without_a_rank_has_no_adapter_any_more() -> None:
    ours, _ = eva_pair()
    rows = {"first": 3, "blocks.0.1": 0, "blocks.1.3": 2, "head": 3}
    layers = {name: ours.get_submodule(f"base_model.model.{name}") for name in rows}
    state = {
        f"base_model.model.{name}": torch.linalg.qr(torch.randn(layers[name].in_features, n)).Q.T
        for name, n in rows.items()
    }
    shim.initialize_lora_eva_weights(ours, eva_state_dict=state)
    config = ours.peft_config["default"]
    assert config.rank_pattern == {"first": 3, "head": 3}
    assert config.alpha_pattern == {"first": 9.0, "head": 9.0}
    assert sorted(ours.base_model.installed("default").layers) == ["blocks.1.3", "first", "head"]
    assert isinstance(ours.base_model.model.blocks[0][1], torch.nn.Linear)
    assert all(parameter.requires_grad for parameter in peft_like(ours).values())


def test_what_eva_cannot_do_is_told() -> None:
    ours, _ = eva_pair()
    with pytest.raises(kilotune.ConfigError, match="needs a dataloader"):
        shim.initialize_lora_eva_weights(ours)
    with pytest.raises(kilotune.ConfigError, match="there are no batches"):
        shim.initialize_lora_eva_weights(ours, [], **PLAIN)
    with pytest.raises(kilotune.ConfigError, match=r"4 components need 4 inputs \(tokens\) in a batch"):
        shim.initialize_lora_eva_weights(ours, plain_batches(rows=3), **PLAIN)
    with pytest.raises(kilotune.ConfigError, match="no layers of such shapes: base"):
        shim.initialize_lora_eva_weights(ours, eva_state_dict={"base": torch.zeros(2, 2)})
    with pytest.raises(kilotune.ConfigError, match="no layers other"):
        shim.get_eva_state_dict(ours, plain_batches(), **{**PLAIN, "prepare_layer_inputs_fn": {"other": None}})
    plain = shim.get_peft_model(base("mlp"), shim.LoraConfig(r=2, target_modules=["first"]))
    with pytest.raises(kilotune.ConfigError, match="init_lora_weights='eva'"):
        shim.initialize_lora_eva_weights(plain, plain_batches(), **PLAIN)
    with pytest.raises(kilotune.ConfigError, match="which layers of a model without adapters"):
        shim.get_eva_state_dict(base("mlp"), plain_batches(), **PLAIN)
    of_base = shim.get_eva_state_dict(base("mlp"), plain_batches(), ours.peft_config["default"], **PLAIN)
    assert sorted(of_base) == sorted(TARGETS)
    ours.add_adapter("other", shim.LoraConfig(r=2, target_modules=["first"]))
    ours.base_model.set_adapter(["default", "other"])
    with pytest.raises(kilotune.AdapterError, match="only 'default' may be active"):
        shim.initialize_lora_eva_weights(ours, plain_batches(), **PLAIN)
    with pytest.raises(kilotune.ConfigError, match="`rho` must be >= 1.0"):
        shim.EvaConfig(rho=0.5)
    with pytest.warns(UserWarning, match="eva_config: has no effect"):
        shim.LoraConfig(eva_config=shim.EvaConfig())
