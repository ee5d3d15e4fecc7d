"""LoRA files put into models here and by diffusers: equal outputs; and by the formula, where diffusers differs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from diffusers.loaders import lora_conversion_utils, lora_pipeline
from torch import Tensor

import kilotune
from kilotune import load_diffusers_lora
from tests.diffusers_lora import files, released
from tests.diffusers_lora.files import Tensors, made, put, with_alphas
from tests.diffusers_lora.oracle import (
    PIPELINES,
    TINY_FLUX,
    Models,
    assert_same,
    by_formula,
    difference,
    factors,
    linear_layers,
    model,
    models,
    output,
    pipe,
    quiet,
    theirs,
    with_widths,
)

# diffusers reads some layers in no old writing, and in kohya's only under other names.
OLD = {"peft_like": "", "down_up": "", "processors": "text_projection", "kohya": "text_projection|add_embedding"}


def left(names: str) -> Callable[[str], bool]:
    """All layers but those whose name has one of ``names`` in it."""
    return lambda layer: not any(name and name in layer for name in names.split("|"))


def check(pipeline: str, tensors: Tensors, folder: Path, said: dict[str, Any] | None = None) -> None:
    """The same file here and in diffusers."""
    path = put(folder / "lora.safetensors", tensors, said)
    ours = load_diffusers_lora(path, models(pipeline))
    assert set(ours) == {key.partition(".")[0] for key in tensors} or "lora_" in next(iter(tensors))
    assert_same(ours, theirs(pipeline, path), models(pipeline))


WRITINGS = [
    pytest.param(writing, pipeline, marks=[pytest.mark.heavy] if pipeline == "sdxl" else [])
    for writing in ("peft_like", "down_up", "processors")
    for pipeline in PIPELINES
]


@pytest.mark.parametrize("writing, pipeline", WRITINGS)
def test_files_of_diffusers(writing: str, pipeline: str, tmp_path: Path) -> None:
    """Layers of three ranks and no alpha: the change is B A."""
    check(pipeline, made(models(pipeline), getattr(files, writing), left(OLD[writing])), tmp_path)


@pytest.mark.parametrize("pipeline", ["sd", "sdxl"])
def test_files_of_kohya(pipeline: str, tmp_path: Path) -> None:
    """One alpha and three ranks, so that each layer has a scale of its own."""
    check(pipeline, with_alphas(made(models(pipeline), files.kohya, left(OLD["kohya"])), [2.0]), tmp_path)


def sgm(component: str, layer: str, a: Tensor, b: Tensor) -> Tensors:
    """kohya's file of SDXL, whose UNet is trained under its released names."""
    return files.kohya(component, layer, a, b, released.in_sdxl(layer) if component == "unet" else None)


def test_kohyas_sdxl_has_the_released_names(tmp_path: Path) -> None:
    check("sdxl", with_alphas(made(models("sdxl"), sgm, left("text_projection")), [2.0]), tmp_path)


def kohya_file(layers: released.Shapes) -> tuple[Tensors, dict[str, tuple[Tensor, Tensor, float]]]:
    """A file of released layers with ranks and alphas of their own, and its changes by layer."""
    tensors, changes = {}, {}
    for i, (name, shape) in enumerate(layers.items()):
        generator = torch.Generator().manual_seed(i)
        rank, alpha = (3, 2, 4)[i % 3], (4.0, 1.0, 3.0)[i % 3]
        a = torch.randn(rank, *shape[1:], generator=generator) / 4
        b = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) / 2
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(alpha)}
        changes[name] = a, b, alpha
    return tensors, changes


# The others diffusers drops.
IN_BLOCKS = {name: shape for name, shape in released.flux_layers().items() if "blocks" in name}


def test_kohyas_flux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused query, key and value are split, with ranks and alphas of their own, and so is a text encoder's part."""
    name = "_convert_kohya_flux_lora_to_diffusers"
    read = with_widths(getattr(lora_conversion_utils, name), TINY_FLUX)
    monkeypatch.setattr(lora_pipeline, name, read)
    text = made({"text_encoder": model("clip")}, files.kohya)
    check("flux", {**kohya_file(IN_BLOCKS)[0], **with_alphas(text)}, tmp_path)


def test_flux_under_diffusers_names_with_lines(tmp_path: Path) -> None:
    """Trainers that have diffusers' own model write its names with "_" for dots."""
    tensors = made({"transformer": model("flux")}, files.kohya, lambda name: ".attn." in name)
    under = {key.replace("lora_unet_", "lora_transformer_"): value for key, value in with_alphas(tensors).items()}
    check("flux", under, tmp_path)


