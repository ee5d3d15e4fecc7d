"""``model.route(names)``: which adapter each row of a batch goes to.

Names are looked up among the adapters in the model and in the sources that are attached to it (the banks of
``kilotune.fleet``). How a layer then runs is said in layers/routing.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from ..added_modules import base_modules
from ..errors import AdapterError, MergeError, UnsupportedError, did_you_mean, gather
from ..injection.installed_adapter import Installed, conflicts
from ..injection.tree import AroundBase
from ..layers.active_adapters import ActiveState
from ..layers.route import Cohort, Route, Stacked, levels_of

__all__ = ["BASE", "Group", "RoutedModel", "Source", "check_rows", "check_stacks", "unroutable"]

Row = str | Sequence[str] | None

BASE = "__base__"
"""PEFT's name for a row of the base alone; None says the same."""

# transformers' models that run with the sequence in front of the batch, so that rows are on the second axis.
SEQUENCE_FIRST = frozenset({"xlnet"})


@final
class Group(NamedTuple):
    """Adapters that can run as one.

    make: gives their cohort, from the rows and the index of a Cohort. installed: the parts of one of them in the model.
    """

    names: tuple[str, ...]
    make: Callable[[Tensor, Tensor], Cohort]
    installed: Installed


class Source(ABC):
    """Adapters that a route may name beside those in the model."""

    @abstractmethod
    def names(self) -> Sequence[str]:
        """All of them."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether it has an adapter of this name."""

    @abstractmethod
    def pinned(self, names: Sequence[str]) -> AbstractContextManager[list[Group]]:
        """The adapters ``names``, which stay as they are until the context is left.

        Raises:
            AdapterError: one of them went away, or there is no room for all of them at once.

        """


