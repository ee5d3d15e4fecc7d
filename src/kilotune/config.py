"""AdapterConfig: frozen, checked when built, and adapter_config.json in and out.

The keys are PEFT's. What PEFT has no key for (``generator``, ``sharing``) is marked ``ours`` in the
field's metadata and travels in one nested section, ``"kilotune"``, which is written only where PEFT
could not read the adapter anyway. The help text under each field is its only home: docs, command line
and errors read it from here.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Any, ClassVar, NoReturn, TypeVar, cast, final

from . import patterns
from .errors import ConfigError, did_you_mean, gather
from .known_names import CONFIG_NAMES, METHOD_OPTIONS, PRESETS_OF, may_be_option

__all__ = ["FORMAT_VERSION", "AdapterConfig", "TaskType", "check_listed_options", "listed_options", "option"]

FORMAT_VERSION = 1
SECTION = "kilotune"
FLAGS = ("fan_in_fan_out", "inference_mode", "strict_targets")
# Before the peft_type of every file that PEFT is not to read: it knows no such type, whatever versions of it come.
CLOSED = "KILOTUNE_"
SHOWN = 20  # faults that an error shows; to look for the nearest name of more takes long
ALL_LINEAR = "all-linear"
ALL_BIASED = "all-biased"
C = TypeVar("C", bound="AdapterConfig")


@final
class TaskType(StrEnum):
    """The task names of PEFT; SEQ_CLS, TOKEN_CLS and QUESTION_ANS also train the model's head."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def option(default: Any, text: str, *, ours: bool = False, kept: bool = True) -> Any:
    """A dataclass field with its help text; ``ours``: PEFT has no such key; not ``kept``: it stands in no file."""
    metadata = {"help": text, "ours": ours, "kept": kept}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


Names = tuple[str, ...]


