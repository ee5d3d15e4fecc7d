"""Another LoRA's numbers in the place of a loaded one: as that adapter freshly loaded, and as PEFT does it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import kilotune.peft as ours
from kilotune.errors import AdapterError, CheckpointError, ConfigError
from kilotune.peft.utils import hotswap
from tests.peft.both import IDS, check_same, logits, made
from tests.peft_parity.oracle import quiet
from tests.support.models import tiny_llama

# What takes the place of r=4, alpha 8 on q_proj and down_proj.
OTHERS: dict[str, dict[str, Any]] = {
    "another alpha": {"r": 4, "lora_alpha": 3},
    "a lower rank": {"r": 2, "lora_alpha": 5},
    "a higher rank": {"r": 6, "lora_alpha": 9},
    "fewer layers": {"r": 3, "lora_alpha": 7, "target_modules": ["down_proj"]},
    "several ranks": {"r": 3, "lora_alpha": 7, "rank_pattern": {"q_proj": 5, "layers.0.mlp.down_proj": 2}},
}
FORMS: dict[str, dict[str, Any]] = {"plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
CONVOLUTION = {"target_modules": ["conv", "table"], "init_lora_weights": False}


def saved(folder: Path, seed: int = 1, library: Any = ours, **options: Any) -> Path:
    """An adapter's folder; other seeds have other numbers."""
    with quiet():
        model = made(library, "LoraConfig", **options)
        state = {key: value * (1 + 0.3 * seed) for key, value in library.get_peft_model_state_dict(model).items()}
        library.set_peft_model_state_dict(model, state)
        model.save_pretrained(folder)
    return folder


def loaded(folder: Path, library: Any = ours) -> Any:
    with quiet():
        return library.PeftModel.from_pretrained(tiny_llama(), folder)


# DoRA in fewer layers is refused, see below.
SWAPS = [(other, form) for other in OTHERS for form in FORMS if (other, form) != ("fewer layers", "dora")]


@pytest.mark.parametrize("prepared", [None, False, 9])
@pytest.mark.parametrize(("other", "form"), SWAPS)
def test_it_is_the_adapter_freshly_loaded(other: str, form: str, prepared: int | None, tmp_path: Path) -> None:
    first = saved(tmp_path / "first", r=4, lora_alpha=8, **FORMS[form])
    second = saved(tmp_path / "second", 2, **FORMS[form], **OTHERS[other])
    model = loaded(first)
    before = logits(model)
    if prepared is not None:
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=prepared or None)
        check_same(logits(model), before, 1e-6)
    for folder, wanted in ((second, logits(loaded(second))), (first, before)):
        hotswap.hotswap_adapter(model, folder, "default")
        check_same(logits(model), wanted, 2e-6)
        model.save_pretrained(tmp_path / "again")
        check_same(logits(loaded(tmp_path / "again")), wanted, 2e-6)
        strength = model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"]
        assert isinstance(strength, Tensor) is (prepared is not None)


@pytest.mark.parametrize("other", ["another alpha", "a lower rank", "a higher rank", "fewer layers"])
def test_it_is_pefts_hotswap(other: str, tmp_path: Path) -> None:
    import peft
    import peft.utils.hotswap

    first, second = saved(tmp_path / "first", r=4, lora_alpha=8), saved(tmp_path / "second", 2, **OTHERS[other])
    found = []
    for library, functions in ((ours, hotswap), (peft, peft.utils.hotswap)):
        model = loaded(first, library)
        functions.prepare_model_for_compiled_hotswap(model, target_rank=8)
        functions.hotswap_adapter(model, second, "default", torch_device="cpu")
        layer = model.base_model.model.model.layers[1].mlp.down_proj
        numbers = [layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]]
        found.append((logits(model), [value.detach() for value in numbers]))
    check_same(found[0], found[1], 1e-5)


def test_pefts_files_too(tmp_path: Path) -> None:
    import peft

    first, second = saved(tmp_path / "a", library=peft, r=4), saved(tmp_path / "b", 2, peft, r=2, lora_alpha=5)
    model = loaded(first)
    hotswap.hotswap_adapter(model, second, "default")
    check_same(logits(model), logits(loaded(second, peft)), 1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize("form", FORMS)
def test_what_was_compiled_is_not_compiled_anew(form: str, tmp_path: Path) -> None:
    count = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal count
        count += 1
        return graph.forward

    first = saved(tmp_path / "first", r=4, lora_alpha=8, **FORMS[form])
    second = saved(tmp_path / "second", 2, r=2, lora_alpha=5, **FORMS[form])
    model = loaded(first).eval()
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=6)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.inference_mode():
        compiled(input_ids=IDS)
        graphs = count
        for folder in (second, first):
            hotswap.hotswap_adapter(compiled, folder, "default")
            y = compiled(input_ids=IDS).logits
            check_same(y, logits(loaded(folder)), 2e-6)
            check_same(y, model(input_ids=IDS).logits, 2e-6)
    assert count == graphs


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.conv = nn.Embedding(10, 6), nn.Conv2d(2, 6, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.table(x).reshape(-1, 2, 4, 6))
        return y


