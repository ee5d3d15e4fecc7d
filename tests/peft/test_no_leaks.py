"""What one adapter, file or call says reaches no other: numbers over other options, what is off, what is merged."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kilotune.peft as ours
from kilotune.errors import AdapterError, CheckpointError, ConfigError, MergeError
from kilotune.peft.utils import hotswap
from tests.peft.both import METHODS, alike, check_same, filled, logits, made
from tests.peft_parity.oracle import quiet
from tests.support.models import tiny_llama

SHORT = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}


# -- a file over an adapter that is there --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("LoraConfig", {"lora_alpha": 32}, "layers.0.self_attn.q_proj: a scale of 8 in the file, 2 in the model"),
        ("LoraConfig", {"alpha_pattern": {"down_proj": 5}}, "down_proj: a scale of 1.25 in the file, 2 in the model"),
        ("LoraConfig", {"use_rslora": True}, "a scale of 4 in the file, 2 in the model"),
        ("LoraConfig", {"use_dora": True}, "use_dora: True in the file, False in the model"),
        ("LoraConfig", {"init_lora_weights": "pissa"}, "part_of_base: 'pissa' in the file, None in the model"),
        ("VeraConfig", {"projection_prng_key": 5}, "projection_prng_key: 5 in the file, 0 in the model"),
        ("UniLoraConfig", {"proj_seed": 5}, "proj_seed: 5 in the file, 42 in the model"),
    ],
)
def test_a_file_whose_numbers_mean_something_else_is_refused(
    name: str, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    made(ours, name, **options).save_pretrained(tmp_path)
    model = made(ours, name)
    before = logits(model)
    with pytest.raises(CheckpointError) as error:
        model.load_adapter(tmp_path, "default")
    assert words in str(error.value)
    assert torch.equal(logits(model), before)


def test_a_file_that_says_the_same_in_other_words_is_taken(tmp_path: Path) -> None:
    file = made(ours, "LoraConfig", use_rslora=True, lora_alpha=4, lora_dropout=0.5)  # 4 / sqrt(4), as 8 / 4
    file.save_pretrained(tmp_path)
    model = ours.get_peft_model(tiny_llama(), ours.LoraConfig(**METHODS["LoraConfig"]))
    model.load_adapter(tmp_path, "default")
    check_same(logits(model), logits(file), 1e-6)


def test_other_frozen_matrices_in_a_state_are_refused() -> None:
    state = ours.get_peft_model_state_dict(made(ours, "VeraConfig", projection_prng_key=5))
    model = made(ours, "VeraConfig")
    before = logits(model)
    with pytest.raises(CheckpointError, match="others than the adapter has in this model") as error:
        ours.set_peft_model_state_dict(model, state)
    assert "base_model.vera_A" in str(error.value)
    assert torch.equal(logits(model), before)
    rounded = {key: v.to(torch.bfloat16) for key, v in ours.get_peft_model_state_dict(model).items()}
    ours.set_peft_model_state_dict(model, rounded)  # the same ones
    check_same(logits(model), before, 0.02)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x, x, x)[0]
        return found


def test_an_attentions_file_of_pefts_is_the_same_fresh_and_over_another(tmp_path: Path) -> None:
    import peft

    options: dict[str, Any] = {"r": 2, "target_modules": ["inner"]}
    with quiet():
        theirs = peft.get_peft_model(_Attention(), peft.LoraConfig(**options))
        filled(peft, theirs, "default")
        theirs.save_pretrained(tmp_path)
    x = torch.linspace(-1, 1, 32).reshape(1, 4, 8)
    over = ours.get_peft_model(_Attention(), ours.LoraConfig(**options))
    over.load_adapter(tmp_path, "default")
    with torch.no_grad():
        check_same(over.eval()(x), ours.PeftModel.from_pretrained(_Attention(), tmp_path)(x), 1e-6)
        check_same(over(x), theirs.eval()(x), 1e-5)


def test_loading_puts_the_model_into_eval_mode_as_pefts(tmp_path: Path) -> None:
    def script(library: Any) -> Any:
        model = made(library, "LoraConfig")
        model.save_pretrained(tmp_path)
        found = []
        for name in ("default", "other"):
            for trainable in (False, True):
                model.train()
                model.load_adapter(tmp_path, f"{name}{trainable}" if name == "other" else name, is_trainable=trainable)
                found.append((model.training, model.base_model.training))
        return found

    alike(script)


# -- off and on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["model", "layers"])
def test_what_is_switched_off_stays_off_when_another_adapter_is_set(way: str) -> None:
    def script(library: Any) -> Any:
        model = made(library, "LoraConfig", "one")
        model.add_adapter("two", library.LoraConfig(**SHORT))
        filled(library, model, "two")
        model.base_model.disable_adapter_layers()
        layer_class = importlib.import_module(f"{library.__name__}.tuners.tuners_utils").BaseTunerLayer
        if way == "model":
            model.set_adapter("two")
        else:
            for module in model.modules():
                if isinstance(module, layer_class):
                    module.set_adapter("two")
        off, enabled = logits(model), model.get_model_status().enabled
        trained = sorted(name for name, p in model.named_parameters() if p.requires_grad)
        model.base_model.enable_adapter_layers()
        return off, enabled, trained, logits(model)

    alike(script)


def test_one_that_is_injected_while_all_are_off_is_off_too() -> None:
    model = tiny_llama()
    plain = logits(model)
    ours.inject_adapter_in_model(ours.LoraConfig(**SHORT), model)
    model.model.layers[0].self_attn.q_proj.enable_adapters(False)
    ours.inject_adapter_in_model(ours.LoraConfig(**SHORT), model, "two")
    assert torch.equal(logits(model), plain)
    assert ours.get_model_status(model).enabled is False
    model.model.layers[0].self_attn.q_proj.enable_adapters(True)
    assert ours.get_model_status(model).active_adapters == ["two"]
    assert not torch.equal(logits(model), plain)


def test_the_next_after_a_deleted_one_is_pefts_and_told() -> None:
    def script(library: Any) -> Any:
        model = made(library, "LoraConfig", "one")
        for name in ("zb", "za"):
            model.add_adapter(name, library.LoraConfig(**SHORT))
            filled(library, model, name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.delete_adapter("one")
        told = {str(each.message) for each in caught if "now deleted" in str(each.message)}
        return told, model.active_adapters, logits(model)

    alike(script)


# -- other things that were passed over ------------------------------------------------------------------------


def test_the_base_gets_no_other_numbers_while_an_adapter_is_merged() -> None:
    model = made(ours, "LoraConfig")
    state = {key: torch.zeros_like(value) for key, value in ours.get_base_model_state_dict(model).items()}
    model.merge_adapter()
    with pytest.raises(MergeError, match=r"unmerge_adapter\(\) before"):
        ours.set_base_model_state_dict(model, state)
    model.unmerge_adapter()
    ours.set_base_model_state_dict(model, state)
    assert not any(value.any() for value in ours.get_base_model_state_dict(model).values())


def test_a_merged_adapter_gets_no_other_numbers(tmp_path: Path) -> None:
    model = made(ours, "LoraConfig")
    model.save_pretrained(tmp_path)
    state = ours.get_peft_model_state_dict(model)
    model.merge_adapter()
    with pytest.raises(MergeError, match="would act as before"):
        ours.set_peft_model_state_dict(model, state)
    with pytest.raises(MergeError, match="would act as before"):
        model.load_adapter(tmp_path, "default")


def test_an_adapter_whose_alpha_is_zero_can_be_rescaled_and_not_set_on() -> None:
    def script(library: Any) -> Any:
        model = made(library, "LoraConfig", lora_alpha=0)
        with importlib.import_module(f"{library.__name__}.helpers").rescale_adapter_scale(model, 0.5):
            return logits(model)

    alike(script)
    scaling = made(ours, "LoraConfig", lora_alpha=0).base_model.model.model.layers[0].self_attn.q_proj.scaling
    with pytest.raises(AdapterError, match="its lora_alpha is 0"):
        scaling["default"] = 2.0
    assert scaling["default"] == 0


def test_a_weighted_sum_with_rslora_is_the_sum() -> None:
    model = made(ours, "LoraConfig", use_rslora=True)
    alone = logits(model)
    model.add_adapter("two", ours.LoraConfig(**{**METHODS["LoraConfig"], "use_rslora": True}))
    for way in ("linear", "cat", "svd"):
        model.add_weighted_adapter(["default", "two"], [1.0, 0.0], way, combination_type=way)
        model.set_adapter(way)
        check_same(logits(model), alone, 1e-5)


def test_unloading_gives_the_base_back_as_it_was() -> None:
    base = tiny_llama()
    base.lm_head.requires_grad_(False)
    before = logits(base), [p.requires_grad for p in base.parameters()]
    model = ours.get_peft_model(base, ours.LoraConfig(**METHODS["LoraConfig"], modules_to_save=["lm_head"]))
    filled(ours, model, "default")
    back = model.unload()
    assert torch.equal(logits(back), before[0])
    assert [p.requires_grad for p in back.parameters()] == before[1]


def test_a_mixed_model_takes_all_options() -> None:
    config = ours.LoraConfig(**SHORT)
    half = ours.get_peft_model(tiny_llama().to(torch.bfloat16), config, mixed=True, autocast_adapter_dtype=False)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    empty = ours.get_peft_model(tiny_llama(), config, mixed=True, low_cpu_mem_usage=True)
    assert any(p.is_meta for p in empty.parameters())


def test_a_rank_that_a_file_claims_takes_no_memory_in_a_swap(tmp_path: Path) -> None:
    import peft

    with quiet():
        made(peft, "LoraConfig").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    model = made(ours, "LoraConfig")
    before = logits(model)
    path.write_text(json.dumps({**config, "r": 10**9}))
    with pytest.raises(CheckpointError, match="the model expects"):
        hotswap.hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(logits(model), before)
    with quiet():
        made(peft, "LoraConfig", target_modules=["q_proj"]).save_pretrained(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank_pattern": {"down_proj": 10**9}}))
    hotswap.hotswap_adapter(model, tmp_path, "default")
    check_same(logits(model), logits(made(ours, "LoraConfig", target_modules=["q_proj"])), 1e-6)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"parent_library": "transformers.utils.hub", "base_model_class": "os"}, "hub.os is no model of transformers"),
        ({"parent_library": "transformers", "base_model_class": "Nothing"}, "there is no transformers.Nothing"),
        ("LlamaForCausalLM", "only transformers' classes"),
    ],
)
def test_a_base_class_that_is_none_is_refused(said: Any, words: str, tmp_path: Path) -> None:
    made(ours, "LoraConfig", task_type=None).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = {**json.loads(path.read_text()), "auto_mapping": said, "base_model_name_or_path": str(tmp_path)}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        ours.AutoPeftModel.from_pretrained(tmp_path)


def test_another_librarys_configuration_is_told() -> None:
    """As in a script of which half the imports were changed."""
    import peft

    for wrong in (peft.LoraConfig(target_modules=["q_proj"]), {"r": 4}, None):
        calls = (
            lambda: ours.get_peft_model(tiny_llama(), wrong),  # noqa: B023
            lambda: ours.get_peft_model(tiny_llama(), wrong, mixed=True),  # noqa: B023
            lambda: ours.inject_adapter_in_model(wrong, tiny_llama()),  # noqa: B023
            lambda: made(ours, "LoraConfig").add_adapter("two", wrong),  # noqa: B023
        )
        for call in calls:
            with pytest.raises(ConfigError, match="expected a configuration of kilotune.peft, got"):
                call()


def test_evas_options_are_looked_at() -> None:
    for wrong, words in (({"rho": 2.0, "rhoo": 1}, "unknown options \\['rhoo'\\]"), (5, "expected an EvaConfig")):
        with pytest.raises(ConfigError, match=words):
            ours.LoraConfig(init_lora_weights="eva", eva_config=wrong)
