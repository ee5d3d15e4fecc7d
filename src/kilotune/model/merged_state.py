"""What would lose the base's weights behind the adapters' backs: state dicts and ties while merged, resized tables.

::

    model.merge_adapter()
    state = model.state_dict()        # says so: "...adapters.default.merged_into_base"
    model.unmerge_adapter()
    model.load_state_dict(state)      # MergeError: its weights have the adapter in them already
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Never, final

import torch
from torch import nn

from ..added_modules import base_modules, named_base_modules
from ..errors import MergeError, UnsupportedError
from ..injection.tree import WRAPPERS
from ..layers.adapted import AdaptedLayer
from ..layers.slot import slot_key
from ..storage import is_pretrained
from .base_overrides import override, restore

__all__ = ["MARK", "allow_tying", "refuse_tying", "watch_state_dicts", "watch_tables"]

MARK = "merged_into_base"  # the end of a key in a state dict that was taken while an adapter was merged
TIE, RESIZE = "tie_weights", "resize_token_embeddings"


# -- state dicts -----------------------------------------------------------------------------------


def watch_state_dicts(base: nn.Module) -> None:
    """Let the base's state dicts say what is merged into them, and refuse to load what would be undone or be there
    twice."""
    override(base, "_kilotune_marks", base.register_state_dict_post_hook(_mark))  # type: ignore[no-untyped-call]
    override(base, "_kilotune_loads", base.register_load_state_dict_pre_hook(_check_load))  # type: ignore[no-untyped-call]


def _merged_layers(base: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    found = ((name, m) for name, m in named_base_modules(base) if isinstance(m, AdaptedLayer))
    return ((name, layer) for name, layer in found if layer.merged)


def _mark(base: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name, layer in _merged_layers(base):
        for adapter in layer.merged:  # beside the adapter's own, which an export of the plain weights leaves out
            state[f"{prefix}{name}.adapters.{slot_key(adapter)}.{MARK}"] = torch.ones((), dtype=torch.uint8)


def _check_load(base: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    marked = [key for key in state if key.startswith(prefix) and key.endswith(f".{MARK}")]
    if marked:
        place = marked[0].removeprefix(prefix).partition(".adapters.")[0]
        raise MergeError(
            f"load_state_dict: this state dict was taken while adapters were merged ({place!r} and {len(marked) - 1} "
            "more), so its weights have them in already, and the adapters would run on top. Take it after "
            "unmerge_adapter(); or, for the merged weights in a plain model, leave out all keys with '.adapters.' and "
            "take '.base_layer' out of the others"
        )
    for name, layer in _merged_layers(base):
        if any(key.startswith(f"{prefix}{name}.") for key in state):
            raise MergeError(
                f"load_state_dict: {list(layer.merged)} are merged into {name!r}, so unmerge_adapter() would undo what "
                "is loaded; call unmerge_adapter() first"
            )


# -- methods of transformers' models ---------------------------------------------------------------


@final
@dataclass(frozen=True)
class _Refused:
    """In the place of a method that must not be called now."""

    error: type[MergeError] | type[UnsupportedError]
    why: str

    def __call__(self, *_: Any, **__: Any) -> Never:
        raise self.error(self.why)


def _pretrained(base: nn.Module) -> Iterator[nn.Module]:
    return (module for module in base_modules(base) if is_pretrained(module))


def refuse_tying(base: nn.Module, merged: Sequence[str]) -> None:
    """Refuse transformers' ``tie_weights()``: it would put a merged weight into a module that has no adapter."""
    why = (
        f"tie_weights: {list(merged)} are merged into the weights, so what is tied now would not be the base's weight; "
        "call unmerge_adapter() first"
    )
    for module in _pretrained(base):
        override(module, TIE, _Refused(MergeError, why))


def allow_tying(base: nn.Module) -> None:
    """Undo :func:`refuse_tying`."""
    for module in _pretrained(base):
        restore(module, TIE)


def watch_tables(base: nn.Module) -> None:
    """Refuse transformers' ``resize_token_embeddings()`` where adapters are on a table or the head, which it replaces;
    it resizes one of the two before it looks at the other."""
    for module in _pretrained(base):
        names = [name for name, table in _tables(module) if isinstance(table, WRAPPERS)]
        if not names:
            restore(module, RESIZE)
            continue
        why = (
            f"resize_token_embeddings: adapters are on the {' and the '.join(names)} of this model, and fit their size "
            "of now; resize the base first, and add the adapters then (of one that is trained: unload(), resize, "
            "load_adapter())"
        )
        override(module, RESIZE, _Refused(UnsupportedError, why))


def _tables(module: nn.Module) -> Iterator[tuple[str, object]]:
    for name, getter in (("input embedding", "get_input_embeddings"), ("output layer", "get_output_embeddings")):
        try:
            yield name, getattr(module, getter)()
        except (NotImplementedError, AttributeError):  # transformers raises where a model has none
            continue
