"""What PEFT keeps beside its methods: optimizers, components of data, modules without numbers, buffers by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kilotune.peft as ours
from kilotune.errors import AdapterError, ConfigError
from kilotune.peft.optimizers import LoraFAOptimizer, create_lorafa_optimizer, create_loraplus_optimizer
from kilotune.peft.tuners._buffer_dict import BufferDict
from kilotune.peft.utils.incremental_pca import IncrementalPCA
from kilotune.peft.utils.integrations import init_empty_weights, skip_init_on_device
from tests.peft.both import IDS, METHODS, alike, filled, logits, made
from tests.support.models import mlp, tiny_llama

# -- optimizers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_loraplus_makes_pefts_groups(targets: list[str]) -> None:
    """Also without an adapted embedding, whose rate then means nothing."""

    def script(library: Any) -> Any:
        import importlib

        optimizers = importlib.import_module(f"{library.__name__}.optimizers")
        model = library.get_peft_model(tiny_llama(), library.LoraConfig(r=2, target_modules=targets))
        made = optimizers.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4.0)
        return [[group["lr"], len(group["params"])] for group in made.param_groups]

    alike(script)


def test_an_embeddings_rate_that_was_asked_for_has_to_mean_something() -> None:
    model = ours.get_peft_model(tiny_llama(), ours.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="embedding_lr: has no effect"):
        create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4.0, loraplus_lr_embedding=1e-5)


@pytest.mark.parametrize("target", ["q_proj", "down_proj"])
def test_lorafa_steps_as_pefts_optimizer_does(target: str) -> None:
    def script(library: Any) -> Any:
        import importlib

        found = importlib.import_module(f"{library.__name__}.optimizers.lorafa")
        if library is not ours:
            found.is_bf16_available = lambda: False  # it would compute in 16 bits
        model = library.get_peft_model(
            tiny_llama(), library.LoraConfig(r=4, lora_alpha=12, target_modules=[target], bias="none")
        )
        filled(library, model, "default")
        optimizer = found.create_lorafa_optimizer(model, r=4, lora_alpha=12, lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return library.get_peft_model_state_dict(model)

    alike(script, 1e-4)


def test_lorafas_gradient_of_b_is_the_nearest_to_the_weights_own() -> None:
    """The normal equations of min |s dB A - G|, solved by least squares."""
    torch.manual_seed(0)
    a, whole, scale = torch.randn(3, 7), torch.randn(5, 7), 1.5
    first, second = nn.Parameter(a, requires_grad=False), nn.Parameter(torch.zeros(5, 3))
    second.grad = scale * whole @ a.T
    group = {"params": [first, second], "names": ["x.lora_A.d.weight", "x.lora_B.d.weight"]}
    optimizer = LoraFAOptimizer([{**group, "scaling_factors": [scale, scale]}], lr=1.0, betas=(0.0, 0.0), eps=0.0)
    optimizer.step()
    wanted = torch.linalg.lstsq(scale * a.T, whole.T).solution.T
    torch.testing.assert_close(optimizer.state[second]["exp_avg"], wanted, atol=1e-4, rtol=1e-4)


def test_lorafas_state_comes_back() -> None:
    model = ours.get_peft_model(mlp(), ours.LoraConfig(r=2, target_modules=["0"]))
    optimizer = create_lorafa_optimizer(model, 2, 8, lr=1e-2)
    model(torch.randn(3, model.base_model.model[0].in_features)).sum().backward()
    optimizer.step()
    again = create_lorafa_optimizer(model, 2, 8, lr=1e-2)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [len(state) for state in again.state.values()] == [3]


def test_lorafa_is_for_plain_lora() -> None:
    for config, why in (
        (ours.VeraConfig(target_modules=["0"]), "no plain LoRA"),
        (ours.LoraConfig(target_modules=["0"], use_dora=True), "no plain LoRA"),
        (ours.LoraConfig(target_modules=["0"], use_rslora=True), "made otherwise"),
        (ours.LoraConfig(target_modules=["0"], lora_alpha=0), "is 0"),
    ):
        with pytest.raises(ConfigError, match=why):
            create_lorafa_optimizer(ours.get_peft_model(mlp(), config), 8, 8, lr=1e-3, use_rslora=False)
    with pytest.raises(ConfigError, match="betas"):
        LoraFAOptimizer([nn.Parameter(torch.ones(1))], betas=(1.0, 0.9))
    with pytest.raises(ConfigError, match="names and scaling_factors"):
        LoraFAOptimizer([nn.Parameter(torch.ones(1))])


# -- IA3 -------------------------------------------------------------------------------------------------------


def test_ia3_adapters_are_added_as_by_peft() -> None:
    def script(library: Any) -> Any:
        model = made(library, "IA3Config", "one")
        other = {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": [], "task_type": "CAUSAL_LM"}
        model.add_adapter("two", library.IA3Config(**other))
        filled(library, model, "two")
        model.add_weighted_adapter(["one", "two"], [0.75, -0.5], "sum")
        model.add_weighted_adapter(["one", "two"], [9.0, 9.0], "sum")  # there already
        model.set_adapter("sum")
        return logits(model), library.get_peft_model_state_dict(model, adapter_name="sum")

    alike(script)


def test_what_makes_no_sum_of_ia3_adapters() -> None:
    model = made(ours, "IA3Config", "one")
    model.add_adapter("output", ours.IA3Config(target_modules=["down_proj"], feedforward_modules=[]))
    model.add_adapter("lora", ours.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="one adapter scales the input, and another the output"):
        model.add_weighted_adapter(["one", "output"], [1.0, 1.0], "sum")
    with pytest.raises(ConfigError, match=r"\['lora'\] are no IA3"):
        model.add_weighted_adapter(["one", "lora"], [1.0, 1.0], "sum")
    with pytest.raises(ConfigError, match="one for each of 1 adapters, got 2"):
        model.add_weighted_adapter(["one"], [1.0, 1.0], "sum")
    with pytest.raises(AdapterError, match="nobody"):
        model.add_weighted_adapter(["nobody"], [1.0], "sum")
    assert sorted(model.peft_config) == ["lora", "one", "output"]


def test_a_state_says_which_inputs_ia3_scales() -> None:
    def script(library: Any) -> Any:
        config = library.IA3Config(**METHODS["IA3Config"])
        state = library.get_peft_model_state_dict(library.inject_adapter_in_model(config, tiny_llama()))
        again = library.inject_adapter_in_model(
            library.IA3Config(**METHODS["IA3Config"]), tiny_llama(), state_dict=state
        )
        return {key: list(value.shape) for key, value in library.get_peft_model_state_dict(again).items()}

    alike(script)


# -- keys, files -----------------------------------------------------------------------------------------------


def test_keys_of_an_adapter_without_a_model_around_it_are_the_bases_own() -> None:
    def script(library: Any) -> Any:
        config = library.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        state = library.get_peft_model_state_dict(library.inject_adapter_in_model(config, tiny_llama()))
        empty = library.inject_adapter_in_model(config, tiny_llama(), low_cpu_mem_usage=True)
        where = library.get_peft_model_state_dict(empty)
        return sorted(state), [str(value.device) for key, value in where.items() if "lora" in key]

    alike(script)


def test_an_adapter_without_a_task_names_its_bases_class(tmp_path: Path) -> None:
    model = ours.get_peft_model(tiny_llama(), ours.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.get_base_model().save_pretrained(tmp_path / "base")
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(path.read_text())
    assert said["auto_mapping"] == {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
    path.write_text(json.dumps({**said, "base_model_name_or_path": str(tmp_path / "base")}))
    found = ours.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(found), logits(model))
    ours.get_peft_model(mlp(), ours.LoraConfig(target_modules=["0"])).save_pretrained(tmp_path / "own")
    assert json.loads((tmp_path / "own" / "adapter_config.json").read_text())["auto_mapping"] is None


def test_options_of_a_configuration_that_are_not_pefts_are_told_where_they_are_set(tmp_path: Path) -> None:
    import peft

    for name in METHODS:
        config = getattr(ours, name)(**METHODS[name])
        assert set(config.to_dict()) <= set(getattr(peft, name)(**METHODS[name]).to_dict()) | {"runtime_config"}
        config.save_pretrained(tmp_path / name)
        assert ours.PeftConfig.from_pretrained(tmp_path / name).to_dict() == config.to_dict()
    assert ours.LoraConfig(lora_fa=True).to_dict()["lora_fa"] is True


def test_transformers_options_of_a_download_are_taken_as_long_as_they_are_off(tmp_path: Path) -> None:
    ours.LoraConfig(r=3).save_pretrained(tmp_path)
    found = ours.PeftConfig.from_pretrained(tmp_path, subfolder="", force_download=False, proxies=None)
    assert found.r == 3  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="force_download=True: not here"):
        ours.PeftConfig.from_pretrained(tmp_path, force_download=True)
    with pytest.raises(TypeError, match="unexpected options: colour"):
        ours.PeftConfig.from_pretrained(tmp_path, colour=1)


def test_a_folder_whose_configuration_is_broken_is_no_adapter(tmp_path: Path) -> None:
    made(ours, "LoraConfig").save_pretrained(tmp_path)
    assert ours.helpers.check_if_peft_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    assert not ours.helpers.check_if_peft_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("nonsense")
    assert not ours.helpers.check_if_peft_model(tmp_path)


def test_an_empty_layers_pattern_means_the_usual_names() -> None:
    config = ours.LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=[])
    assert ours.get_peft_model(tiny_llama(), config).targeted_module_names == ["model.layers.1.self_attn.q_proj"]


# -- the rest --------------------------------------------------------------------------------------------------


def test_components_of_batches_are_those_of_all_rows() -> None:
    torch.manual_seed(0)
    rows = torch.randn(60, 4, dtype=torch.float64) @ torch.diag(torch.tensor([5.0, 2.0, 1.0, 0.1]).double()) + 3
    found = IncrementalPCA(batch_size=17).fit(rows)
    centred = rows - rows.mean(0)
    _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(found.mean_, rows.mean(0))
    torch.testing.assert_close(found.var_, rows.var(0, correction=0))
    torch.testing.assert_close(found.singular_values_, values)
    torch.testing.assert_close(found.components_.abs(), vectors.abs())
    torch.testing.assert_close(found.explained_variance_, values**2 / 59)
    torch.testing.assert_close(found.explained_variance_ratio_.sum(), torch.ones((), dtype=torch.float64))
    assert (found.n_samples_seen_, float(found.noise_variance_)) == (60, 0.0)
    torch.testing.assert_close(found.transform(rows).abs(), (centred @ vectors.T).abs())


def test_the_first_components_and_pefts_own_are_the_same() -> None:
    from peft.utils.incremental_pca import IncrementalPCA as Theirs

    torch.manual_seed(1)
    rows = torch.randn(40, 6) * torch.arange(1, 7)
    pairs: list[tuple[Any, Any]] = [
        (kind(n_components=2, batch_size=9).fit(rows), kind) for kind in (IncrementalPCA, Theirs)
    ]
    own, theirs = pairs[0][0], pairs[1][0]
    for name in ("components_", "singular_values_", "explained_variance_ratio_", "mean_", "var_"):
        torch.testing.assert_close(getattr(own, name).double(), getattr(theirs, name).double(), atol=1e-4, rtol=1e-4)
    fast = IncrementalPCA(n_components=2, batch_size=9, lowrank=True, lowrank_seed=0).fit(rows)
    torch.testing.assert_close(fast.components_, own.components_, atol=1e-2, rtol=1e-2)


def test_what_has_no_components() -> None:
    with pytest.raises(ConfigError, match="there are 2 features"):
        IncrementalPCA(3).fit(torch.ones(9, 2))
    with pytest.raises(ConfigError, match="the first batch has 2 rows"):
        IncrementalPCA(3).partial_fit(torch.ones(2, 9))
    with pytest.raises(ConfigError, match="expected 3 features as before, got 4"):
        IncrementalPCA().fit(torch.randn(9, 3)).partial_fit(torch.randn(9, 4))
    with pytest.raises(ConfigError, match="rows"):
        IncrementalPCA().fit(torch.ones(3))
    with pytest.raises(ConfigError, match="lowrank"):
        IncrementalPCA(lowrank=True)
    with pytest.raises(ConfigError, match="at least n_components = 3"):
        IncrementalPCA(3, lowrank=True, lowrank_q=2)


def test_modules_without_numbers() -> None:
    def where(module: nn.Module) -> set[str]:
        return {value.device.type for value in module.state_dict().values()}

    @skip_init_on_device
    def whole() -> nn.Module:
        return nn.BatchNorm1d(3)

    with init_empty_weights():
        empty, kept = nn.Linear(2, 2), whole()
        half = nn.BatchNorm1d(3)
    assert (where(empty), where(kept), where(half)) == ({"meta"}, {"cpu"}, {"meta", "cpu"})
    with init_empty_weights(include_buffers=True):
        assert where(nn.BatchNorm1d(3)) == {"meta"}
    assert where(nn.Linear(2, 2)) == where(whole()) == {"cpu"}


def test_buffers_by_name() -> None:
    found = BufferDict({"one": torch.ones(2)}, persistent=True)
    found.update({"two": torch.zeros(1)})
    found.update([("one", torch.full((2,), 3.0))])
    found.update(BufferDict({"three": torch.ones(1)}))
    assert (list(found), len(found), "two" in found) == (["one", "two", "three"], 3, True)
    assert set(found.state_dict()) == {"one", "two", "three"}
    assert torch.equal(found.pop("one"), torch.full((2,), 3.0))
    assert "two" in repr(found)
    assert [value.dtype for value in found.half().values() if isinstance(value, Tensor)] == [torch.float16] * 2
    with pytest.raises(ConfigError, match="expected a tensor, got"):
        found["no"] = 1  # type: ignore[assignment]
    found.clear()
    assert not list(found.keys())
    assert not BufferDict({"one": torch.ones(2)}).state_dict()