@final
class FrozenDict(dict[str, Any]):
    """A dictionary that cannot be changed, so that a checked configuration stays valid; hashable by its items."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a configuration is frozen; use replace() to get one with other values")

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = __ior__ = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self),)


@final
class _Signature:
    """The options as ``help()`` and completion show them; ``__new__`` takes any, so that it can name the nearest."""

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        whole = inspect.signature(owner.__init__)  # type: ignore[misc]
        return whole.replace(parameters=list(whole.parameters.values())[1:])


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(ABC):
    """What every adapter's configuration has; each method adds its own keys.

    Raises:
        ConfigError: for unknown keys (with the nearest valid one) and for wrong values, all at once.

    """

    __signature__: ClassVar[_Signature] = _Signature()
    peft_type: ClassVar[str]
    bias_modes: ClassVar[Names] = ("none", "all")
    target_words: ClassVar[Names] = (ALL_LINEAR,)  # words for target_modules that are no names
    # What a training takes where none are given: a Llama learns more in all layers than in PEFT's query and value.
    usual_targets: ClassVar[str | None] = ALL_LINEAR

    target_modules: Sequence[str] | str | None = option(
        None,
        "Which modules to adapt: a list of names (whole, or the end of a dotted name), one regular expression "
        "that the whole dotted name must match, 'all-linear', or None for a known architecture's defaults.",
    )
    fan_in_fan_out: bool = option(
        False,
        "Kept for PEFT: whether weights are stored as (in, out). Layers are recognised by themselves here.",
    )
    bias: str = option(
        "none",
        "Which biases to train: 'none', 'all' (every parameter called bias), or those of the adapted layers only.",
    )
    modules_to_save: Sequence[str] | str | None = option(
        None,
        "Modules to train whole, as a copy of their own per adapter (a new head): every module whose name ends with "
        "one of these, as in PEFT ('norm' takes 'input_layernorm' too); saved with the adapter.",
    )
    exclude_modules: Sequence[str] | str | None = option(
        None, "Modules not to adapt: a list of names, or a regular expression.", ours=True
    )
    layers_to_transform: Sequence[int] | int | None = option(
        None,
        "Adapt only the blocks with these indices; one number or a list. Only with a list of target names.",
    )
    layers_pattern: Sequence[str] | str | None = option(
        None, "The name of the list of blocks that layers_to_transform counts in, such as 'layers' or 'h'."
    )
    target_parameters: Sequence[str] | None = option(
        None,
        "Parameters (not modules) to adapt, such as the stacked weights of the experts of a mixture-of-experts layer: "
        "whole names, or the ends of dotted names. Without target_modules beside it, only these are adapted. An empty "
        "list says that leaving experts out is meant.",
        ours=True,
    )
    strict_targets: bool = option(
        False,
        "A name in target_modules that matches nothing is an error. Without it a warning says so, where others match.",
        ours=True,
        kept=False,
    )
    task_type: str | None = option(None, "One of TaskType; for classification tasks the head is trained as well.")
    base_model_name_or_path: str | None = option(None, "The base model's name; filled in from the model.")
    revision: str | None = option(None, "The base model's revision.")
    inference_mode: bool = option(False, "True: the adapter's parameters are frozen.")

    def __new__(cls, *args: Any, **options: Any) -> AdapterConfig:
        faults = ["options are given by name, not by position"] if args else []
        faults += [cls._unknown(key) for key in options if key not in cls.option_names()]
        if faults:
            raise ConfigError(gather(f"{cls.__name__}:", faults))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "target_parameters"):
            self._set(name, _as_tuple(getattr(self, name), keep_string=True))
        for name in ("modules_to_save", "layers_pattern", "layers_to_transform"):
            self._set(name, _as_tuple(getattr(self, name), keep_string=False) or None)
        for name in self.option_names():
            if isinstance(value := getattr(self, name), dict):
                self._set(name, FrozenDict(value))
        if isinstance(self.target_modules, str) and self.target_modules.lower() in (ALL_LINEAR, ALL_BIASED):
            self._set("target_modules", self.target_modules.lower())
        self._set("task_type", self.task_type.value if isinstance(self.task_type, TaskType) else self.task_type)
        faults = [*self._common_faults(), *self.faults()]
        if faults:
            raise ConfigError(gather(f"{type(self).__name__}:", faults))

    @abstractmethod
    def faults(self) -> list[str]:
        """What is wrong with the method's own values, a line each."""

    @property
    def dropout(self) -> float:
        """The dropout on the adapter's input."""
        return 0.0

    @property
    def part_of_base(self) -> str | None:
        """From which part of the base's weights the change is counted; None: from nothing, so it is in the file."""
        return None

    @property
    def block_indices(self) -> tuple[int, ...] | None:
        """``layers_to_transform``, as the tuple that it is once the configuration is built."""
        return cast("tuple[int, ...] | None", self.layers_to_transform)

    @classmethod
    def option_names(cls) -> list[str]:
        """All valid keys."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def help_of(cls, name: str) -> str:
        """The help text of one key."""
        return str({field.name: field for field in dataclasses.fields(cls)}[name].metadata["help"])

    def replace(self: C, **changes: Any) -> C:
        """A copy with some values changed, checked again."""
        return dataclasses.replace(self, **changes)

    # -- adapter_config.json ---------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """PEFT's keys, sorted, in plain JSON types; keys of ours are left out (see :meth:`ours`).

        ``peft_version`` is None, which says that no PEFT wrote it; PEFT fills it in where it saves the adapter again.
        """
        fields = [field for field in dataclasses.fields(self) if not field.metadata["ours"]]
        plain = {field.name: _plain(getattr(self, field.name)) for field in fields}
        return dict(sorted({**plain, "peft_type": self.peft_type, "auto_mapping": None, "peft_version": None}.items()))

    def ours(self) -> dict[str, Any]:
        """The keys that PEFT does not have, where they differ from their default."""
        fields = [field for field in dataclasses.fields(self) if field.metadata["ours"] and field.metadata["kept"]]
        values = {field.name: _plain(getattr(self, field.name)) for field in fields}
        return {field.name: values[field.name] for field in fields if values[field.name] != _plain(field.default)}

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """From the keys of an adapter_config.json (without the ``kilotune`` section's keys merged in).

        Unknown keys are accepted where they are switched off (None, False, empty; PEFT writes many) or listed
        as harmless; switched on, they are refused by name, because ignoring them would change the results.
        """
        known: dict[str, Any] = {}
        faults: list[str] = []
        names = set(cls.option_names())
        for key, value in values.items():
            if key in names:
                known[key] = value
            elif key not in HARMLESS_KEYS and value not in (None, False, "", [], {}):
                hint = cls._unknown(key) if len(faults) < SHOWN else "unknown option"
                faults.append(f"{key}={value!r:.500}: {hint}. If it is an option of PEFT, kilotune lacks it.")
        if faults:
            raise ConfigError(gather(f"{cls.__name__}:", faults))
        return cls(**known)

    @classmethod
    def from_file(cls: type[C], values: Mapping[str, Any], section: Mapping[str, Any]) -> C:
        """From an adapter_config.json's keys and its section of ours; for methods whose files mean more."""
        return cls.from_dict({**values, **section})

    # -- checks ----------------------------------------------------------------------------------

    @classmethod
    def _unknown(cls, key: str) -> str:
        return _unknown_option(key, cls.option_names())

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _common_faults(self) -> list[str]:
        faults = []
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            empty = name == "target_modules" and self.target_modules == () and self.target_parameters
            faults += [] if empty else _name_faults(name, getattr(self, name))
        faults += self._parameter_faults()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), str):
                faults += regex_faults(name, value)
        for pattern in self.layers_pattern if isinstance(self.layers_pattern, tuple) else ():
            faults += regex_faults("layers_pattern", pattern) if isinstance(pattern, str) else []
        if self.target_modules == ALL_BIASED and ALL_BIASED not in self.target_words:
            faults.append(f"target_modules: {ALL_BIASED!r} is for methods that train biases only; use {ALL_LINEAR!r}")
        if self.bias not in self.bias_modes:
            hint = did_you_mean(str(self.bias), self.bias_modes)
            faults.append(f"bias: expected one of {list(self.bias_modes)}, got {self.bias!r}.{hint}")
        tasks = [task.value for task in TaskType]
        if self.task_type is not None and self.task_type not in tasks:
            hint = did_you_mean(str(self.task_type), tasks)
            faults.append(f"task_type: expected one of {tasks} or None, got {self.task_type!r}.{hint}")
        return faults + self._layer_faults() + _type_faults(self, bool, FLAGS)

    def _parameter_faults(self) -> list[str]:
        names = self.target_parameters
        if names is not None and not (isinstance(names, tuple) and all(isinstance(n, str) and n for n in names)):
            return [f"target_parameters: expected a list of parameter names, got {names!r}"]
        if names and self.layers_to_transform is not None:
            return ["layers_to_transform: does not reach target_parameters; name the parameters of those blocks whole"]
        return []

    def _layer_faults(self) -> list[str]:
        indices = self.block_indices
        faults = []
        if indices is not None:
            if not isinstance(indices, tuple) or any(number_fault("", i, low=0, whole=True) for i in indices):
                faults.append(f"layers_to_transform: expected block indices >= 0, got {self.layers_to_transform!r}")
            if isinstance(self.target_modules, str):
                faults.append(
                    "layers_to_transform: needs target_modules to be a list of names; a regular expression or "
                    f"'all-linear' ({self.target_modules!r}) selects by itself"
                )
        elif self.layers_pattern is not None:
            faults.append("layers_pattern: has no effect without layers_to_transform")
        return faults


