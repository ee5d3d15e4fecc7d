"""Looking at a model: which modules targets take, which are tied to the embedding, whose the keys of its state are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

from ..config import ALL_LINEAR
from ..errors import AdapterError, type_name
from ..injection.inject import plan
from ..injection.tree import is_parameter, unwrapped, walk
from ..layers.adapted import AdaptedLayer
from ..layers.outside import Shown
from ..model.adapter_model import AdapterModel
from .config import PeftConfig
from .layer_shape import LAYER, TUNER

__all__ = ["all_linear", "keys_under", "matched_modules", "no_split_modules", "state_prefixes", "tied_to_embedding"]

Value = TypeVar("Value")


def matched_modules(tuner: nn.Module, adapter_name: str = "default") -> dict[str, list[str]]:
    """Which modules of the base an adapter is in, and which not: {"matched": names, "unmatched": names}.

    Args:
        tuner: a PeftModel, or its ``base_model``.
        adapter_name: which adapter.

    Raises:
        AdapterError: it is neither, or has no such adapter.

    """
    holder = tuner if isinstance(tuner, AdapterModel) else tuner._modules.get("base_model")
    if not isinstance(holder, AdapterModel):
        raise AdapterError(f"expected a PeftModel or its base_model, got {type_name(tuner)}")
    own = set(holder.installed(adapter_name).slots())
    names = [name for name, module, _ in walk(holder.model) if name and not is_parameter(module)]
    return {"matched": [n for n in names if n in own], "unmatched": [n for n in names if n not in own]}


def all_linear(peft_config: PeftConfig, model: nn.Module) -> PeftConfig:
    """A configuration with "all-linear" among its targets replaced by the names that it stands for, in place."""
    word = getattr(peft_config, "target_modules", None)
    if isinstance(word, str) and word.lower() == ALL_LINEAR:
        made = plan(model, "default", peft_config.copy(target_modules=ALL_LINEAR).translated())
        peft_config.target_modules = set(made.layers)  # type: ignore[attr-defined]
    return peft_config


# -- the base ------------------------------------------------------------------------------------------------------


def _base(model: nn.Module) -> nn.Module:
    whole: Any = model
    found: Any = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    base: nn.Module = found.model if isinstance(found, AdapterModel) else found
    return base


def tied_to_embedding(model: nn.Module) -> list[str]:
    """The names, sorted, of the modules of a transformers model whose weights are those of its input embedding.

    Args:
        model: a base, with adapters in it or not, or what is around one.

    """
    base = _base(model)
    tied: Any = getattr(base, "_tied_weights_keys", None)
    get = getattr(base, "get_input_embeddings", None)
    if not tied or get is None or getattr(getattr(base, "config", None), "tie_word_embeddings", None) is False:
        return []
    embedding = unwrapped(get())
    names = [name for name, module, _ in walk(base, aliases=True) if unwrapped(module) is embedding]
    own = {f"{name}.{parameter}" for name in names for parameter in embedding._parameters}
    keys = [key for key, source in tied.items() if source in own] if isinstance(tied, Mapping) else list(tied)
    last = set(embedding._parameters)
    return sorted({key.rpartition(".")[0] for key in keys if key not in own and key.rpartition(".")[2] in last})


def no_split_modules(model: nn.Module) -> set[str]:
    """The names of the classes that a transformers model says are to stay on one device, those of its parts too."""
    found: set[str] = set()
    for module in _base(model).modules():
        said = getattr(module, "_no_split_modules", None)
        found.update(said if isinstance(said, (list, tuple, set, frozenset)) else ())
    return found


# -- keys of a state -------------------------------------------------------------------------------------------------


def state_prefixes(model: nn.Module, adapter_name: str | None = None) -> set[str]:
    """What the keys of adapters begin with in ``model.state_dict()``, up to a dot; no modules that are trained whole.

    Args:
        model: a PeftModel, or a base with adapters in it.
        adapter_name: only this one's.

    """
    found = set()
    for name, module in model.named_modules():
        name = name.removeprefix("_fsdp_wrapped_module.")
        for head, part in _heads(module):
            place = f"{name}.{head}" if name else head
            if adapter_name is None:
                found.add(place)
            elif isinstance(part, (nn.ModuleDict, nn.ParameterDict)) and adapter_name in part:
                found.add(f"{place}.{adapter_name}")
    return found


def _heads(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, Shown) and module.outside in (LAYER, TUNER):
        shape = LAYER if isinstance(module, AdaptedLayer) else TUNER
        parts = [(name, part) for name, part in shape.parts(module) if name not in ("base_layer", "model")]
        yield from (item for item in parts if shape is LAYER or isinstance(item[1], nn.ParameterDict))


def keys_under(state_dict: Mapping[str, Value], prefixes: Collection[str]) -> dict[str, Value]:
    """The entries of a state whose keys are one of the prefixes, or go on after it with a dot."""
    return {
        key: value
        for key, value in state_dict.items()
        if any(key[:at] in prefixes for at in [i for i, c in enumerate(key) if c == "."] + [len(key)])
    }