class RoutedModel(AroundBase, ABC):
    """What a model with adapters needs so that rows of one batch can go to different ones."""

    _state: ActiveState
    _installed: dict[str, Installed]
    _sources: list[Source]

    @contextmanager
    def route(self, names: Sequence[Row], lengths: Sequence[int] | None = None) -> Iterator[None]:
        """Inside this context, row i of each batch runs with adapter ``names[i]``; in this thread and coroutine.

        ``model(..., adapter_names=names)`` and ``model.generate(..., adapter_names=names)`` do the same for one call.
        Which adapters are active does not matter here. Gradients reach the adapters that want them.

        ``["house-style", "ann"]`` in the place of a name is a stack: ann on top of the house style, with the numbers of
        ``set_adapter(["house-style", "ann"])``. Adapters beneath others run once for all their rows.

        Args:
            names: an adapter for each row, or several, the lowest first; None (or ``"__base__"``) for the base alone.
            lengths: for packed sequences, how many tokens each of ``names`` holds for, in their order; their sum is
                the number of tokens of the batch.

        Raises:
            AdapterError: unknown names, or lengths that do not fit them.
            UnsupportedError: an adapter, or the model, in which rows cannot be told apart, or a stack of adapters that
                cannot act together; with the reason.
            MergeError: adapters are merged.

        """
        with self._routing(names, lengths, multiples=False):
            yield

    def attach(self, source: Source) -> None:
        """Let routes name the adapters of ``source`` too; where two have one name, the one attached first serves."""
        self._sources.append(source)

    def detach(self, source: Source) -> None:
        """Forget a source; AdapterError where it is not attached."""
        if source not in self._sources:
            raise AdapterError(f"detach(): this {type(source).__name__} is not attached to the model")
        self._sources.remove(source)

    @contextmanager
    def _routing(self, names: Sequence[Row], lengths: Sequence[int] | None, multiples: bool) -> Iterator[None]:
        if self._state.merged:
            raise MergeError(f"route(): {list(self._state.merged)} are merged into the weights; unmerge them first")
        wanted = _checked(names, lengths)
        with ExitStack() as held:
            held.enter_context(self.running(self._route_of(wanted, lengths, multiples, held)))
            yield

    @contextmanager
    def running(self, route: Route) -> Iterator[None]:
        """Inside this context forwards run ``route``: cohorts of whoever made it.

        Raises:
            UnsupportedError: a model in which rows cannot be told apart. MergeError: adapters are merged.

        """
        if self._state.merged:
            raise MergeError(f"route(): {list(self._state.merged)} are merged into the weights; unmerge them first")
        self._check_rows_first()
        with self._state.running(route):
            yield

    def _route_of(
        self, chains: list[tuple[str, ...]], lengths: Sequence[int] | None, multiples: bool, held: ExitStack
    ) -> Route:
        groups = self._groups(list(dict.fromkeys(name for chain in chains for name in chain)), held)
        home = {name: number for number, group in enumerate(groups) for name in group.names}
        check_stacks(chains, {name: groups[number].installed for name, number in home.items()})
        levels = levels_of({tuple(home[name] for name in chain) for chain in chains})
        if lengths is None:
            places = [(row, row + 1) for row in range(len(chains))]
        else:
            ends = torch.tensor(lengths).cumsum(0).tolist()
            places = list(zip([0, *ends[:-1]], ends, strict=True))
        mine: dict[tuple[int, int], list[tuple[tuple[int, int], str]]] = {}
        for span, chain in zip(places, chains, strict=True):
            for position, name in enumerate(chain):
                level = position if levels is None else levels[home[name]]
                mine.setdefault((level, home[name]), []).append((span, name))
        made: list[list[Cohort]] = [[] for _ in range(1 + max((level for level, _ in mine), default=0))]
        for level, number in sorted(mine):
            made[level].append(_cohort(groups[number], mine[level, number], self._routing_device()))
        return Route(places[-1][1], made[0], tokens=lengths is not None, multiples=multiples, above=made[1:])

    def _groups(self, names: Sequence[str], held: ExitStack) -> list[Group]:
        inside = [name for name in names if name in self._installed]
        outside: dict[int, list[str]] = {}
        faults = []
        for name in names:
            if name in self._installed:
                continue
            place = next((i for i, source in enumerate(self._sources) if source.has(name)), None)
            if place is None:
                faults.append(f"{name!r}.{did_you_mean(name, self._routable_names())}")
            else:
                outside.setdefault(place, []).append(name)
        if faults:
            raise AdapterError(gather("route(): there are no such adapters:", faults))
        faults = [fault for name in inside for fault in unroutable(self._installed[name])]
        if faults:
            raise UnsupportedError(gather("route(): rows cannot go to different adapters here:", faults))
        groups = [
            _group_of(tuple(group), self._installed[group[0]])
            for group in _alike({name: self._installed[name] for name in inside})
        ]
        for place, own in outside.items():
            groups += held.enter_context(self._sources[place].pinned(own))
        return groups

    def _routable_names(self) -> list[str]:
        return [*self._installed, *(name for source in self._sources for name in source.names())]

    def _check_rows_first(self) -> None:
        """Refuse a model in which the first axis of a layer's input is not the rows'."""
        kind = getattr(getattr(self.model, "config", None), "model_type", None)
        found = [kind] if kind in SEQUENCE_FIRST else []
        for module in base_modules(self.model):
            if getattr(module, "batch_first", True) is False:
                found.append(f"{type(module).__name__} with batch_first=False")
        if found:
            raise UnsupportedError(
                f"route(): {found[0]} runs with the sequence in front of the batch, so its rows cannot be told from "
                "positions; build the model with batch_first=True, or run one adapter at a time"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sources": []}  # a copy has no banks

    def _routing_device(self) -> torch.device:
        return next((tensor.device for tensor in self.model.parameters()), torch.device("cpu"))


def _group_of(names: tuple[str, ...], installed: Installed) -> Group:
    return Group(names, lambda rows, index: Stacked(names, rows, index), installed)


def _cohort(group: Group, mine: Sequence[tuple[tuple[int, int], str]], device: torch.device) -> Cohort:
    """The cohort of adapters of one group. mine: (the rows of a part, whose it is), in the order of the rows."""
    which = {name: i for i, name in enumerate(group.names)}
    rows = torch.cat([torch.arange(*span) for span, _ in mine])
    index = torch.cat([torch.full((span[1] - span[0],), which[name]) for span, name in mine])
    return group.make(rows.to(device), index.to(device))


def check_stacks(chains: Iterable[Sequence[str]], installed: Mapping[str, Installed]) -> None:
    """Refuse stacks of adapters that cannot act together.

    Args:
        chains: the names of adapters, the lowest first.
        installed: each one's parts.

    Raises:
        UnsupportedError: which, and why.

    """
    for chain in dict.fromkeys(tuple(chain) for chain in chains if len(chain) > 1):
        if faults := conflicts({name: installed[name] for name in chain}):
            raise UnsupportedError(gather(f"route(): {' and '.join(map(repr, chain))} cannot be a stack:", faults))


def _chain(row: object) -> tuple[str, ...] | None:
    """A row's adapters, the lowest first; None where that is nothing of the kind."""
    if row is None or row == BASE:
        return ()
    if isinstance(row, str):
        return (row,)
    if isinstance(row, Sequence) and all(isinstance(name, str) and name != BASE for name in row):
        return tuple(row)
    return None


def _checked(names: Sequence[Row], lengths: Sequence[int] | None) -> list[tuple[str, ...]]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise AdapterError(f"route(): expected a list with a name or None for each row, got {names!r}")
    chains = [chain for name in names if (chain := _chain(name)) is not None]
    wrong = [repr(name) for name in names if _chain(name) is None]
    if wrong or not names:
        raise AdapterError(
            "route(): expected a name or None for each row, or a list of names for a stack, got "
            f"{', '.join(wrong) or 'no rows'}"
        )
    if doubled := [list(chain) for chain in chains if len(set(chain)) < len(chain)]:
        raise AdapterError(f"route(): an adapter cannot stand on itself, as in {doubled[0]}; name it once")
    if lengths is not None:
        if not isinstance(lengths, Sequence):
            raise AdapterError(f"route(): lengths: expected a list of whole numbers, got {lengths!r}")
        bad = [n for n in lengths if isinstance(n, bool) or not isinstance(n, int) or n < 0]
        if bad or len(lengths) != len(names) or sum(lengths) == 0:
            raise AdapterError(
                f"route(): expected as many lengths as names ({len(names)}), whole numbers that are not all 0, got "
                f"{list(lengths)}"
            )
    return chains


def _alike(adapters: Mapping[str, Installed]) -> list[list[str]]:
    """Names of adapters whose parameters stack: of one method and configuration, with the same frozen factors."""
    groups: dict[Hashable, list[str]] = {}
    for name, installed in adapters.items():
        groups.setdefault(_form(name, installed), []).append(name)
    return list(groups.values())


def _form(name: str, installed: Installed) -> Hashable:
    method = installed.method
    if not (method.stacks or method.by_rows) or installed.saved:
        return name
    slots = installed.slots()
    if any(slot.strength != 1.0 for slot in slots.values()):
        return name
    firsts = tuple(None if s.method is None else method.first_factor(s.site, s.shared) for s in slots.values())
    config = installed.config.replace(inference_mode=False, base_model_name_or_path=None, revision=None)
    numbers = [*(item for s in slots.values() for item in s.named_parameters()), *installed.shared.trained.items()]
    shapes = tuple((key, tuple(p.shape), p.dtype) for key, p in numbers)
    return type(method), repr(config), tuple(slots), firsts, installed.shared.common, shapes


def unroutable(installed: Installed) -> list[str]:
    """Why an adapter cannot run on some rows only; empty where it can."""
    faults = []
    for name, layer in installed.layers.items():
        why = None
        if layer.kind.parameter is not None or layer.kind.matrices(layer.base_layer):
            why = "an expert layer regroups its tokens inside, where rows are no longer known"
        elif any(part == "experts" for part in name.split(".")):
            why = "an expert gets the tokens that are sent to it, whose rows are no longer known"
        elif layer.kind.substitutes or layer.read_by_parent:
            why = "its parent multiplies with the weight itself, which is one for all rows"
        if why is not None:
            faults.append(f"adapter {installed.adapter!r}, layer {name!r} ({type(layer.base_layer).__name__}): {why}")
    return faults


def generate(model: RoutedModel, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The base model's ``generate``, with ``adapter_names`` for the rows of its input."""
    if (names := kwargs.pop("adapter_names", None)) is None:
        return own(*args, **kwargs)
    given = [*args[:1], *(kwargs.get(key) for key in ("inputs", "input_ids", "inputs_embeds", main_input_of(model)))]
    rows = next((len(value) for value in given if isinstance(value, Tensor)), None)
    if rows is not None and isinstance(names, Sequence) and rows != len(names):
        raise AdapterError(f"generate(): expected an adapter name or None for each of {rows} rows, got {len(names)}")
    with model._routing(names, None, multiples=True):
        return own(*args, **kwargs)


def check_rows(names: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse names for a call none of whose tensors has as many rows.

    Layers cannot tell: one that sees twice as many rows as there are names may be one that sees two tokens of each.
    """
    rows = [len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
    if rows and isinstance(names, Sequence) and len(names) not in rows:
        raise AdapterError(f"adapter_names: expected a name or None for each of {rows[0]} rows, got {len(names)}")


def main_input_of(model: RoutedModel) -> str:
    """What transformers' models call the argument that has the rows."""
    return str(getattr(model.model, "main_input_name", "input_ids"))
