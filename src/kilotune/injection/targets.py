"""Which modules an adapter takes, and why each other one was left.

:func:`explain` gives a verdict for every module; :func:`select` turns the verdicts into the list to
adapt, or into one error that names the nearest modules and why they were not taken.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import nn

from ..added_modules import base_modules
from ..candidates import HINTS, Candidate, inside, matches_names
from ..config import ALL_BIASED, ALL_LINEAR, AdapterConfig
from ..deltas import Need
from ..errors import ConfigError, TargetError, did_you_mean, gather, nearest
from ..kinds import KINDS
from ..name_rules import ends, group
from ..patterns import matching, members
from ..storage import STORAGES

__all__ = ["DEFAULT_TARGETS", "Verdict", "explain", "in_layers", "read_by_parent", "resolve_targets", "select"]

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# Parents (a part of the class name) that read weight or bias of some of their layers themselves: transformers' Mamba
# mixers hand these to kernels or multiply by them, so a wrapper gives out the weight with the adapters in it.
READ_BY_PARENT = {
    "Mamba": ("out_proj", "conv1d", "dt_proj", "x_proj"),
    "Bamba": ("out_proj", "conv1d"),
    "FalconH1Mixer": ("out_proj", "conv1d"),
    **dict.fromkeys(("GatedDeltaNet", "DeltaAttention", "TextLinearAttention", "ShortConvolution"), ("conv1d",)),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "MHAttentionMap": ("k_proj", "k_linear"),  # DETR and its kin
}

_QV = ("q_proj", "v_proj")
_FUSED = ("query_key_value",)
# transformers' model_type -> the modules that the papers and PEFT adapt by default (query and value).
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("bart", "opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral", "stablelm", "phi"), _QV
    ),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "vit"), _QV),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), ("query", "value")),
    **dict.fromkeys(("bloom", "gpt_neox", "falcon", "chatglm", "RefinedWeb", "RefinedWebModel"), _FUSED),
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "mpt": ("Wqkv",),
    "codegen": ("qkv_proj",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


class UnmatchedTargetsWarning(UserWarning):
    """Names among the targets match nothing, as in a list for several families of models."""


@final
@dataclass(frozen=True)
class Verdict:
    """Whether a module is taken, and the reason; ``matched`` when its name fits the targets."""

    name: str
    taken: bool
    matched: bool
    reason: str


def resolve_targets(
    config: AdapterConfig, model_type: str | None, exceptions: Mapping[str, Sequence[str]]
) -> AdapterConfig:
    """The config with ``target_modules=None`` replaced by the defaults of the architecture.

    Raises:
        ConfigError: when there are no defaults for ``model_type``.

    """
    if config.target_modules is not None or config.target_parameters:
        return config
    table = {**DEFAULT_TARGETS, **exceptions}
    if model_type not in table:
        what = "the model has no config.model_type" if model_type is None else f"there are none for {model_type!r}"
        hint = did_you_mean(model_type, table) if model_type else ""
        raise ConfigError(
            f"target_modules=None asks for an architecture's defaults, but {what}.{hint} "
            "Give names, a regular expression, or 'all-linear'."
        )
    return config.replace(target_modules=tuple(table[model_type]))


def explain(
    found: Sequence[Candidate], config: AdapterConfig, needs: frozenset[Need], heads: frozenset[str]
) -> list[Verdict]:
    """A verdict for every module.

    Args:
        found: the base model's modules.
        config: with resolved targets.
        needs: what the method's delta needs of a layer.
        heads: names of output layers, which 'all-linear' leaves out.

    """
    with matching(names=lambda: [c.name for c in found]):
        return _verdicts(found, config, needs, heads)


def _verdicts(
    found: Sequence[Candidate], config: AdapterConfig, needs: frozenset[Need], heads: frozenset[str]
) -> list[Verdict]:
    verdicts = {c.name: _verdict(c, config, needs, heads) for c in found}
    if config.target_modules not in (ALL_LINEAR, ALL_BIASED):
        by_name = {c.name: c for c in found}
        for c in found:
            if verdicts[c.name].taken and c.kind is not None:
                inside_it = [f"{c.name}.{child}" for child in c.kind.with_it]
                for name in inside_it:
                    if name in by_name and not verdicts[name].matched:
                        verdicts[name] = _with_parent(by_name[name], c.name, config, needs)
    return [verdicts[c.name] for c in found]


def select(
    found: Sequence[Candidate],
    config: AdapterConfig,
    needs: frozenset[Need],
    heads: frozenset[str],
    strict: bool = True,
) -> list[Candidate]:
    """The modules to adapt, in the model's order; one that stands in ``found`` under several names only once.

    ``strict``: a name in the list that matches nothing is told of (off when a file is loaded, whose tensors are checked
    one by one anyway).

    Raises:
        TargetError: nothing matches, or something matches that cannot be adapted; says why and what is near. With
            ``strict_targets`` a name that matches nothing too, which is a warning otherwise; and a block without any.

    """
    verdicts = explain(found, config, needs, heads)
    refused = [v for v in verdicts if v.matched and not v.taken and v.reason.startswith("refused")]
    if refused:
        faults = [f"{v.name!r}: {v.reason.removeprefix('refused: ')}" for v in refused]
        raise TargetError(gather("some targeted modules cannot be adapted:", faults))
    taken = [candidate for candidate, verdict in zip(found, verdicts, strict=True) if verdict.taken]
    unmatched = _unmatched(found, config, needs) if strict or not taken else []
    faults = _other_faults(found, config, verdicts) if strict or not taken else []
    if taken and unmatched and not faults and not config.strict_targets:
        text = gather("some targets match nothing, and the others are adapted:", unmatched)
        warnings.warn(f"{text}\nstrict_targets=True makes this an error", UnmatchedTargetsWarning, stacklevel=2)
        unmatched = []
    faults = [*unmatched, *faults]
    if not taken or faults:
        faults = faults or [_nothing(config, verdicts)]
        raise TargetError(
            gather("the target modules match nothing:" if not taken else "some targets match nothing:", faults)
        )
    once: dict[int, Candidate] = {}
    for candidate in taken:
        once.setdefault(id(candidate.module), candidate)
    return list(once.values())


def _verdict(c: Candidate, config: AdapterConfig, needs: frozenset[Need], heads: frozenset[str]) -> Verdict:
    if config.target_modules == ALL_BIASED:
        matched = _has_own_bias(c) and _refusal(c, needs) is None
        reason = "has a bias" if matched else _why_not_biased(c, needs)
    elif config.target_modules == ALL_LINEAR:
        linear = c.kind is not None and c.kind.all_linear and c.storage is not None
        matched = linear and c.name not in heads and _refusal(c, needs) is None
        reason = "is a linear layer" if matched else _why_not_linear(c, linear, heads, needs)
    else:
        matched = matches_names(config.target_modules, c.name, "target_modules")
        reason = "its name matches" if matched else "its name does not match the targets"
    if not matched:
        return Verdict(c.name, False, False, reason)
    if matches_names(config.exclude_modules, c.name, "exclude_modules"):
        return Verdict(c.name, False, True, "left out by exclude_modules")
    if inside(config.modules_to_save, c.name):
        return Verdict(c.name, False, True, "trained whole by modules_to_save")
    if not in_layers(c.name, config):
        return Verdict(c.name, False, True, "its block is not in layers_to_transform")
    refusal = _refusal(c, needs)
    if refusal is None:
        return Verdict(c.name, True, True, reason)
    # A regular expression often matches the containers around the layers it means; they have nothing to adapt.
    if isinstance(config.target_modules, str) and not c.module._parameters:
        return Verdict(c.name, False, True, "is a container, not a layer")
    return Verdict(c.name, False, True, f"refused: {refusal}")


def _with_parent(c: Candidate, parent: str, config: AdapterConfig, needs: frozenset[Need]) -> Verdict:
    """The verdict on a part of a layer that is taken: PEFT adapts both, and has no name for one alone."""
    if matches_names(config.exclude_modules, c.name, "exclude_modules"):
        return Verdict(c.name, False, True, "left out by exclude_modules")
    if inside(config.modules_to_save, c.name):
        return Verdict(c.name, False, True, "trained whole by modules_to_save")
    refusal = _refusal(c, needs)
    if refusal is None:
        return Verdict(c.name, True, True, f"belongs to {parent!r}, which is taken")
    return Verdict(c.name, False, Need.OUTPUT not in needs, f"refused: {refusal}")


def _why_not_linear(c: Candidate, linear: bool, heads: frozenset[str], needs: frozenset[Need]) -> str:
    if not linear:
        return f"{type(c.module).__name__} is not a linear layer"
    return "is the model's output layer" if c.name in heads else str(_refusal(c, needs))


def _has_own_bias(c: Candidate) -> bool:
    """Whether the module has a bias now which is not that of a module inside it (BERT's language-model head)."""
    if c.kind is None or Need.BIAS not in c.kind.offers or c.storage is None or c.gained:
        return False
    bias = c.storage.read_bias(c.module)
    inner = (p for module in base_modules(c.module) if module is not c.module for p in module._parameters.values())
    return bias is not None and all(p is not bias for p in inner)


def _why_not_biased(c: Candidate, needs: frozenset[Need]) -> str:
    return str(_refusal(c, needs)) if _has_own_bias(c) else f"{type(c.module).__name__} has no bias of its own"


def _refusal(c: Candidate, needs: frozenset[Need]) -> str | None:
    kind_name = type(c.module).__name__
    if Need.OUTPUT in needs and read_by_parent(c):
        return (
            f"{c.parent.__name__} multiplies by this layer's weight itself, so nothing can be added to its output; "
            f"name {c.name.rpartition('.')[0]!r} instead"
        )
    if c.kind is None or not needs <= c.kind.offers:
        reasons = [] if c.kind is None else [c.kind.lack(c.module, need) for need in needs - c.kind.offers]
        why = "".join(f"; {reason}" for reason in reasons if reason)
        stacked = [n for n, p in c.module._parameters.items() if p is not None and p.ndim == 3]
        if stacked and Need.LINEAR in needs and not why:
            return f"{kind_name} holds parameters, and no layers; to adapt them: target_parameters={stacked}"
        children = [name for name, _ in c.module.named_children()]
        if children:
            return f"is a container ({kind_name}), not a layer{why}; inside it: {', '.join(children[:8])}"
        fit = ", ".join(kind.name for kind in KINDS if needs <= kind.offers)
        return f"{kind_name} is not a kind of layer that this method can adapt (kinds: {fit}){why}"
    if needs != {Need.BIAS} and (unfit := c.kind.refusal(c.module)) is not None:
        return unfit
    if Need.LINEAR in needs and 0 in c.kind.features(c.module):
        return f"its weight is empty: {c.kind.features(c.module)}"
    if c.storage is None:
        own = [(n, p) for n, p in c.module._parameters.items() if p is not None]
        held = [f"{n}: {type(p.data).__name__} of {str(p.dtype).removeprefix('torch.')}" for n, p in own]
        stores = ", ".join(dict.fromkeys(storage.name for storage in STORAGES if storage.name != "none"))
        return f"its weight is no plain floating-point parameter ({', '.join(held) or 'none'}; storages: {stores})"
    return c.storage.refusal(c.module)


def read_by_parent(c: Candidate) -> bool:
    """Whether the module around this layer multiplies by its weight itself, and may never call it."""
    own = c.name.rpartition(".")[2]
    if issubclass(c.parent, nn.MultiheadAttention):
        return own == "out_proj"
    return any(part in c.parent.__name__ and own in names for part, names in READ_BY_PARENT.items())


def in_layers(name: str, config: AdapterConfig) -> bool:
    """Whether the block that ``name`` lies in is wanted."""
    return config.block_indices is None or _block_of(name, config) in members(config.block_indices)


def _block_of(name: str, config: AdapterConfig) -> int | None:
    """The first block index in ``name``, after layers_pattern where that is given."""
    patterns: Iterable[str] = (rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in config.layers_pattern or ())
    if not config.layers_pattern:
        patterns = (r"(?:.*?\.)??[^.]*\.(\d+)\.",)
    found = (group("layers_pattern", pattern, name) for pattern in patterns)
    index = next((number for number in found if number is not None), None)
    return None if index is None else int(index)


def _missing(found: Sequence[Candidate], config: AdapterConfig) -> list[str]:
    """The names in a list of targets that are no module's."""
    if not isinstance(config.target_modules, tuple):
        return []
    modules = {end for c in found for end in ends(c.name)}
    return [target for target in config.target_modules if target not in modules]


def _unmatched(found: Sequence[Candidate], config: AdapterConfig, needs: frozenset[Need]) -> list[str]:
    """A line for each listed name that nothing in the model has."""
    parameters = _parameter_ends(found)
    names = [target for target in _missing(found, config) if target not in parameters]
    return [
        f"no module is called {target!r}, or ends with it.{_near(target, found, needs) if at < HINTS else ''}"
        for at, target in enumerate(names)
    ]


def _other_faults(found: Sequence[Candidate], config: AdapterConfig, verdicts: Sequence[Verdict]) -> list[str]:
    """A line for each listed name of a parameter, and each block index without a target."""
    parameters, missing = _parameter_ends(found), _missing(found, config)
    faults = [
        f"{target!r} is a parameter, not a module: target_parameters={[target]}"
        for target in missing
        if target in parameters
    ]
    if config.block_indices is not None and isinstance(config.target_modules, tuple) and not missing:
        there = {_block_of(v.name, config) for v in verdicts if v.taken}
        empty = [index for index in config.block_indices if index not in there]
        faults = [f"layers_to_transform: no targeted module lies in a block {index}" for index in empty]
    return faults


def _parameter_ends(found: Sequence[Candidate]) -> set[str]:
    return {end for c in found for own in c.module._parameters for end in ends(f"{c.name}.{own}")}


def _near(target: str, found: Sequence[Candidate], needs: frozenset[Need]) -> str:
    last = Counter(c.name.rpartition(".")[2] for c in found if c.name)
    close = nearest(target.rpartition(".")[2], last)
    if not close:
        linear = Counter(
            c.name.rpartition(".")[2] for c in found if c.kind is not None and Need.LINEAR in c.kind.offers
        )
        usable = ", ".join(f"{name!r} ({count})" for name, count in linear.most_common(8))
        return f" Linear layers of this model: {usable or 'none'}."
    example = {c.name.rpartition(".")[2]: c for c in reversed(found)}
    near = []
    for name in close:
        why = _refusal(example[name], needs)
        text = f"{last[name]} x {type(example[name].module).__name__}"
        near.append(f"{name!r} ({text})" if why is None else f"{name!r} ({text}; cannot be taken: {why})")
    return f" Nearest: {', '.join(near)}."


def _nothing(config: AdapterConfig, verdicts: Sequence[Verdict]) -> str:
    close = [v for v in verdicts if v.matched]
    if close:
        shown = "; ".join(f"{v.name!r}: {v.reason}" for v in close[:5])
        return f"{config.target_modules!r}: {len(close)} names match, but none is taken: {shown}"
    if not verdicts:
        return "the model has no modules inside it; put a bare layer into torch.nn.Sequential(layer) first"
    if config.target_modules == ALL_LINEAR:
        return "'all-linear': the model has no linear layer besides its output layer"
    if config.target_modules == ALL_BIASED:
        return "'all-biased': the model has no layer with a bias; name the layers that are to get one"
    names = [v.name for v in verdicts if v.name]
    pattern = str(config.target_modules)
    if word := nearest(pattern, config.target_words, 1):
        return f"no module is called {pattern!r}. Did you mean {word[0]!r}?"
    near = nearest(pattern, names) or names[-3:]
    return (
        f"the regular expression {pattern!r} matches no whole module name (a name is matched from its start to its "
        f"end; '.*' stands for any beginning). Names look like: {', '.join(map(repr, near))}"
    )
