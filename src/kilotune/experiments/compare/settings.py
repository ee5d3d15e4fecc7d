"""What a comparison is run with: the YAML file of ``kilotune compare``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

from ...config import FrozenDict
from ...errors import ConfigError, did_you_mean, gather
from ...train.settings.config_file import merged, read_config
from ...train.settings.fields import Section, freeze, mapping, number, setting
from ...train.settings.sections import WHOLE_METHODS, adapter_names
from .problem_settings import DigitsSettings, RecipeSettings, YoursSettings
from .search import Search

if TYPE_CHECKING:
    from .problem import Contender, Problem

__all__ = ["ALL_METHODS", "CompareSettings", "contenders_of", "load_comparison", "make_problem"]

ALL_METHODS = (
    "full",
    "head",
    "bitfit",
    "ia3",
    "bottleneck",
    "lora",
    "dora",
    "vera",
    "dvora",
    "unilora",
    "intrinsic",
)
"""What is compared where nothing else is said."""


def _digits(settings: DigitsSettings) -> Problem:
    from .digits import Digits  # each of them needs torch, which wrong settings do without

    return Digits(settings)


def _recipe(settings: RecipeSettings) -> Problem:
    from .recipe import Recipe

    return Recipe(settings)


def _yours(settings: YoursSettings) -> Problem:
    from .own_problem import load_yours

    return load_yours(settings)


KINDS: Mapping[str, tuple[type[Section], Callable[[Any], Problem]]] = {
    "digits": (DigitsSettings, _digits),
    "recipe": (RecipeSettings, _recipe),
    "python": (YoursSettings, _yours),
}
PLACES = ("config", "file")
"""Settings of a problem that are paths, from the folder of the comparison's own file."""