@pytest.mark.parametrize("beginning", ["lora_unet_", "diffusion_model."])
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_every_released_layer(name: str, beginning: str, tmp_path: Path) -> None:
    """A change of released weights, which diffusers then reads, is what the file makes of the model."""
    layers = released.flux_layers() if name == "flux" else released.sd3_layers()
    norms = released.FLUX_NORMS if name == "flux" else released.SD3_NORMS
    read = released.flux_in_diffusers if name == "flux" else released.sd3_in_diffusers
    weights = released.checkpoint(layers, norms)
    tensors, changes = kohya_file(layers)
    changed = dict(weights)
    for layer, (a, b, alpha) in changes.items():
        change = alpha / a.shape[0] * (b.flatten(1) @ a.flatten(1))
        changed[f"{layer}.weight"] = weights[f"{layer}.weight"] + change.reshape(layers[layer])
    plain, want = model(name), model(name)
    plain.load_state_dict(read(weights), strict=False)
    want.load_state_dict(read(changed), strict=False)
    if beginning == "diffusion_model.":  # ComfyUI's, with dots
        dotted = {layer.replace(".", "_"): layer for layer in layers}
        split = [(key.removeprefix("lora_unet_").partition("."), value) for key, value in tensors.items()]
        tensors = {f"{beginning}{dotted[flat]}.{end}": value for (flat, _, end), value in split}
    path = put(tmp_path / "lora.safetensors", tensors)
    ours = load_diffusers_lora(path, {"transformer": copy.deepcopy(plain)})
    assert_same(ours, {"transformer": want}, {"transformer": plain})


def test_alphas_beside_dotted_names(tmp_path: Path) -> None:
    """Of Flux diffusers reads them. Its pattern for the alpha of ``proj_out`` takes that of each block too."""
    tensors = made({"transformer": model("flux")}, files.peft_like, lambda name: name != "proj_out")
    check("flux", with_alphas(tensors, end=".lora_A.weight"), tmp_path)


def test_by_hand_they_were_off(tmp_path: Path) -> None:
    """Without its alphas the same file is another adapter, by far more than rounding."""
    tensors = with_alphas(made({"transformer": model("flux")}, files.peft_like), end=".lora_A.weight")
    path = put(tmp_path / "with.safetensors", tensors)
    bare = put(tmp_path / "without.safetensors", {k: v for k, v in tensors.items() if not k.endswith(".alpha")})
    one, other = (load_diffusers_lora(each, {"transformer": model("flux")})["transformer"] for each in (path, bare))
    assert difference(one, other) > 0.1


@pytest.mark.parametrize("pipeline", ["sd", "sdxl"])
def test_every_layer_keeps_its_own_alpha(pipeline: str, tmp_path: Path) -> None:
    """Alphas of layers that differ, by the formula: diffusers 0.42 gives attention's layers the commonest one."""
    own = models(pipeline)
    tensors = with_alphas(made(own, files.kohya))
    changes: dict[str, dict[str, tuple[Tensor, Tensor, float]]] = {name: {} for name in own}
    for component, each in own.items():
        for layer in linear_layers(each):
            keys = list(files.kohya(component, layer, torch.zeros(0), torch.zeros(0)))
            alpha = tensors[keys[0].replace("lora_down.weight", "alpha")]
            changes[component][layer] = tensors[keys[0]], tensors[keys[1]], float(alpha)
    ours = load_diffusers_lora(put(tmp_path / "lora.safetensors", tensors), models(pipeline))
    assert_same(ours, {name: by_formula(each, changes[name]) for name, each in own.items()}, models(pipeline))


# -- the configuration in the header -------------------------------------------------------------------


SAID: dict[str, dict[str, Any]] = {
    "alpha": {"r": 4, "lora_alpha": 7},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 3,
        "rank_pattern": {"to_q": 2, r"attn\d?.to_k": 3, "fc1": 5},
        "alpha_pattern": {"to_q": 7, "self_attn.q_proj": 2, "to_v": 1.5},
    },
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "dora, patterns": {"r": 4, "lora_alpha": 6, "use_dora": True, "alpha_pattern": {"to_q|q_proj": 3}},
}
TARGETS = {
    "sd": {
        "unet": ["to_q", "to_k", "to_v", "to_out.0", "conv1"],
        "text_encoder": ["q_proj", "k_proj", "out_proj", "fc1"],
    },
    "flux": {"transformer": ["to_q", "to_k", "to_v", "proj_mlp", "single_transformer_blocks.0.proj_out"]},
    "sd3": {"transformer": ["to_q", "to_k", "to_v", "add_k_proj", "ff.net.2"], "text_encoder_2": ["v_proj"]},
}


