"""transformers' models: generation, tied weights, heads of tasks, gradient checkpointing."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kilotune import (
    AdapterConfig,
    AdapterError,
    ConfigError,
    LoraConfig,
    PeftModel,
    TaskType,
    VeraConfig,
    get_peft_model,
)
from kilotune.layers.saved_module import SavedModule
from kilotune.train import for_trainer
from tests.support.guards import adapters_act
from tests.support.models import bits, freed_at_once, randomize, tiny_classifier, tiny_gpt2, tiny_llama, trained, watch

pytest.importorskip("transformers")

IDS = torch.tensor([[1, 5, 9, 3, 7, 2], [1, 4, 4, 8, 30, 11]])
CONFIGS = [
    VeraConfig(r=4, init_weights=False, task_type="CAUSAL_LM"),
    LoraConfig(r=2, init_lora_weights=False, task_type=TaskType.CAUSAL_LM),
]
both = pytest.mark.parametrize("config", CONFIGS, ids=["vera", "lora"])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # transformers renames its own methods between versions; both names are tried by its users.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        yield


def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS).logits
    return result


@both
def test_default_targets_generation_and_passthrough(config: AdapterConfig) -> None:
    model = get_peft_model(tiny_llama(), config)
    assert {name.rpartition(".")[2] for name in model.adapted_layers()} == {"q_proj", "v_proj"}
    assert len(model.adapted_layers()) == 4
    assert model.config.model_type == "llama"
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")
    model.eval()
    changed = model.generate(IDS, max_new_tokens=6, do_sample=False)
    with model.disable_adapter():
        plain = model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(plain, tiny_llama().eval().generate(IDS, max_new_tokens=6, do_sample=False))
    assert changed.shape == plain.shape == (2, 12)
    assert not torch.equal(changed, plain)
    merged = model.merge_and_unload().generate(IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(merged, changed)


@both
def test_every_adapted_layer_of_a_llama_and_a_gpt2_runs(config: AdapterConfig) -> None:
    for make in (tiny_llama, tiny_gpt2):
        model = get_peft_model(make(), config.replace(target_modules="all-linear"))
        assert not any("lm_head" in name for name in model.adapted_layers())
        adapters_act(model, lambda model=model: logits(model))


# -- tied weights ----------------------------------------------------------------------------------

TIED = [(tiny_llama, "model.embed_tokens"), (tiny_gpt2, "transformer.wte")]


@pytest.mark.parametrize(("make", "embedding"), TIED, ids=["llama", "gpt2"])
@both
def test_an_adapter_on_a_tied_head_leaves_the_embedding_alone(make: Any, embedding: str, config: AdapterConfig) -> None:
    base = make(tie=True).eval()
    table = base.get_submodule(embedding)
    weight = table.weight
    assert base.lm_head.weight is weight
    before = weight.clone()
    model = get_peft_model(base, config.replace(target_modules=["lm_head"]))
    assert base.lm_head.weight is weight  # still tied
    y = logits(model)
    assert (y - logits(make(tie=True).eval())).abs().max() > 1e-3
    model.merge_adapter()
    torch.testing.assert_close(logits(model), y)
    assert table.weight is weight
    assert torch.equal(weight, before)
    assert base.lm_head.weight is not weight
    model.unmerge_adapter()
    assert base.lm_head.weight is weight
    assert torch.equal(logits(model), y)
    plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain), y)
    assert table.weight is weight
    assert torch.equal(weight, before)
    assert plain.lm_head.weight.requires_grad
    assert all(p.requires_grad for p in plain.parameters())


def test_a_merged_model_with_an_untied_head_survives_saving(tmp_path: Path) -> None:
    model = get_peft_model(
        tiny_llama(tie=True).eval(), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    )
    y = logits(model)
    plain = model.merge_and_unload()
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), y)


def test_tying_again_reaches_the_base_layer() -> None:
    base = tiny_llama(tie=True)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"]))
    base.tie_weights()
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight
    assert logits(model).shape == (2, 6, 32)


# -- tasks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [VeraConfig, LoraConfig])
def test_a_classification_task_trains_the_head_as_well(method: Any, tmp_path: Path) -> None:
    base = tiny_classifier().eval()
    expected = logits(base)
    model = get_peft_model(base, method(r=2, task_type="SEQ_CLS"))
    assert isinstance(model.classifier, SavedModule)
    assert model.peft_config["default"].modules_to_save == ("classifier",)
    assert {name.rpartition(".")[2] for name in model.adapted_layers()} == {"query", "value"}
    assert torch.equal(logits(model), expected)
    randomize(model)
    changed = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_classifier(), tmp_path)), changed)
    plain = model.merge_and_unload()
    assert type(plain.classifier) is nn.Linear
    torch.testing.assert_close(logits(plain), changed)


def test_other_tasks_train_no_head() -> None:
    model = get_peft_model(tiny_llama(), VeraConfig(r=2, task_type="FEATURE_EXTRACTION"))
    assert model.peft_config["default"].modules_to_save is None


def test_an_architecture_without_defaults_asks_for_targets() -> None:
    with pytest.raises(ConfigError, match=r"target_modules=None asks .*the model has no config\.model_type"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), VeraConfig(r=2))
    base = tiny_llama()
    base.config.model_type = "lama"
    with pytest.raises(ConfigError, match=r"there are none for 'lama'\. Did you mean 'llama'\?"):
        get_peft_model(base, VeraConfig(r=2))


# -- training --------------------------------------------------------------------------------------


def gradients(config: AdapterConfig, reentrant: bool | None, first: bool) -> dict[str, torch.Tensor]:
    base = tiny_llama()
    base.config.use_cache = False

    def turn_on(model: Any) -> None:
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()  # what reentrant checkpointing needs above frozen embeddings

    if first:
        turn_on(base)
    torch.manual_seed(0)
    model = get_peft_model(base, config).train()
    if not first:
        turn_on(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.adapter_parameters()}


@both
@pytest.mark.parametrize("first", [True, False], ids=["before wrapping", "after wrapping"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(config: AdapterConfig, first: bool, reentrant: bool) -> None:
    plain, saved = gradients(config, None, first), gradients(config, reentrant, first)
    assert plain.keys() == saved.keys()
    for name, value in plain.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-8)


@both
def test_twenty_steps_lower_the_loss_of_a_language_model(config: AdapterConfig) -> None:
    start = {"init_weights": True, "d_initial": 0.5} if isinstance(config, VeraConfig) else {"init_lora_weights": True}
    model = get_peft_model(tiny_llama(), config.replace(target_modules=r".*(_proj|lm_head)", **start)).train()
    base = {k: v for k, v in bits(model).items() if "adapters" not in k}
    optimizer = torch.optim.AdamW([p for _, p in trained(model)], lr=0.05)
    losses = []
    for _ in range(20):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert {k: v for k, v in bits(model).items() if "adapters" not in k} == base


@both
def test_bfloat16_models_train_with_float32_vectors(config: AdapterConfig) -> None:
    model = get_peft_model(tiny_llama().bfloat16(), config)
    assert all(p.dtype == torch.float32 for _, p in model.adapter_parameters())
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for _, p in model.adapter_parameters())


@both
def test_the_trainer_trains_and_saves_the_adapter(config: AdapterConfig, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(tiny_llama(), config)
    before = {name: p.detach().clone() for name, p in model.adapter_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model=for_trainer(model), args=arguments, train_dataset=data).train()
    assert all(not torch.equal(p, before[name]) for name, p in model.adapter_parameters())
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_a_language_model_is_freed_with_its_last_name(tmp_path: Path) -> None:
    with freed_at_once() as watched:
        heads = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"])
        model = get_peft_model(tiny_llama(tie=True), heads)
        model.add_adapter("second", VeraConfig(r=4))
        model.save_pretrained(tmp_path)
        model.load_adapter(tmp_path / "second", "third")
        watched += watch(model)
        model.train()
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        model.generate(IDS, max_new_tokens=2, adapter_names=["second"] * len(IDS))
        model.eval()(input_ids=IDS, adapter_names=["second", *["third"] * (len(IDS) - 1)]).logits.sum().backward()
        with contextlib.suppress(AdapterError):
            model.load_adapter(tmp_path, "second")  # a traceback holds what it went through
        model.delete_adapter("third")
        model.set_adapter("second")
        model.merge_adapter()
        del model


def test_compiled_generation_follows_the_adapters() -> None:
    torch.compiler.reset()
    model = get_peft_model(tiny_llama(layers=1).eval(), CONFIGS[0])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(input_ids=IDS, use_cache=False).logits, model(input_ids=IDS, use_cache=False).logits
        )
