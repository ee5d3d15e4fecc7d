"""IA3 (Liu et al. 2022, arXiv 2205.05638): diag(l) (W x + bias), and W diag(l) x + bias in feed-forward layers.

One trained number per output feature of the keys and values, and per input feature of the second feed-forward
layer, all starting at one. Default targets, options, keys and shapes in files are PEFT's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from ..config import ALL_LINEAR, AdapterConfig, Names, bool_faults, option, regex_faults
from ..deltas import Delta, Rescale, Role
from ..errors import ConfigError, did_you_mean
from ..name_rules import ends_so, fits
from ..projections.matrices import Projections
from ._base import Export, Method, Rate, Shared, Site

__all__ = ["Ia3", "Ia3Config"]

# transformers' model_type -> (all targets, those of them that are feed-forward).
ARCHITECTURES: dict[str, tuple[Names, Names]] = {
    **dict.fromkeys(("llama", "mistral"), (("k_proj", "v_proj", "down_proj"), ("down_proj",))),
    **dict.fromkeys(
        ("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"),
        (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    ),
    **dict.fromkeys(("bert", "roberta"), (("key", "value", "output.dense"), ("output.dense",))),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), (("c_attn", "mlp.c_proj"), ("mlp.c_proj",))),
    **dict.fromkeys(
        ("falcon", "gpt_neox", "RefinedWeb", "RefinedWebModel"),
        (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)),
    ),
    "t5": (("k", "v", "wo"), ("wo",)),
    "mt5": (("k", "v", "wi_1"), ()),
    "bloom": (("query_key_value", "mlp.dense_4h_to_h"), ("mlp.dense_4h_to_h",)),
    "opt": (("q_proj", "k_proj", "fc2"), ("fc2",)),
    "gptj": (("q_proj", "v_proj", "fc_out"), ("fc_out",)),
    "gpt_neo": (("q_proj", "v_proj", "c_proj"), ("c_proj",)),
    "bart": (("q_proj", "v_proj", "fc2"), ("fc2",)),
    "mixtral": (("k_proj", "v_proj", "w2"), ("w2",)),
    "deberta": (("in_proj", "output.dense"), ("output.dense",)),
    "deberta-v2": (("key_proj", "value_proj", "output.dense"), ("output.dense",)),
    "phi": (("q_proj", "v_proj", "fc2"), ("fc2",)),
}
ROWS, COLS = "ia3_rows", "ia3_cols"
BLOCKS_ONLY_HERE = "PEFT has no such option for IA3; its files get the layers' whole names."


@final
@dataclass(frozen=True, kw_only=True)
class Ia3Config(AdapterConfig):
    """IA3's options, under PEFT's names. There is no dropout, and the biases are scaled, not trained."""

    peft_type: ClassVar[str] = "IA3"
    usual_targets: ClassVar[str | None] = None  # the method's own places
    bias_modes: ClassVar[Names] = ("none",)

    feedforward_modules: Sequence[str] | str | None = option(
        None,
        "Which of the targets scale their input and not their output: a list of ends of names (all of them in "
        "target_modules, where that is a list), a regular expression, [] for none, or None for a known "
        "architecture's own.",
    )
    init_ia3_weights: bool = option(True, "True: the scales start at one. False: normally distributed, for tests.")
    exclude_modules: Sequence[str] | str | None = option(None, AdapterConfig.help_of("exclude_modules"))
    bias: str = option("none", "Only 'none': IA3 scales the biases with the outputs.", ours=True)
    layers_to_transform: Sequence[int] | int | None = option(
        None, f"{AdapterConfig.help_of('layers_to_transform')} {BLOCKS_ONLY_HERE}", ours=True
    )
    layers_pattern: Sequence[str] | str | None = option(None, AdapterConfig.help_of("layers_pattern"), ours=True)

    def __post_init__(self) -> None:
        if isinstance(self.feedforward_modules, (list, set, frozenset)):
            self._set("feedforward_modules", tuple(sorted(self.feedforward_modules, key=repr)))
        super().__post_init__()

    @classmethod
    def from_file(cls, values: Mapping[str, Any], section: Mapping[str, Any]) -> Ia3Config:
        """PEFT writes, but cannot read, feed-forward names that are not among the targets (an architecture's own)."""
        forward, targets = values.get("feedforward_modules"), values.get("target_modules")
        if isinstance(forward, list) and isinstance(targets, list) and set(forward) - set(targets):
            values = {**values, "feedforward_modules": _ends(forward)}
        return cls.from_dict({**values, **section})

    def faults(self) -> list[str]:
        given, targets = self.feedforward_modules, self.target_modules
        faults = bool_faults(self, "init_ia3_weights")
        if isinstance(given, str):
            return faults + (["feedforward_modules: is an empty string"] if not given else _regex(given))
        if given is None:
            return faults
        if not isinstance(given, tuple) or not all(isinstance(name, str) and name for name in given):
            return [*faults, f"feedforward_modules: expected a list of module names, got {given!r}"]
        if not isinstance(targets, tuple) or not all(isinstance(name, str) for name in targets):
            return faults  # whether names end so is seen when the layers are
        known = {*targets, *(self.target_parameters or ())}
        strange = [name for name in given if name not in known]
        return faults + [
            f"feedforward_modules: {name!r} is not in target_modules.{did_you_mean(name, targets)} A layer that "
            "scales its input is adapted too, so name it in both"
            for name in strange[:20]  # an error shows no more
        ]


def _regex(pattern: str) -> list[str]:
    if pattern.lower() == ALL_LINEAR:
        return [f"feedforward_modules: {ALL_LINEAR!r} is for target_modules only; '.*' stands for every target"]
    return regex_faults("feedforward_modules", pattern)


@final
class Ia3(Method[Ia3Config]):
    """One parameter per layer: ia3_rows (out, 1), or in feed-forward layers ia3_cols (1, in).

    A convolution has one number for each input channel; all of its groups share it.
    """

    name: ClassVar[str] = "ia3"
    config_cls: ClassVar[type[AdapterConfig]] = Ia3Config
    makes: type[Delta] = Rescale
    usual_rate: ClassVar[Rate] = Rate(2e-2)
    example: ClassVar[Mapping[str, Any]] = {"feedforward_modules": ()}
    keys: Mapping[str, str] = {ROWS: "ia3_l", COLS: "ia3_l"}
    roles: Mapping[str, Role] = {ROWS: Role.ROWS, COLS: Role.COLS}

    def __init__(self, config: Ia3Config, loaded: bool = False) -> None:
        super().__init__(config)
        given = config.feedforward_modules  # PEFT's files may hold ends that fit nothing
        self._asked = given if isinstance(given, tuple) and not loaded else ()

    def prepare(self, adapter: str, sites: Sequence[Site], projections: Projections) -> Shared:
        names = [site.stack or site.name for site in sites]
        if strange := [end for end in self._asked if not any(name.endswith(end) for name in names)]:
            raise ConfigError(
                f"feedforward_modules: {strange} are the ends of no adapted layer's name."
                f"{did_you_mean(strange[0], names)} Adapted: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            )
        return Shared()

    @classmethod
    def from_file(cls, config: Ia3Config, extra: Mapping[str, Tensor], checksum: str | None) -> Ia3:
        return cls(super().from_file(config, extra, checksum).config, loaded=True)

    def completed(self, config: Ia3Config, model_type: str | None) -> Ia3Config:
        known = ARCHITECTURES.get(model_type or "")
        targets, forward = config.target_modules, config.feedforward_modules
        given = {"target_modules": targets, "feedforward_modules": forward}
        missing = [name for name, value in given.items() if value is None]
        if not missing or config.target_parameters:
            return config
        if known is None:
            what = "the model has no config.model_type" if model_type is None else f"there are none for {model_type!r}"
            hint = did_you_mean(model_type, ARCHITECTURES) if model_type else ""
            raise ConfigError(
                f"{' and '.join(missing)}=None ask for an architecture's defaults, but {what}.{hint} Say which layers "
                "scale their output (target_modules), and which of them their input instead (feedforward_modules, [] "
                "for none)"
            )
        targets = known[0] if targets is None else targets
        return config.replace(
            target_modules=targets, feedforward_modules=_own(known[1], targets) if forward is None else forward
        )

    def is_feedforward(self, site: Site) -> bool:
        """Whether the layer scales its input; PEFT's rule: a regular expression, or any end of the name."""
        names, name = self.config.feedforward_modules, site.stack or site.name
        if isinstance(names, str):
            return fits("feedforward_modules", names, name)
        return ends_so(names or (), name)

    def count(self, sites: Sequence[Site]) -> int:
        return sum(site.inn // site.kernel_positions if self.is_feedforward(site) else site.out for site in sites)

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        inputs = self.is_feedforward(site)
        shape = (1, site.inn // site.kernel_positions) if inputs else (site.out, 1)
        scale = torch.ones(shape, device=site.device(), dtype=torch.float32)
        if not self.config.init_ia3_weights:
            scale.normal_()
        return {COLS if inputs else ROWS: scale}

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> Rescale:
        if ROWS in params:
            return Rescale(rows=params[ROWS].flatten(), scale_bias=True)
        cols = params[COLS].flatten()  # (in / kernel positions,)
        return Rescale(cols=cols if site.kernel_positions == 1 else cols.repeat_interleave(site.kernel_positions))

    def export(self, sites: Mapping[str, Site], params: Mapping[str, Mapping[str, Tensor]], shared: Shared) -> Export:
        return replace(super().export(sites, params, shared), peft=True)


def _own(forward: Names, targets: Sequence[str] | str) -> Names | str:
    """An architecture's feed-forward names beside targets of the user's own; PEFT takes them in this way too.

    As a regular expression where they are not in the list themselves: PEFT cannot load a file that has others.
    """
    if isinstance(targets, str):
        return forward
    near = [name for name in forward if any(t.endswith(name) or name.endswith(t) for t in targets)]
    if all(name in targets for name in near):
        return tuple(near)
    return _ends(near)


def _ends(names: Sequence[str]) -> str:
    """A regular expression for all names that end so."""
    return f".*({'|'.join(re.escape(name) for name in names)})"