def trained_by_peft(pipeline: str, options: dict[str, Any], folder: Path) -> Models:
    """What a training script of diffusers does: PEFT's adapter in each model, random numbers, and its own file.

    Returns the models, as they were when the file was written.
    """
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    own = {name: each for name, each in models(pipeline).items() if name in TARGETS[pipeline]}
    generator = torch.Generator().manual_seed(5)
    with quiet():
        for name, each in own.items():
            config = peft.LoraConfig(target_modules=TARGETS[pipeline][name], **options)
            each.add_adapter(config)
            for key, parameter in sorted(each.named_parameters()):
                if "lora_" in key:
                    parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        write = {"sd": lora_pipeline.StableDiffusionLoraLoaderMixin, "flux": lora_pipeline.FluxLoraLoaderMixin}.get(
            pipeline, lora_pipeline.SD3LoraLoaderMixin
        )
        layers = {f"{name}_lora_layers": get_peft_model_state_dict(each) for name, each in own.items()}
        write.save_lora_weights(folder, **layers, **_collate_lora_metadata(own))
    return own


@pytest.mark.parametrize("options", SAID.values(), ids=SAID)
@pytest.mark.parametrize("pipeline", TARGETS)
def test_what_diffusers_wrote_itself(pipeline: str, options: dict[str, Any], tmp_path: Path) -> None:
    trained = trained_by_peft(pipeline, options, tmp_path)
    ours = load_diffusers_lora(tmp_path, models(pipeline))
    assert set(ours) == set(TARGETS[pipeline])
    assert_same(ours, trained, models(pipeline))
    other = theirs(pipeline, tmp_path)
    if "use_dora" in options:  # transformers 5.23 leaves the magnitudes of a text encoder out
        ours = {name: each for name, each in ours.items() if not name.startswith("text_encoder")}
    assert_same(ours, other, models(pipeline))


def test_a_file_of_one_model(tmp_path: Path) -> None:
    """``save_lora_adapter`` of a model writes keys and a configuration that name no model."""
    one, other = model("flux"), model("flux")
    with quiet():
        one.add_adapter(
            peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, target_modules=["to_q", "ff.net.2"])
        )
        one.save_lora_adapter(tmp_path)
        other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        ours = load_diffusers_lora(tmp_path, {"transformer": model("flux"), "scheduler": None})
    assert_same(ours, {"transformer": other}, {"transformer": model("flux")})


@pytest.mark.parametrize("header", [False, True])
def test_a_layer_whose_name_is_the_end_of_others(header: bool, tmp_path: Path) -> None:
    """Flux has a ``proj_out``, and one in each single block; this file has the first alone."""
    layers = ["proj_out", "transformer_blocks.0.attn.to_q"]
    tensors = made({"transformer": model("flux")}, files.peft_like, lambda name: name in layers, ranks=[3])
    options = {"r": 3, "lora_alpha": 5, "target_modules": layers}
    check(
        "flux", tensors, tmp_path, {f"transformer.{key}": value for key, value in options.items()} if header else None
    )