@final
@dataclass(frozen=True, kw_only=True)
class CompareSettings(Section):
    """The whole of it, but for the problem's own settings and the search."""

    title: str | None = setting(
        None,
        lambda name, value: (
            [] if value is None or isinstance(value, str) else [f"{name}: expected text, got {value!r}"]
        ),
        "A title for the report; null: the problem's name.",
    )
    problem: Mapping[str, Any] = setting(
        FrozenDict(), mapping, f"What is learned: its kind ({', '.join(KINDS)}), and the settings of that kind."
    )
    methods: Mapping[str, Any] = setting(
        FrozenDict(),
        mapping,
        "What is compared: names with options. A name that is no method's says which one it is: {lora-16: {method: "
        f"lora, r: 16}}}}. Empty: {', '.join(ALL_METHODS)}.",
    )
    seeds: int = setting(5, number(1, 1000, whole=True), "Runs of each winner, scored on the test split.")
    first_seed: int = setting(0, number(0, whole=True), "The first of their seeds.")
    threads: int = setting(
        1, number(1, 1024, whole=True), "CPU threads of torch. With 1 the sums do not depend on the number of cores."
    )
    search: Search = field(default_factory=Search)
    folder: Path = Path()

    SECTIONS: ClassVar[tuple[str, ...]] = ("search",)

    @classmethod
    def known(cls) -> list[str]:
        return [*cls.names(), "search", "folder"]

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds that are reported."""
        return tuple(range(self.first_seed, self.first_seed + self.seeds))


def load_comparison(path: Path, overrides: Sequence[str] = ()) -> CompareSettings:
    """Settings from a YAML file, with ``a.b=c`` overrides.

    Raises:
        ConfigError: it cannot be read, or holds something wrong; all of it at once.
        MissingExtraError: PyYAML is not installed.
    """
    values = merged(read_config(path), overrides)
    searched = values.pop("search", None) or {}
    faults = [CompareSettings.unknown(key) for key in values if key not in CompareSettings.names()]
    own = {key: freeze(values[key]) for key in CompareSettings.names() if key in values}
    faults += CompareSettings.faults({**CompareSettings.defaults(), **own})
    if not isinstance(searched, Mapping):
        faults.append(f"search: expected settings with values, got {searched!r}")
        searched = {}
    faults += [Search.unknown(key) for key in searched if key not in Search.names()]
    faults += Search.faults({**Search.defaults(), **{k: v for k, v in searched.items() if k in Search.names()}})
    if not faults:
        settings = CompareSettings(**own, search=Search(**searched), folder=path.parent)
        faults = [*_problem_faults(settings.problem), *_method_faults(settings.methods)]
        if settings.search.seed in settings.all_seeds:
            faults.append(f"search.seed: {settings.search.seed} is one of the reported seeds, which choose nothing")
        if not faults:
            return settings
    raise ConfigError(gather(f"{path}:", faults))


def _problem_faults(given: Mapping[str, Any]) -> list[str]:
    kind = str(given.get("kind"))
    if kind not in KINDS:
        return [f"problem.kind: expected one of {', '.join(KINDS)}, got {kind!r}.{did_you_mean(kind, KINDS)}"]
    section, _ = KINDS[kind]
    values = {key: value for key, value in given.items() if key != "kind"}
    faults = [section.unknown(key) for key in values if key not in section.known()]
    known = {key: value for key, value in values.items() if key in section.known()}
    return faults + section.faults({**section.defaults(), **known})


def _method_faults(given: Mapping[str, Any]) -> list[str]:
    faults = []
    for name, options in given.items():
        if options is not None and not isinstance(options, Mapping):
            faults.append(f"methods.{name}: expected options with values, got {options!r}")
        elif (method := (options or {}).get("method", name)) not in (known := _names(method)):
            hint = did_you_mean(str(method), known)
            faults.append(f"methods.{name}: {method!r} is no method.{hint} A name of your own needs its 'method'")
    return faults


def _names(wanted: object) -> tuple[str, ...]:
    """What ``wanted`` is looked up among."""
    return (*WHOLE_METHODS, *adapter_names(str(wanted)))


def make_problem(settings: CompareSettings) -> Problem:
    """The problem that the settings name.

    Raises:
        KilotuneError: its data or its model cannot be had.
    """
    section, made = KINDS[settings.problem["kind"]]
    values = {key: value for key, value in settings.problem.items() if key != "kind"}
    values |= {key: str(settings.folder / values[key]) for key in PLACES if key in values}
    return made(section(**values))


def contenders_of(settings: CompareSettings, problem: Problem, only: Sequence[str] = ()) -> tuple[Contender, ...]:
    """What is compared, each with all its options.

    Args:
        settings: their ``methods``; all of :data:`ALL_METHODS` where there are none.
        problem: gives the options that a method usually has on it.
        only: names among them, in this order; other methods' names stand for these methods with their usual options.

    Raises:
        ConfigError: a name that is neither, a method that is there twice, options that are wrong; all at once.
    """
    given = settings.methods or dict.fromkeys(ALL_METHODS)
    names = only or tuple(given)
    known = {name: (*given, *_names(name)) for name in names}
    faults = [f"{name!r} is no method.{did_you_mean(name, known[name])}" for name in names if name not in known[name]]
    found: dict[str, Contender] = {}
    for name in (name for name in names if name in known[name]):
        options = dict(given.get(name) or {})
        method = str(options.pop("method", name))
        try:
            contender = _contender(name, method, options, problem)
        except (ConfigError, TypeError) as error:
            faults += [f"{name}: {line}" for line in str(error).split("\n  - ")[-20:] if not line.endswith(":")]
            continue
        same = [other.name for other in found.values() if other.recipe == contender.recipe]
        faults += [f"{name}: is the same as {same[0]}"] if same else []
        found[name] = contender
    if faults:
        raise ConfigError(gather("the methods cannot be compared:", faults))
    return tuple(found.values())


def _contender(name: str, method: str, options: Mapping[str, Any], problem: Problem) -> Contender:
    from .problem import Contender

    bare = Contender(name, method)
    if not bare.is_adapter:
        if options:
            raise ConfigError(f"method {method!r} has no options, got {', '.join(options)}")
        return bare
    made = Contender(name, method, freeze({**problem.usual(method), **options}))
    made.config()
    return made