def listed_options(method: str) -> list[str]:
    """The options of a method of known_names.json, as its config has them, without importing that."""
    return [*AdapterConfig.option_names(), *METHOD_OPTIONS[method]]


def check_listed_options(method: str, given: Iterable[str]) -> None:
    """Refuse what is no option of a listed method or preset, as its config would, without importing that.

    What may be an option since the list was written passes, and so does any method that is not listed.

    Raises:
        ConfigError: with the nearest valid names.

    """
    name = PRESETS_OF.get(method, method)
    if name not in METHOD_OPTIONS:
        return
    known = listed_options(name)
    unknown = [key for key in given if key not in known]
    if unknown and not any(map(may_be_option, unknown)):
        raise ConfigError(gather(f"{CONFIG_NAMES[name]}:", [_unknown_option(key, known) for key in unknown]))


def _unknown_option(key: str, known: Sequence[str]) -> str:
    return f"unknown option {key!r}.{did_you_mean(SYNONYMS.get(key, key), known)} All: {', '.join(known)}"


# What people write for an option whose name looks different.
SYNONYMS = {"rank": "r", "seed": "projection_prng_key", "targets": "target_modules", "layers": "layers_to_transform"}

# Keys of PEFT's files that change no result here: bookkeeping, or defaults of features that are off.
HARMLESS_KEYS = frozenset(
    {
        "auto_mapping",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "runtime_config",
    }
)