# -- DoRA ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True], ids=["diffusers", "kohya"])
def test_dora(flat: bool, tmp_path: Path) -> None:
    """W' = m (W + (alpha / r) B A) / |W + (alpha / r) B A|, row by row. diffusers leaves kohya's ``dora_scale`` out."""
    plain, want = model("unet"), model("unet")
    tensors: Tensors = {}
    for i, (name, module) in enumerate(linear_layers(plain).items()):
        if "attn" not in name and "conv1" not in name:
            continue
        a, b = factors(module, 3, i)
        weight = want.get_parameter(f"{name}.weight").data
        changed = weight + (2 / 3) * (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
        lengths = 1 + 0.5 * torch.sin(torch.arange(float(weight.shape[0]))).reshape(-1, *[1] * (weight.ndim - 1))
        norms = changed.flatten(1).norm(dim=1).reshape(lengths.shape)
        weight.copy_(lengths * changed / norms)
        write = files.kohya if flat else files.peft_like
        own = write("unet", name, a, b)
        start = next(iter(own)).removesuffix(".lora_down.weight").removesuffix(".lora_A.weight")
        kept = lengths if flat else lengths.flatten() if weight.ndim == 2 else lengths.transpose(0, 1)
        tensors |= {**own, f"{start}.alpha": torch.tensor(2.0)}
        tensors |= {f"{start}.dora_scale" if flat else f"{start}.lora_magnitude_vector": kept}
    ours = load_diffusers_lora(put(tmp_path / "lora.safetensors", tensors), {"unet": model("unet")})
    assert_same(ours, {"unet": want}, {"unet": plain})


# -- what a user can ask for ---------------------------------------------------------------------------


def test_sixteen_bits_are_raised(tmp_path: Path) -> None:
    tensors = with_alphas(made(models("sd"), files.kohya), [2.0])
    check("sd", {key: value.half() for key, value in tensors.items() if "text_projection" not in key}, tmp_path)


def test_beside_other_adapters_and_trained_on(tmp_path: Path) -> None:
    first = put(tmp_path / "first.safetensors", made({"transformer": model("flux")}, files.peft_like))
    second = put(tmp_path / "second.safetensors", made({"transformer": model("flux")}, files.peft_like, ranks=[5]))
    held = load_diffusers_lora(first, {"transformer": model("flux")}, "first", is_trainable=True)
    trained = held["transformer"]
    assert all(parameter.requires_grad for _, parameter in trained.adapter_parameters())
    before = output(trained)
    assert load_diffusers_lora(second, held, "second") == held
    assert trained.active_adapters == ["first"]
    assert torch.equal(output(trained), before)
    trained.set_adapter("second")
    alone = load_diffusers_lora(second, {"transformer": model("flux")})["transformer"]
    assert difference(trained, alone) < 2e-6


def test_a_pipelines_components_are_changed_in_place(tmp_path: Path) -> None:
    tensors = made(models("sd"), files.down_up)
    path = put(tmp_path / "lora.safetensors", tensors)
    own = models("sd")
    found = load_diffusers_lora(
        path, {**own, "tokenizer": None, "vae": torch.nn.Linear(2, 2)}, leave_out=["text_encoder"]
    )
    assert list(found) == ["unet"]
    assert torch.equal(output(own["unet"]), output(found["unet"]))
    assert difference(own["text_encoder"], model("clip")) == 0
    with found["unet"].disable_adapter():
        assert torch.equal(output(own["unet"]), output(model("unet")))


def test_a_pipeline_runs_with_it(tmp_path: Path) -> None:
    """Two steps of Flux, from given embeddings to latents: as with diffusers' own adapter, and not as without one."""
    tensors = with_alphas(
        made({"transformer": model("flux")}, files.peft_like, lambda n: ".attn." in n), end=".lora_A.weight"
    )
    path = put(tmp_path / "lora.safetensors", tensors)

    def latents(transformer: torch.nn.Module, load: Callable[[Any], object]) -> Tensor:
        with quiet():
            whole = pipe("flux", {"transformer": transformer, "text_encoder": model("clip")})
            whole.register_modules(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
            whole.set_progress_bar_config(disable=True)
            load(whole)
            made: Tensor = whole(
                prompt_embeds=torch.linspace(-1, 1, 36).reshape(1, 3, 12),
                pooled_prompt_embeds=torch.linspace(-1, 1, 10)[None],
                height=32,
                width=32,
                num_inference_steps=2,
                latents=torch.linspace(-2, 2, 16).reshape(1, 4, 4),
                output_type="latent",
            ).images
        return made

    ours = latents(model("flux"), lambda whole: load_diffusers_lora(path, whole.components))
    other = latents(model("flux"), lambda whole: whole.load_lora_weights(path))
    plain = latents(model("flux"), lambda whole: None)
    assert float((ours - other).abs().max()) < 1e-5
    assert float((ours - plain).abs().max()) > 1e-2


def test_it_merges(tmp_path: Path) -> None:
    path = put(tmp_path / "lora.safetensors", with_alphas(made(models("sd"), files.kohya), [2.0]))
    ours = load_diffusers_lora(path, models("sd"))["unet"]
    want = output(ours)
    assert isinstance(ours, kilotune.PeftModel)
    assert float((output(ours.merge_and_unload()) - want).abs().max() / want.abs().max()) < 2e-6
