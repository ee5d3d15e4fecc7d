"""The same script with PEFT and with kilotune.peft: what it sees of a model is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kilotune.peft as ours
from tests.peft.both import IDS, METHODS, alike, check_same, filled, logits, made
from tests.peft_parity.oracle import quiet
from tests.support.models import tiny_llama

every_method = pytest.mark.parametrize("name", METHODS)


@every_method
def test_outputs_and_a_step_of_training(name: str) -> None:
    def script(library: Any) -> Any:
        model = made(library, name)
        before = logits(model)
        model.train()
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        return before, logits(model)

    alike(script)


@every_method
def test_names_and_shapes_of_parameters(name: str) -> None:
    def script(library: Any) -> Any:
        model = made(library, name, modules_to_save=["lm_head"])
        named = {key: tuple(p.shape) for key, p in model.named_parameters() if p.requires_grad}
        # PEFT shows a model's vector in its first layer as well, and there first.
        wide = ("unilora_theta_d", "vblora_vector_bank")
        trained = {key: shape for key, shape in named.items() if not any(name in key for name in wide)}
        return trained, sorted(key for key in model.state_dict() if ".base_layer." in key), model.prefix

    alike(script)


@every_method
def test_a_state_dict_goes_out_and_in(name: str) -> None:
    def script(library: Any) -> Any:
        model, other = made(library, name), library.get_peft_model(tiny_llama(), _config(library, name))
        state = library.get_peft_model_state_dict(model)
        library.set_peft_model_state_dict(other, state)
        whole = library.get_peft_model(tiny_llama(), _config(library, name))
        whole.load_state_dict(model.state_dict())
        return sorted(state), logits(model), logits(other), logits(whole)

    alike(script)


def _config(library: Any, name: str) -> Any:
    return getattr(library, name)(**METHODS[name], task_type="CAUSAL_LM")


@every_method
def test_files_go_both_ways(name: str, tmp_path: Path) -> None:
    import peft

    with quiet():
        mine, theirs = made(ours, name), made(peft, name)
    check_same(logits(mine), logits(theirs), 1e-5)
    mine.save_pretrained(tmp_path / "ours")
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    for library in (peft, ours):
        for folder in ("ours", "theirs"):
            with quiet():
                model = library.PeftModel.from_pretrained(tiny_llama(), tmp_path / folder)
            check_same(logits(model), logits(theirs), 1e-5)
            config = library.PeftConfig.from_pretrained(tmp_path / folder)
            assert (type(config).__name__, config.target_modules) == (name, set(METHODS[name]["target_modules"]))


def test_what_user_code_reads_of_a_lora_layer() -> None:
    def script(library: Any) -> Any:
        model = made(library, "LoraConfig", lora_alpha=12, rank_pattern={"down_proj": 2}, lora_dropout=0.25)
        layer = model.base_model.model.model.layers[1].mlp.down_proj
        from_path = library.tuners.lora.LoraLayer if library is ours else _theirs()
        return (
            {
                "A": layer.lora_A["default"].weight,
                "B": layer.lora_B["default"].weight,
                "W": layer.get_base_layer().weight,
            },
            (dict(layer.scaling), dict(layer.r), dict(layer.lora_alpha), layer.lora_dropout["default"].p),
            layer.get_delta_weight("default"),
            (layer.merged_adapters, layer.active_adapters, layer.disable_adapters, bool(layer.merged)),
            (layer.in_features, layer.out_features, isinstance(layer, from_path), "default" in layer.lora_A),
        )

    alike(script)


def _theirs() -> Any:
    from peft.tuners.lora import LoraLayer

    return LoraLayer


def test_what_is_written_into_a_factor_runs() -> None:
    def script(library: Any) -> Any:
        model = made(library, "LoraConfig")
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        torch.nn.init.constant_(layer.lora_B["default"].weight, 0.02)
        layer.lora_A["default"].weight.data.mul_(0.5)
        return logits(model)

    alike(script)


def test_scaling_is_set_scaled_and_taken_back() -> None:
    def script(library: Any) -> Any:
        model, found = made(library, "LoraConfig"), []
        layers = [block.self_attn.q_proj for block in model.base_model.model.model.layers]
        for layer in layers:
            layer.scaling["default"] = 0.3
        found.append(logits(model))
        for change in (
            lambda layer: layer.set_scale("default", 2.0),
            lambda layer: layer.scale_layer(0.5),
            lambda layer: layer.unscale_layer(0.5),
            lambda layer: layer.unscale_layer(),
        ):
            for layer in layers:
                change(layer)
            found.append(logits(model))
        return found

    alike(script)


def test_an_adapter_is_rescaled_within_a_context() -> None:
    def script(library: Any) -> Any:
        from peft.helpers import rescale_adapter_scale

        rescale = ours.helpers.rescale_adapter_scale if library is ours else rescale_adapter_scale
        model = made(library, "LoraConfig", use_dora=True)
        with rescale(model, 0.25):
            within = logits(model)
        return within, logits(model)

    alike(script)


def test_several_adapters_are_set_merged_disabled_and_deleted() -> None:
    def script(library: Any) -> Any:
        model = made(library, "LoraConfig", "one")
        model.add_adapter("two", library.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"]))
        filled(library, model, "two")
        found: list[Any] = [logits(model), model.active_adapters]
        model.set_adapter("two")
        found += [logits(model), model.active_adapter]
        with model.disable_adapter():
            found.append(logits(model))
        model.base_model.set_adapter(["one", "two"])
        found += [logits(model), model.active_adapters]
        model.merge_adapter()
        found.append(logits(model))
        model.unmerge_adapter()
        model.delete_adapter("one")
        found += [logits(model), sorted(model.peft_config), model.active_adapters]
        model.base_model.disable_adapter_layers()
        found.append(logits(model))
        model.base_model.enable_adapter_layers()
        found.append(logits(model))
        return [*found, logits(model.merge_and_unload())]

    alike(script)


def test_rows_of_a_batch_name_their_adapters() -> None:
    def script(library: Any) -> Any:
        model = made(library, "LoraConfig", "one").eval()
        model.add_adapter("two", library.LoraConfig(r=2, target_modules=["q_proj"]))
        filled(library, model, "two")
        with torch.no_grad():
            return model(input_ids=IDS, adapter_names=["two", "__base__"]).logits

    alike(script)


@pytest.mark.parametrize("way", ["linear", "cat", "svd", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"])
@pytest.mark.parametrize("weights", [(0.7, 0.4), (1.0, -0.6)])
def test_adapters_are_added_as_peft_adds_them(way: str, weights: tuple[float, float]) -> None:
    def script(library: Any) -> Any:
        model = made(library, "LoraConfig", "one", lora_alpha=6)
        model.add_adapter("two", library.LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "down_proj"]))
        filled(library, model, "two")
        density = {} if way in ("linear", "cat", "svd") else {"density": 0.6}
        model.base_model.add_weighted_adapter(["one", "two"], list(weights), "sum", combination_type=way, **density)
        model.set_adapter("sum")
        changes = [block.self_attn.q_proj.get_delta_weight("sum") for block in model.base_model.model.model.layers]
        return logits(model), changes, model.peft_config["sum"].r

    alike(script)


def test_an_adapter_is_injected_without_a_model_around_it() -> None:
    def script(library: Any) -> Any:
        model = library.inject_adapter_in_model(library.LoraConfig(r=4, target_modules=["q_proj"]), tiny_llama())
        filled(library, model, "default")
        names = [name for name, _ in model.named_parameters() if "lora" in name]
        return type(model).__name__, names, logits(model), library.get_model_status(model).num_adapter_layers

    alike(script)


def test_the_status_of_layers_and_of_the_model() -> None:
    def script(library: Any) -> Any:
        model = made(library, "LoraConfig", modules_to_save=["lm_head"])
        model.add_adapter("other", library.LoraConfig(target_modules=["v_proj"]))
        layers, whole = model.get_layer_status(), model.get_model_status()
        told = [
            (one.name, one.enabled, one.active_adapters, one.merged_adapters, one.requires_grad, one.available_adapters)
            for one in layers
        ]
        return sorted(map(str, told)), (
            (whole.base_model_type, whole.adapter_model_type, whole.num_adapter_layers, whole.enabled),
            (whole.active_adapters, whole.merged_adapters, whole.requires_grad, whole.available_adapters),
            (whole.trainable_params, whole.devices, whole.peft_types),
        )

    alike(script)


def test_a_task_says_the_class_of_the_model() -> None:
    for task, name in (("CAUSAL_LM", "PeftModelForCausalLM"), (None, "PeftModel")):
        model = made(ours, "LoraConfig", task_type=task)
        assert type(model).__name__ == name
        assert isinstance(model, ours.PeftModel)
    mixed = ours.get_peft_model(tiny_llama(), ours.LoraConfig(target_modules=["q_proj"]), mixed=True)
    mixed.add_adapter("other", ours.VeraConfig(r=4, target_modules=["v_proj"]))
    mixed.set_adapter(["default", "other"])
    assert isinstance(mixed, ours.PeftMixedModel)
    assert mixed.active_adapters == ["default", "other"]
