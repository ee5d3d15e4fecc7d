"""PEFT's names: each is here, or its absence says what to use; docs/peft.md has them all."""

from __future__ import annotations

import importlib

import peft
import pytest

import kilotune.peft as ours
from kilotune.peft.vocabulary import PEFT, absent, advice
from scripts.peft_table import table
from tests.support.paths import ROOT

OWN = ("infer_device", "install")  # the first is in PEFT's module as well, though not among its public names


def test_each_of_pefts_public_names_is_here_or_its_absence_is_told() -> None:
    assert peft.__version__ == PEFT == ours.__version__
    untold = [name for name in peft.__all__ if name not in ours.__all__ and absent(name) is None]
    assert untold == []


def test_no_name_is_made_up() -> None:
    assert [name for name in ours.__all__ if name not in peft.__all__ and name not in OWN] == []
    assert hasattr(peft, "infer_device") or hasattr(peft.utils, "infer_device")


@pytest.mark.parametrize("name", sorted(ours.__all__))
def test_each_name_can_be_had(name: str) -> None:
    assert getattr(ours, name) is not None


def test_a_name_that_is_not_here_is_an_import_error_that_names_what_to_use() -> None:
    with pytest.raises(ImportError, match="AdaLoraConfig.*use LoraConfig, or VeraConfig"):
        exec("from kilotune.peft import AdaLoraConfig")
    with pytest.raises(ImportError, match="trains a prompt.*use LoraConfig or VeraConfig"):
        exec("from kilotune.peft import PromptTuningConfig")
    with pytest.raises(AttributeError, match="AdaLoraConfig"):  # so that hasattr() says no
        _ = ours.AdaLoraConfig
    assert not hasattr(ours, "AdaLoraConfig")
    assert "docs/peft.md" in advice("Nonsense")


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("tuners.lora", "LoraConfig LoraLayer LoraModel Linear Embedding Conv2d"),
        ("tuners.lora.layer", "LoraLayer Linear Embedding Conv1d Conv2d Conv3d"),
        ("tuners.lora.config", "LoraConfig LoraRuntimeConfig"),
        ("tuners.vera", "VeraConfig VeraLayer VeraModel"),
        ("tuners.ia3", "IA3Config IA3Layer IA3Model"),
        ("tuners.unilora", "UniLoraConfig UniLoraModel"),
        ("tuners.vblora", "VBLoRAConfig VBLoRAModel"),
        ("tuners.tuners_utils", "BaseTuner BaseTunerLayer"),
        ("utils", "ModulesToSaveWrapper get_peft_model_state_dict set_peft_model_state_dict PeftType transpose"),
        ("utils.other", "prepare_model_for_kbit_training ModulesToSaveWrapper WEIGHTS_NAME CONFIG_NAME"),
        ("utils.save_and_load", "get_peft_model_state_dict set_peft_model_state_dict load_peft_weights"),
        ("utils.constants", "SAFETENSORS_WEIGHTS_NAME INCLUDE_LINEAR_LAYERS_SHORTHAND DUMMY_MODEL_CONFIG"),
        ("helpers", "rescale_adapter_scale check_if_peft_model update_signature"),
        ("mapping", "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_TUNER_MAPPING get_peft_config inject_adapter_in_model"),
        ("peft_model", "PeftModel PeftModelForCausalLM get_layer_status"),
        ("optimizers", "create_loraplus_optimizer"),
        ("config", "PeftConfig PromptLearningConfig"),
        ("auto", "AutoPeftModelForCausalLM MODEL_TYPE_TO_PEFT_MODEL_MAPPING"),
    ],
)
def test_modules_have_pefts_paths(path: str, names: str) -> None:
    theirs, own = (importlib.import_module(f"{root}.{path}") for root in ("peft", "kilotune.peft"))
    for name in names.split():
        assert hasattr(theirs, name), name
        assert hasattr(own, name), name


def test_the_page_has_the_table_that_the_code_makes() -> None:
    text = (ROOT / "docs" / "peft.md").read_text()
    assert table() in text, "run: python scripts/peft_table.py"
