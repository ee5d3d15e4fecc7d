"""Loading, saving and preparing models under PEFT's names: what a script does around its training."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kilotune.peft as ours
from kilotune.errors import AdapterError, CheckpointError, ConfigError, MergeError, UnsupportedError
from tests.peft.both import IDS, METHODS, filled, logits, made
from tests.peft_parity.oracle import quiet
from tests.support.models import mlp, tiny_llama

LORA = METHODS["LoraConfig"]


# -- configurations ------------------------------------------------------------------------------------------


def test_a_configuration_may_be_changed_until_it_is_used() -> None:
    config = ours.LoraConfig()
    config.target_modules = ["q_proj"]
    config.r = 2
    model = ours.get_peft_model(tiny_llama(), config)
    assert model.peft_config["default"] is config
    assert config.target_modules == {"q_proj"}
    config.lora_alpha = -1
    with pytest.raises(ConfigError, match="lora_alpha"):
        model.add_adapter("other", config)


def test_an_option_that_is_not_here_is_refused_where_it_is_on() -> None:
    with pytest.raises(ConfigError, match="trainable_token_indices"):
        ours.LoraConfig(trainable_token_indices=[1])
    with pytest.raises(ConfigError, match="lora_bias.*\n.*use_qalora|use_qalora.*\n.*lora_bias"):
        ours.LoraConfig(lora_bias=True, use_qalora=True)
    with pytest.raises(TypeError, match="rank"):
        ours.LoraConfig(rank=4)  # type: ignore[call-arg]
    with pytest.raises(UnsupportedError, match="trains no prompts"):
        ours.PrefixTuningConfig()


@pytest.mark.parametrize("name", METHODS)
def test_a_configurations_file_is_read_by_both(name: str, tmp_path: Path) -> None:
    import peft

    given = {**METHODS[name], "task_type": "CAUSAL_LM"}
    getattr(ours, name)(**given).save_pretrained(tmp_path / "ours")
    getattr(peft, name)(**given).save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        found = [library.PeftConfig.from_pretrained(tmp_path / folder) for library in (ours, peft)]
        for key, value in given.items():
            wanted = set(value) if isinstance(value, list) else value
            assert [getattr(one, key) for one in found] == [wanted, wanted], key


def test_an_unknown_key_of_a_file_counts_where_it_is_on(tmp_path: Path) -> None:
    ours.LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "of_tomorrow": None}))
    assert ours.PeftConfig.from_pretrained(tmp_path).r == 8  # type: ignore[attr-defined]
    path.write_text(json.dumps({**values, "of_tomorrow": 3}))
    with pytest.raises(ConfigError, match="of_tomorrow=3: kilotune has no such option"):
        ours.PeftConfig.from_pretrained(tmp_path)


# -- loading and saving --------------------------------------------------------------------------------------


def test_numbers_come_to_an_adapter_that_is_there(tmp_path: Path) -> None:
    model = made(ours, "LoraConfig")
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    other = ours.get_peft_model(tiny_llama(), ours.LoraConfig(**LORA))
    assert other.load_adapter(tmp_path, "default") == ([], [])
    assert torch.equal(logits(other), wanted)
    with pytest.raises(TypeError, match="unexpected options: revisoin"):
        other.load_adapter(tmp_path, "more", revisoin="main")


def test_keys_that_are_missing_and_unknown_are_told() -> None:
    model = made(ours, "LoraConfig")
    before = logits(model)
    state = ours.get_peft_model_state_dict(model)
    left_out = sorted(state)[0]
    given = {key: value for key, value in state.items() if key != left_out} | {"base_model.model.x.lora_A.weight": IDS}
    found = ours.set_peft_model_state_dict(model, given)
    assert found == ([left_out], ["base_model.model.x.lora_A.weight"])
    assert torch.equal(logits(model), before)
    wide = {key: torch.zeros(3, 3) for key in state}
    with pytest.raises(CheckpointError, match="shape of"):
        ours.set_peft_model_state_dict(model, wide)
    with pytest.warns(UserWarning, match="their shapes differ"):
        ours.set_peft_model_state_dict(model, wide, ignore_mismatched_sizes=True)
    assert torch.equal(logits(model), before)
    with pytest.raises(AdapterError, match="has no adapters"):
        ours.get_peft_model_state_dict(mlp())


def test_numbers_are_saved_from_a_state_that_was_gathered(tmp_path: Path) -> None:
    model = made(ours, "LoraConfig", modules_to_save=["lm_head"])
    state = {key: 2 * value for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    other = ours.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    own, doubled = (ours.get_peft_model_state_dict(one) for one in (model, other))
    assert all(torch.equal(doubled[key], 2 * value) for key, value in own.items())
    with pytest.raises(CheckpointError, match="state_dict: there is no"):
        model.save_pretrained(tmp_path / "none", state_dict={})
    assert not (tmp_path / "none" / "adapter_config.json").exists()


def test_other_keys_and_another_configuration_take_the_place_of_a_files(tmp_path: Path) -> None:
    model = made(ours, "LoraConfig")
    model.save_pretrained(tmp_path)
    config = ours.LoraConfig(**LORA, lora_alpha=16)
    scaled = ours.PeftModel.from_pretrained(tiny_llama(), tmp_path, config=config)
    assert scaled.peft_config["default"] is config
    assert scaled.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == 4.0
    state = {key.replace("layers", "blocks"): value for key, value in ours.load_peft_weights(tmp_path).items()}
    from safetensors.torch import save_file

    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="unexpected"):
        ours.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    found = ours.PeftModel.from_pretrained(tiny_llama(), tmp_path, key_mapping={"blocks": "layers"})
    assert torch.equal(logits(found), logits(model))


def test_an_adapter_waits_for_its_numbers_on_the_meta_device() -> None:
    model = ours.get_peft_model(tiny_llama(), ours.LoraConfig(**LORA), low_cpu_mem_usage=True)
    assert {p.device.type for p in model.parameters()} == {"cpu", "meta"}
    wanted = made(ours, "LoraConfig")
    ours.set_peft_model_state_dict(model, ours.get_peft_model_state_dict(wanted), low_cpu_mem_usage=True)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.equal(logits(model), logits(wanted))


def test_an_adapters_numbers_keep_the_bases_dtype_where_that_is_asked_for() -> None:
    for wide in (True, False):
        model = ours.get_peft_model(tiny_llama().bfloat16(), ours.LoraConfig(**LORA), autocast_adapter_dtype=wide)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32 if wide else torch.bfloat16}


def test_the_base_goes_out_and_in_by_its_own_names() -> None:
    model, plain = made(ours, "LoraConfig"), tiny_llama()
    state = ours.get_base_model_state_dict(model)
    assert set(state) == set(plain.state_dict())
    other = ours.get_peft_model(tiny_llama(seed=1), ours.LoraConfig(**LORA))
    filled(ours, other, "default")
    assert not torch.equal(logits(other), logits(model))
    assert ours.set_base_model_state_dict(other, state) == ([], [])
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(CheckpointError, match="missing"):
        ours.set_base_model_state_dict(other, {})


def test_a_file_that_names_its_base_brings_it(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    with quiet():
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = ours.get_peft_model(base, ours.LoraConfig(**LORA, task_type="CAUSAL_LM"))
    filled(ours, model, "default")
    model.save_pretrained(tmp_path / "adapter")
    for auto in (ours.AutoPeftModelForCausalLM, ours.AutoPeftModel):
        found = auto.from_pretrained(tmp_path / "adapter")
        assert isinstance(found, ours.PeftModelForCausalLM)
        assert torch.equal(logits(found), logits(model))
    with pytest.raises(ConfigError, match="expected an adapter for SEQ_CLS, got one for CAUSAL_LM"):
        ours.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="is made by AutoPeftModel.from_pretrained"):
        ours.AutoPeftModel()
    path = tmp_path / "adapter" / "adapter_config.json"
    mapped = {"parent_library": "os", "base_model_class": "system"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": None, "auto_mapping": mapped}))
    with pytest.raises(CheckpointError, match="only transformers' classes are loaded by name"):
        ours.AutoPeftModel.from_pretrained(tmp_path / "adapter")


def test_what_cannot_be_saved_so_is_refused(tmp_path: Path) -> None:
    model = made(ours, "LoraConfig")
    for option, words in (
        ({"safe_serialization": False}, "weights are safetensors only"),
        ({"save_embedding_layers": True}, "name the embedding in modules_to_save"),
        ({"path_initial_model_for_weight_conversion": "x"}, "start with no part of the base"),
    ):
        with pytest.raises(ConfigError, match=words):
            model.save_pretrained(tmp_path / "out", **option)
        assert not (tmp_path / "out").exists()


# -- a card, and the hub -------------------------------------------------------------------------------------


def test_a_card_is_made_and_one_that_is_there_keeps_its_text(tmp_path: Path) -> None:
    model = made(ours, "LoraConfig")
    model.get_base_model().config._name_or_path = "owner/base"
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n# My model\n\nSome words.\n")
    for _ in range(2):  # the second changes nothing
        model.create_or_update_model_card(tmp_path)
        text = (tmp_path / "README.md").read_text()
        for line in ("license: mit", "library_name: peft", 'base_model: "owner/base"', "# My model", "Some words."):
            assert text.count(line) == 1, line
        assert '"mine"' in text
        assert '"lora"' in text
        assert text.count("- kilotune 0.1.0") == 1


def test_a_model_is_uploaded_as_it_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    told: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None:
            told["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> None:
            told["made"] = (repo_id, options)

        def upload_folder(self, **options: Any) -> str:
            told["files"] = sorted(path.name for path in Path(options.pop("folder_path")).iterdir())
            told["uploaded"] = options
            return "url"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert made(ours, "LoraConfig").push_to_hub("ann/style", private=True, token="t", revision="next") == "url"
    assert told["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert told["made"] == ("ann/style", {"private": True, "exist_ok": True})
    assert (told["token"], told["uploaded"]["revision"]) == ("t", "next")


# -- running -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marks", [{}, {"is_loaded_in_4bit": True}, {"quantization_method": "torchao"}])
def test_a_base_is_prepared_for_training_as_peft_prepares_it(marks: dict[str, Any]) -> None:
    import peft

    found = []
    for library in (ours, peft):
        base = tiny_llama().bfloat16()
        for name, value in marks.items():
            setattr(base, name, value)
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers': of the name that PEFT calls
            assert library.prepare_model_for_kbit_training(base) is base
        state = {(p.dtype, p.requires_grad) for p in base.parameters()}
        found.append((state, base.model.gradient_checkpointing))
    assert found[0] == found[1]


def test_a_base_without_gradient_checkpointing_is_told() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module.is_loaded_in_8bit = True
    with pytest.raises(ConfigError, match="a Sequential has none; set it to False"):
        ours.prepare_model_for_kbit_training(module)


def test_merging_twice_and_unmerging_nothing_are_warnings_as_in_peft() -> None:
    model = made(ours, "LoraConfig")
    wanted = logits(model)
    model.merge_adapter()
    with pytest.warns(ours.PeftWarning, match="already merged"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(MergeError, match="unmerge them first"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    with pytest.warns(ours.PeftWarning, match="no adapter is merged"):
        model.unmerge_adapter()
    assert torch.equal(logits(model), wanted)


def test_a_batch_of_several_adapters_is_for_answers() -> None:
    model = made(ours, "LoraConfig").train()
    with pytest.raises(ConfigError, match="for a model in eval mode"):
        model(input_ids=IDS, adapter_names=["default", "default"])


def test_signatures_are_those_of_the_base() -> None:
    import inspect

    model = made(ours, "LoraConfig")
    assert "input_ids" not in inspect.signature(model.forward).parameters
    ours.helpers.update_signature(model)
    assert "input_ids" in inspect.signature(model.forward).parameters
    assert torch.equal(logits(model), logits(made(ours, "LoraConfig")))
    with pytest.raises(ConfigError, match="method"):
        ours.helpers.update_signature(model, "backward")


def test_no_option_is_passed_over(tmp_path: Path) -> None:
    model = made(ours, "LoraConfig")
    model.save_pretrained(tmp_path)
    for option, words in (
        ({"ephemeral_gpu_offload": True}, "computes where its layers are"),
        ({"use_safetensors": False}, "pickles are not read"),
    ):
        with pytest.raises((ConfigError, UnsupportedError), match=words):
            ours.PeftModel.from_pretrained(tiny_llama(), tmp_path, **option)
        with pytest.raises((ConfigError, UnsupportedError), match=words):
            model.load_adapter(tmp_path, "more", **option)
    with pytest.raises(UnsupportedError, match="computes where its layers are"):
        ours.LoraRuntimeConfig(ephemeral_gpu_offload=True)
    with pytest.raises(ConfigError, match="name the embedding in modules_to_save"):
        ours.get_peft_model_state_dict(model, save_embedding_layers=True)
    with pytest.raises(ConfigError, match="task_ids: for adapters that train prompts"):
        model(input_ids=IDS, task_ids=torch.zeros(2))


# -- on and off ----------------------------------------------------------------------------------------------


def test_switched_off_adapters_come_back_also_in_a_copy_and_without_one_that_went() -> None:
    model = made(ours, "LoraConfig", "one")
    model.add_adapter("two", ours.LoraConfig(r=2, target_modules=["q_proj"]))
    filled(ours, model, "two")
    model.set_adapter(["one", "two"])
    on = logits(model)
    model.base_model.disable_adapter_layers()
    off = logits(model)
    assert torch.equal(off, logits(tiny_llama()))
    assert (model.active_adapters, model.has_active_enabled_adapter) == (["one", "two"], False)
    twin = copy.deepcopy(model)
    twin.base_model.enable_adapter_layers()
    assert torch.equal(logits(twin), on)
    assert torch.equal(logits(model), off)
    model.delete_adapter("one")
    model.base_model.enable_adapter_layers()
    assert model.active_adapters == ["two"]
    assert not torch.equal(logits(model), off)
    model.base_model.disable_adapter_layers()
    model.set_adapter("two")  # which leaves them off, as in PEFT
    assert not model.has_active_enabled_adapter
    model.base_model.enable_adapter_layers()
    assert (model.active_adapters, model.has_active_enabled_adapter) == (["two"], True)
    with pytest.raises(AdapterError, match="of the PeftModel around this"):
        model.base_model.load_adapter("nowhere", "x")


# -- what libraries ask for ----------------------------------------------------------------------------------


def test_fsdp_is_to_wrap_blocks_and_trained_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft
    from peft.utils.other import fsdp_auto_wrap_policy as theirs

    from kilotune.peft.utils.other import fsdp_auto_wrap_policy as own

    def wrapped(library: Any, policy: Any) -> set[str]:
        config = library.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
        with quiet():
            model = library.get_peft_model(tiny_llama(), config)
            asked = policy(model)
        named = [(name, m) for name, m in model.named_modules() if asked(module=m, recurse=False, nonwrapped_numel=0)]
        return {name for name, _ in named}

    assert wrapped(ours, own) == wrapped(peft, theirs) > {"base_model.model.model.layers.1"}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP")
    found = wrapped(ours, own)
    assert found == wrapped(peft, theirs) > {"base_model.model.model.layers.1.mlp"}
    assert "base_model.model.model.layers.1" not in found
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP,NoSuchBlock")
    with pytest.raises(ConfigError, match="the model has no NoSuchBlock"):
        wrapped(ours, own)
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP")
    assert own(mlp()).keywords["policies"][1].keywords["transformer_layer_cls"] == set()


def test_inputs_are_never_cast_to_an_adapters_dtype() -> None:
    from kilotune.peft.helpers import disable_input_dtype_casting

    model = made(ours, "LoraConfig")
    wanted = logits(model)
    for active in (True, False):
        with disable_input_dtype_casting(model, active):
            assert torch.equal(logits(model), wanted)