def number_fault(name: str, value: Any, *, low: float, high: float = math.inf, whole: bool = False) -> list[str]:
    """A line when ``value`` is no finite number (a whole one if ``whole``) in [low, high], else nothing."""
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if number and whole and value >= 2**31:  # no tensor has such a size, and no float may hold it
        return [f"{name}: expected a whole number below 2**31, got {value!r}"]
    if number and abs(value) <= sys.float_info.max and low <= value <= high:
        return []
    span = "that is finite" if low == -math.inf else f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
    return [f"{name}: expected {'a whole number' if whole else 'a number'} {span}, got {value!r}"]


def rate_fault(name: str, value: Any) -> list[str]:
    """A line when ``value`` is not a dropout probability in [0, 1)."""
    return [f"{name}: expected a number in [0, 1), got 1.0"] if value == 1 else number_fault(name, value, low=0, high=1)


def _type_faults(config: AdapterConfig, kind: type, names: Sequence[str]) -> list[str]:
    wrong = [name for name in names if not isinstance(getattr(config, name), kind)]
    return [f"{name}: expected {kind.__name__}, got {getattr(config, name)!r}" for name in wrong]


def bool_faults(config: AdapterConfig, *names: str) -> list[str]:
    """A line for each of ``names`` that is not True or False."""
    return _type_faults(config, bool, names)


def _as_tuple(value: Any, keep_string: bool) -> Any:
    if value is None or (keep_string and isinstance(value, str)):
        return value
    if isinstance(value, (str, int)):
        return (value,)
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(value, key=repr))
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _name_faults(key: str, value: Any) -> list[str]:
    if value is None or isinstance(value, str):
        return [f"{key}: is an empty string"] if value == "" else []
    if not isinstance(value, tuple) or not all(isinstance(name, str) and name for name in value):
        return [f"{key}: expected a list of module names, got {value!r}"]
    return [f"{key}: is an empty list"] if not value and key == "target_modules" else []


def regex_faults(key: str, pattern: Any) -> list[str]:
    """A line when ``pattern`` is no regular expression; ConfigError where it takes too long to see."""
    if not isinstance(pattern, str):
        return [f"{key}: expected a name or a regular expression, got {pattern!r}"]
    try:
        fault = patterns.fault(pattern)
    except patterns.PatternError as error:  # no time for the other patterns either
        raise ConfigError(f"{key}: {error}") from error
    return [] if fault is None else [f"{key}: {pattern[:200]!r} is no regular expression: {fault}"]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, Enum):
        return value.value
    return value
