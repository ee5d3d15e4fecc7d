"""diffusers' own loading, on tiny models of its classes with random weights; nothing is downloaded."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what others' packages warn of when they are imported
    import diffusers
    import transformers
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import kilotune

diffusers.utils.logging.set_verbosity_error()

Model = nn.Module
Models = dict[str, nn.Module]


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """With weights that are all drawn at random, so that no layer is without effect."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    return model.eval()


def _unet(**more: Any) -> nn.Module:
    options: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "norm_num_groups": 2,
    }
    return UNet2DConditionModel(**{**options, **more})


def _sdxl_unet() -> nn.Module:
    return _unet(
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=20,
    )


def _flux() -> nn.Module:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )


def _sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        out_channels=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
        pos_embed_max_size=16,
    )


def _clip(cls: type[nn.Module]) -> nn.Module:
    config = CLIPTextConfig(
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=30,
        max_position_embeddings=16,
        projection_dim=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    return cls(config)


BUILDERS: Mapping[str, Callable[[], nn.Module]] = {
    "unet": _unet,
    "sdxl": _sdxl_unet,
    "flux": _flux,
    "sd3": _sd3,
    "clip": functools.partial(_clip, CLIPTextModel),
    "clip projection": functools.partial(_clip, CLIPTextModelWithProjection),
}
PIPELINES: Mapping[str, Mapping[str, str]] = {
    "sd": {"unet": "unet", "text_encoder": "clip"},
    "sdxl": {"unet": "sdxl", "text_encoder": "clip", "text_encoder_2": "clip projection"},
    "flux": {"transformer": "flux", "text_encoder": "clip"},
    "sd3": {"transformer": "sd3", "text_encoder": "clip projection", "text_encoder_2": "clip projection"},
}


@functools.cache
def _built(name: str) -> nn.Module:
    return _seeded(BUILDERS[name])


def model(name: str) -> nn.Module:
    """A tiny model, always with the same weights."""
    return copy.deepcopy(_built(name))


def models(pipeline: str) -> Models:
    """The models of a pipeline that LoRA files are for."""
    return {component: model(name) for component, name in PIPELINES[pipeline].items()}


def pipe(pipeline: str, own: Models) -> Any:
    """diffusers' pipeline around models; what LoRA does not concern is left out."""
    none: dict[str, Any] = dict.fromkeys(("vae", "scheduler", "tokenizer"))
    with quiet():
        if pipeline == "sd":
            checks = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            return diffusers.StableDiffusionPipeline(**none, **checks, **own)
        if pipeline == "sdxl":
            return diffusers.StableDiffusionXLPipeline(**none, tokenizer_2=None, add_watermarker=False, **own)
        if pipeline == "flux":
            return diffusers.FluxPipeline(**none, text_encoder_2=None, tokenizer_2=None, **own)
        rest = dict.fromkeys(("tokenizer_2", "tokenizer_3", "text_encoder_3"))
        return diffusers.StableDiffusion3Pipeline(**none, **rest, **own)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What diffusers, PEFT and transformers warn of is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            yield
        finally:
            transformers.logging.set_verbosity(before)


def theirs(pipeline: str, file: Any, **options: Any) -> Models:
    """The models of a pipeline after diffusers has loaded a file into them."""
    own = models(pipeline)
    with quiet():
        pipe(pipeline, own).load_lora_weights(file, **options)
    return own


def _numbers(*shape: int) -> Tensor:
    return torch.sin(1.7 * torch.arange(float(torch.Size(shape).numel()))).reshape(shape)


@torch.no_grad()
def output(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a model, or one with adapters, gives for inputs that are always the same."""
    kind = type(model.get_base_model() if isinstance(model, kilotune.PeftModel) else model)
    text, sample = _numbers(1, 3, 12).to(dtype), _numbers(1, 4, 8, 8).to(dtype)
    pooled = _numbers(1, 10).to(dtype)
    if kind is UNet2DConditionModel:
        added = {"text_embeds": _numbers(1, 8).to(dtype), "time_ids": torch.arange(6.0)[None]}
        more = {"added_cond_kwargs": added} if model.config.addition_embed_type else {}
        result: Tensor = model(sample, 5, text, **more).sample
    elif kind is FluxTransformer2DModel:
        result = model(
            hidden_states=_numbers(1, 4, 4).to(dtype),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=torch.tensor([0.3]),
            img_ids=_numbers(4, 3),
            txt_ids=torch.zeros(3, 3),
            guidance=torch.tensor([3.5]),
        ).sample
    elif kind is SD3Transformer2DModel:
        result = model(sample, text, pooled, torch.tensor([5.0])).sample
    else:
        found = model(torch.arange(9)[None] % 29 + 1)
        result = found.text_embeds if hasattr(found, "text_embeds") else found.last_hidden_state
    return result


def _exact(model: nn.Module) -> Tensor:
    """The output in float64, for a deep network of random weights makes much of a rounding."""
    return output(copy.deepcopy(model).double(), torch.float64)


def _apart(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max() / two.abs().max())


def difference(ours: nn.Module, other: nn.Module) -> float:
    """The largest difference of the outputs, relative to the largest output."""
    return _apart(_exact(ours), _exact(other))


def assert_same(ours: Mapping[str, nn.Module], other: Mapping[str, nn.Module], plain: Models) -> None:
    """Equal outputs, to the float32 rounding of what is in the files; far from those without an adapter."""
    for name, each in ours.items():
        own = _exact(each)
        assert _apart(own, _exact(other[name])) < 2e-6, name
        assert _apart(own, _exact(plain[name])) > 1e-2, f"{name}: the adapter does nothing"


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that LoRA can change, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def factors(module: nn.Module, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random A and B of a layer, in PEFT's shapes; their product is about as large as the weight."""
    generator = torch.Generator().manual_seed(seed)
    weight = module.get_parameter("weight")
    a = torch.randn(rank, *weight.shape[1:], generator=generator) / weight[0].numel() ** 0.5
    b = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=generator) / rank**0.5
    return a, b


@torch.no_grad()
def by_formula(model: nn.Module, changes: Mapping[str, tuple[Tensor, Tensor, float]]) -> nn.Module:
    """The model with W + (alpha / r) B A in place of the weights: layer -> (A, B, alpha)."""
    for name, (a, b, alpha) in changes.items():
        weight = model.get_parameter(f"{name}.weight")
        change = b.flatten(1).double() @ a.flatten(1).double() * alpha / a.shape[0]
        weight += change.reshape(weight.shape).float()
    return model


def with_widths(function: Callable[..., Any], widths: Mapping[int, int]) -> Callable[..., Any]:
    """diffusers' function with other numbers in it: it has the widths of Flux as they are written into its code."""
    source = inspect.getsource(function)
    for number, ours in widths.items():
        assert str(number) in source, number
        source = re.sub(rf"\b{number}\b", str(ours), source)
    space = dict(vars(inspect.getmodule(function)))
    exec(compile(source, function.__name__, "exec"), space)
    changed: Callable[..., Any] = space[function.__name__]
    return changed


TINY_FLUX = {3072: 16, 12288: 64}