@pytest.mark.parametrize("prepared", [None, 8])
def test_convolutions_and_embeddings(prepared: int | None, tmp_path: Path) -> None:
    x, outputs = torch.arange(16).reshape(2, 8) % 10, {}
    for rank in (2, 4, 6):
        torch.manual_seed(rank)
        model = ours.get_peft_model(Net(), ours.LoraConfig(r=rank, lora_alpha=3, **CONVOLUTION))
        outputs[rank] = model(x).detach()
        model.save_pretrained(tmp_path / str(rank))
    model = ours.PeftModel.from_pretrained(Net(), tmp_path / "4")
    if prepared:
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=prepared)
    for rank in (2, 6, 4):
        hotswap.hotswap_adapter(model, tmp_path / str(rank), "default")
        check_same(model(x).detach(), outputs[rank], 1e-6)


def test_biases_and_whole_modules_come_along(tmp_path: Path) -> None:
    options: dict[str, Any] = {"r": 4, "modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
    first, second = saved(tmp_path / "first", **options), saved(tmp_path / "second", 2, **options)
    model = loaded(first)
    hotswap.hotswap_adapter(model, second, "default")
    assert torch.equal(logits(model), logits(loaded(second)))
    plain = saved(tmp_path / "plain", r=4, target_modules=["q_proj"])
    with pytest.raises(RuntimeError, match="missing keys found: lm_head.weight"):
        hotswap.hotswap_adapter(model, plain, "default")
    without = loaded(plain)
    with pytest.raises(RuntimeError, match="unexpected keys found: base_model.model.lm_head.weight"):
        hotswap.hotswap_adapter(without, first, "default")

    torch.manual_seed(3)
    biased = {"target_modules": ["conv"], "bias": "lora_only", "init_lora_weights": False}
    x, nets = torch.arange(16).reshape(2, 8) % 10, []
    for name in "ab":
        net = ours.get_peft_model(Net(), ours.LoraConfig(r=2, **biased))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0)
        net.save_pretrained(tmp_path / name)
        nets.append(net)
    hotswap.hotswap_adapter(nets[0], tmp_path / "b", "default")
    assert torch.equal(nets[0](x), nets[1](x))


def test_a_state_in_a_base_with_injected_adapters(tmp_path: Path) -> None:
    config = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
    model = ours.inject_adapter_in_model(ours.LoraConfig(**config), tiny_llama(), "one.first")
    second = saved(tmp_path, 2, r=3, lora_alpha=5, target_modules=["q_proj"])
    tensors = ours.load_peft_weights(second)
    state = {
        key.removeprefix("base_model.model.").replace(".weight", ".one.first.weight"): value
        for key, value in tensors.items()
    }
    other = ours.PeftConfig.from_pretrained(second)
    hotswap.hotswap_adapter_from_state_dict(model, state, "one.first", other)
    check_same(logits(model), logits(loaded(second)), 1e-6)
    with pytest.raises(ConfigError, match=r"parameter_prefix: expected one of \['lora_'\]"):
        hotswap.hotswap_adapter_from_state_dict(model, state, "one.first", other, "vera_")
    with pytest.raises(ConfigError, match="only supports LORA but VERA was passed"):
        hotswap.hotswap_adapter_from_state_dict(model, state, "one.first", ours.VeraConfig())


def test_what_does_not_fit_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    first = saved(tmp_path / "first", r=4, target_modules=["q_proj"])
    model = loaded(first)
    before, state = logits(model), {key: value.clone() for key, value in model.state_dict().items()}

    def refused(error: type[Exception], match: str, folder: Path, name: str = "default") -> None:
        with pytest.raises(error, match=match):
            hotswap.hotswap_adapter(model, folder, name)
        assert torch.equal(logits(model), before)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    key = "base_model.model.model.layers.0.mlp.down_proj.lora_A.default.weight"
    refused(RuntimeError, f"unexpected keys found: .*{key}", saved(tmp_path / "more", r=4))
    ia3 = tmp_path / "ia3"
    made(ours, "IA3Config").save_pretrained(ia3)
    refused(ConfigError, "Incompatible PEFT types found: LORA and IA3", ia3)
    only = {"target_modules": ["q_proj"]}
    refused(ConfigError, "for use_rslora, False != True", saved(tmp_path / "rs", use_rslora=True, **only))
    refused(ConfigError, "for lora_dropout, 0.0 != 0.5", saved(tmp_path / "drop", lora_dropout=0.5, **only))
    refused(ConfigError, "for alpha_pattern", saved(tmp_path / "alphas", alpha_pattern={"q_proj": 2}, **only))
    refused(ConfigError, "for use_dora, False != True", saved(tmp_path / "dora", use_dora=True, **only))
    refused(AdapterError, "Adapter other does not exist", first, "other")
    broken = saved(tmp_path / "broken", r=4, **only)
    file = broken / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, file)
    refused(CheckpointError, "not finite", broken)
    save_file({**tensors, name: tensors[name][:, :5].contiguous()}, file)
    refused(CheckpointError, "shape of model.layers.0.self_attn.q_proj.lora_A.weight", broken)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="currently merged"):
        hotswap.hotswap_adapter(model, first, "default")


