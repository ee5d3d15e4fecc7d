"""What PEFT tells of a model: what targets take, what is tied, whose keys a state has; and how layers are printed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import kilotune.peft as ours
from kilotune.errors import AdapterError
from kilotune.peft.tuners import tuners_utils
from tests.peft.both import METHODS, alike, made
from tests.support.models import mlp, tiny_gpt2, tiny_llama


@pytest.mark.parametrize("name", ["LoraConfig", "VeraConfig", "IA3Config"])
def test_keys_of_a_state_begin_as_peft_says(name: str) -> None:
    def script(library: Any) -> Any:
        utils = importlib.import_module(f"{library.__name__}.tuners.tuners_utils")
        model = made(library, name)
        second = {**METHODS[name], "target_modules": ["k_proj"]}
        second |= {"feedforward_modules": []} if name == "IA3Config" else {}
        model.add_adapter("other", getattr(library, name)(**second))
        found = []
        for root, adapter in ((model, None), (model, "other"), (model.base_model.model, "default")):
            state = {key: 0 for key in root.state_dict() if "vera_A" not in key and "vera_B" not in key}
            prefixes = utils._get_tuner_state_dict_key_prefixes(root, adapter)
            found.append(sorted(utils._filter_state_dict_by_key_prefixes(state, prefixes)))
        return found

    alike(script)


def test_a_vector_of_a_whole_model_is_among_the_keys_once() -> None:
    """PEFT shows it at each layer, too."""
    model = made(ours, "UniLoraConfig")
    found = tuners_utils._get_tuner_state_dict_key_prefixes(model, "default")
    keys = tuners_utils._filter_state_dict_by_key_prefixes(model.state_dict(), found)
    assert list(keys) == ["base_model.unilora_theta_d.default"]


def test_modules_that_targets_take_and_do_not_take() -> None:
    def script(library: Any) -> Any:
        utils = importlib.import_module(f"{library.__name__}.tuners.tuners_utils")
        found = utils.inspect_matched_modules(made(library, "LoraConfig").base_model)
        return {"matched": found["matched"], "some": [name for name in found["unmatched"] if name.endswith("k_proj")]}

    alike(script)
    with pytest.raises(AdapterError, match="expected a PeftModel"):
        tuners_utils.inspect_matched_modules(mlp())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2])
def test_modules_tied_to_the_embedding(base: Any, tie: bool) -> None:
    def script(library: Any) -> Any:
        other = importlib.import_module(f"{library.__name__}.utils.other")
        plain = base(tie=tie)
        found = [other._get_module_names_tied_with_embedding(plain), sorted(other._get_no_split_modules(plain))]
        targets = ["wte" if base is tiny_gpt2 else "embed_tokens"]
        model = library.get_peft_model(base(tie=tie), library.LoraConfig(target_modules=targets))
        return [*found, model._get_module_names_tied_with_embedding()]

    alike(script)


def test_a_model_is_printed_with_the_names_that_it_is_shown_with() -> None:
    config = ours.LoraConfig(target_modules=["0"], modules_to_save=["2"])
    text = repr(ours.get_peft_model(mlp(), config))
    for part in ("(base_model): LoraModel(", "(0): lora.Linear(", "(lora_A): ModuleDict(", "ModulesToSaveWrapper("):
        assert part in text
    both = ours.get_peft_model(mlp(), config)
    both.add_adapter("other", ours.IA3Config(target_modules=["0"], feedforward_modules=[]))
    assert "(0): adapted.Linear(" in repr(both)
    assert both.get_layer_status()[0].module_type == "adapted.Linear"
    assert ours.get_peft_model(mlp(), config).get_layer_status()[0].module_type == "lora.Linear"


def test_whether_ia3_scales_the_input_of_a_layer() -> None:
    def script(library: Any) -> Any:
        layers = made(library, "IA3Config").base_model.model.model.layers[0]
        return [layers.self_attn.k_proj.is_feedforward, layers.mlp.down_proj.is_feedforward]

    alike(script)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(x @ self.w[i] for i in range(3))  # type: ignore[return-value]


def test_parameters_of_modules_are_layers_of_their_own() -> None:
    from kilotune.peft.tuners.lora.layer import Linear, ParamWrapper

    base = nn.Sequential(Experts())
    model = ours.get_peft_model(base, ours.LoraConfig(r=2, target_modules=[], target_parameters=["0.w"]))
    (found,) = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    assert (found.parameter_name, found.r) == ("w", {"default": 2})  # type: ignore[attr-defined]
    assert not isinstance(found, Linear)
    plain = ours.get_peft_model(mlp(), ours.LoraConfig(target_modules=["0"]))
    assert not any(isinstance(module, ParamWrapper) for module in plain.modules())
    with pytest.raises(AttributeError):
        _ = plain.base_model.model[0].parameter_name


@pytest.mark.full
def test_each_module_can_be_the_first_that_is_imported() -> None:
    names = [f"kilotune.peft.{name}" for name in ("optimizers", "helpers", "utils.save_and_load", "tuners.lora.eva")]
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    for known in [known for known in sys.modules if known.startswith('kilotune.peft')]:\n"
        "        del sys.modules[known]\n"
        "    importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", script, *names], check=True, timeout=120)


def test_numbers_of_a_base_into_which_adapters_were_injected_are_all_counted() -> None:
    def script(library: Any) -> Any:
        config = library.LoraConfig(r=2, target_modules=["q_proj"])
        status = library.get_model_status(library.inject_adapter_in_model(config, tiny_llama()))
        return [status.trainable_params, status.total_params, status.num_adapter_layers]

    alike(script)