def test_other_methods_and_lacking_magnitudes_are_refused(tmp_path: Path) -> None:
    made(ours, "IA3Config").save_pretrained(tmp_path / "ia3")
    with pytest.raises(ConfigError, match="Hotswapping only supports LORA but IA3 was passed"):
        hotswap.hotswap_adapter(loaded(tmp_path / "ia3"), tmp_path / "ia3", "default")
    dora = saved(tmp_path / "dora", use_dora=True)
    fewer = saved(tmp_path / "fewer", use_dora=True, target_modules=["q_proj"])
    with pytest.raises(RuntimeError, match="missing keys found: .*lora_magnitude_vector"):
        hotswap.hotswap_adapter(loaded(dora), fewer, "default")


def test_preparing_is_refused_where_it_makes_no_sense() -> None:
    prepare = hotswap.prepare_model_for_compiled_hotswap
    for model in (tiny_llama(), made(ours, "VeraConfig")):
        with pytest.raises(ConfigError, match="No adapter layers found on the model"):
            prepare(model)
    model = made(ours, "LoraConfig", rank_pattern={"q_proj": 10})
    with pytest.raises(ConfigError, match=r"target rank 9, but the original rank is larger \(10\)"):
        prepare(model, target_rank=9)
    with pytest.raises(ConfigError, match="target_rank: expected a whole number"):
        prepare(model, target_rank=1.5)  # type: ignore[arg-type]
    grouped = ours.get_peft_model(Net(), ours.LoraConfig(r=2, **CONVOLUTION))
    with pytest.raises(ConfigError, match="groups=2 to target rank 3, but the target rank is not divisible by 2"):
        prepare(grouped, target_rank=3)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ConfigError, match=r"\*before\* compiling the model"):
        prepare(compiled)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="got 'no' instead"):
        prepare(model, check_compiled="no")  # type: ignore[arg-type]
    assert not isinstance(model.base_model.model.model.layers[0].mlp.down_proj.scaling["default"], Tensor)
    with pytest.warns(UserWarning, match="already compiled"):
        prepare(compiled, check_compiled="warn")  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(compiled, check_compiled="ignore")  # type: ignore[arg-type]


def test_strengths_of_a_prepared_adapter_are_set_as_before(tmp_path: Path) -> None:
    second = saved(tmp_path, 2, r=2, lora_alpha=5)
    model, plain = made(ours, "LoraConfig", lora_alpha=6), made(ours, "LoraConfig", lora_alpha=6)
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=7, config=model.peft_config)
    assert model.peft_config["default"].r == 7
    for each in (model, plain):
        layer = each.base_model.model.model.layers[0].self_attn.q_proj
        layer.set_scale("default", 3)
        layer.scale_layer(0.5)
    check_same(logits(model), logits(plain), 1e-6)
    with ours.helpers.rescale_adapter_scale(model, 0.25), ours.helpers.rescale_adapter_scale(plain, 0.25):
        check_same(logits(model), logits(plain), 1e-6)
    check_same(logits(model), logits(plain), 1e-6)
    model.base_model.add_weighted_adapter(["default"], [2.0], "twice", "cat")
    plain.base_model.add_weighted_adapter(["default"], [2.0], "twice", "cat")
    for each in (model, plain):
        each.set_adapter("twice")
    check_same(logits(model), logits(plain), 1e-6)
    hotswap.hotswap_adapter(model, second, "default")
    model.set_adapter("default")
    check_same(logits(model), logits(loaded(second)), 1e-6)  # what was set by hand is gone
    model.merge_adapter()
    check_same(logits(model), logits(loaded(second)), 1e-5)


def test_a_prepared_adapter_trains_as_one_that_is_not() -> None:
    models = [made(ours, "LoraConfig", lora_alpha=6) for _ in range(2)]
    hotswap.prepare_model_for_compiled_hotswap(models[0])
    for model in models:
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
    grads = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in models]
    assert grads[0]
    check_same(grads[0], grads[1], 1e-6)


def test_a_start_from_the_base_makes_way_for_the_same_start_alone(tmp_path: Path) -> None:
    """PiSSA's adapter is the difference from its start, which is of its rank and in no file."""
    options = {"init_lora_weights": "pissa", "r": 4}
    folders = [saved(tmp_path / str(seed), seed, **options) for seed in (1, 2)]
    model = loaded(folders[0])
    hotswap.hotswap_adapter(model, folders[1], "default")
    check_same(logits(model), logits(loaded(folders[1])), 1e-6)
    plain = saved(tmp_path / "plain", r=4)
    for there, comes in ((folders[0], plain), (plain, folders[0]), (folders[0], saved(tmp_path / "6", r=6))):
        model = loaded(there)
        before = logits(model)
        with pytest.raises(ConfigError, match="of the same start, rank and alpha only"):
            hotswap.hotswap_adapter(model, comes, "default")
        assert torch.equal(logits(model), before)
    with pytest.raises(ConfigError, match="starts with a part of the base"):
        hotswap.prepare_model_for_compiled_hotswap(loaded(folders[0]), target_rank=6)
