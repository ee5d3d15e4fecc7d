"""PEFT's configurations: they may be changed until they are used, and become one of ours then.

::

    config = LoraConfig(r=8)          # checked at once
    config.target_modules = ["q"]     # may be changed
    get_peft_model(model, config)     # translated (PeftConfig.translated), which checks it again

What a model has been given stands in ``model.peft_config``: a copy, with targets and heads filled in.
"""

from __future__ import annotations

import json
import os
from abc import ABC
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, final

from ..adapter_files.files import locate
from ..adapter_files.names import CONFIG_NAME
from ..config import SECTION, AdapterConfig, TaskType
from ..errors import CheckpointError, ConfigError, UnsupportedError, check_one_of, did_you_mean, gather, type_name
from ..methods import method_of_file
from ..whole_file import replacing
from .utils.peft_types import PeftType

__all__ = ["CONFIGS", "OURS", "PeftConfig", "PrefixTuningConfig", "PromptLearningConfig", "check_config"]

# Of PEFT's files, beside the options of a method.
BOOKKEEPING = ("auto_mapping", "peft_type", "peft_version")
# Of transformers' downloads. The commit is that of the revision, which is given too.
PASSED_ON = ("force_download", "proxies", "resume_download", "commit_hash", "tqdm_class")
CONFIGS: dict[str, type[PeftConfig]] = {}  # peft_type -> its class; each class lists itself
OURS: Mapping[str, bool] = {"ours": True}  # metadata of an option that PEFT does not have


@dataclass
class PeftConfig(ABC):  # noqa: B024, as the others' base; it is made to load any of them
    """What PEFT's configurations have in common, and a way to load any of them.

    Attributes:
        task_type: as in PEFT; for classification the head is trained as well.
        peft_type: filled in.
        auto_mapping: the base's class, in files of models without a task, for ``AutoPeftModel``.
        peft_version: of a file that PEFT wrote; None in ours.
        base_model_name_or_path, revision: the base's, filled in from the model where it knows them.
        inference_mode: True: the adapter is frozen.

    Raises:
        ConfigError: wrong values, all at once; TypeError: an unknown option.

    """

    ours: ClassVar[type[AdapterConfig] | None] = None  # what it becomes

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        if self.task_type is not None:
            check_one_of("task_type", str(self.task_type), [task.value for task in TaskType])
        if self.ours is not None:
            self.peft_type = PeftType(self.ours.peft_type)
            for name in ("target_modules", "exclude_modules"):
                if isinstance(value := getattr(self, name, None), list):
                    setattr(self, name, set(value))
            self.translated()

    @property
    def is_prompt_learning(self) -> bool:
        """Whether it trains a prompt; no method here does."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether it is an adaption prompt; no method here is."""
        return False

    def translated(self) -> AdapterConfig:
        """What it asks for, as one of our configurations.

        Raises:
            ConfigError: wrong values, and options of PEFT that are switched on and not here.

        """
        if self.ours is None:
            raise ConfigError(
                f"{type(self).__name__}: no method; take {', '.join(c.__name__ for c in CONFIGS.values())}"
            )
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in BOOKKEEPING}
        if "layers_pattern" in values:  # an empty one means the usual names, as None does
            values["layers_pattern"] = values["layers_pattern"] or None
        return self.ours.from_dict({key: value for key, value in values.items() if value is not None})

    # -- files -----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All options of PEFT's, in plain types but for sets, and those of ours that are set."""
        return {one.name: getattr(self, one.name) for one in fields(self) if not _unset(one, getattr(self, one.name))}

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], auto_mapping_dict: dict[str, Any] | None = None
    ) -> None:
        """Write adapter_config.json into a folder, which is made where it is not there.

        Raises:
            CheckpointError: it is a file.

        """
        folder = Path(save_directory)
        if folder.is_file():
            raise CheckpointError(f"save_pretrained: expected a folder, got the file {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        theirs = [one.name for one in fields(self) if not one.metadata.get("ours")]
        values = {name: getattr(self, name) for name in theirs if name != "runtime_config"}  # which holds of one run
        ours = [one for one in fields(self) if one.metadata.get("ours") and one.name != "strict_targets"]
        more = {one.name: getattr(self, one.name) for one in ours if getattr(self, one.name) != one.default}
        if auto_mapping_dict is not None:
            values["auto_mapping"] = auto_mapping_dict
        told = {**values, **({SECTION: more} if more else {})}
        text = json.dumps(told, indent=2, sort_keys=True, default=_plain)
        with replacing(folder / CONFIG_NAME) as fresh:
            fresh.write_text(text)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> PeftConfig:
        """The configuration in a folder or under a hub id, of the class that its method has.

        Args:
            pretrained_model_name_or_path, subfolder, revision, token, cache_dir, local_files_only: where it is.
            kwargs: what transformers hands over beside these (``force_download``), as long as it is off.

        Raises:
            CheckpointError: there is none. ConfigError: a method, or an option, that is not here.

        """
        if unknown := [key for key in kwargs if key not in PASSED_ON]:
            raise TypeError(f"unexpected options: {', '.join(unknown)}; known: {', '.join(PASSED_ON)}")
        if on := [f"{key}={value!r:.100}" for key, value in kwargs.items() if value and key != "commit_hash"]:
            raise ConfigError(f"{', '.join(on)}: not here; take another cache_dir for a fresh download")
        folder = locate(
            pretrained_model_name_or_path,
            revision=revision,
            subfolder=subfolder or None,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        return cls.from_peft_type(**cls.from_json_file(folder / CONFIG_NAME))

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """The values in a file; ``runtime_config``, which holds of one run, is left out."""
        path = Path(path_json_file)
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: expected an object, got {type(values).__name__}")
        values.pop("runtime_config", None)
        return values

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """The configuration of the method that ``peft_type`` names, or of this class.

        Raises:
            ConfigError: a method, or an option that is switched on, that is not here.

        """
        section = dict(kwargs.pop(SECTION, {}))
        made: type[PeftConfig] = cls
        if (named := kwargs.get("peft_type")) is not None:
            found = method_of_file(str(named)).config_cls
            listed = [one for one in CONFIGS.values() if one.ours is found]
            if not listed:
                raise ConfigError(f"peft_type={named!r}: a method that PEFT lacks; load it with kilotune.PeftModel")
            made = listed[0]
            options = {key: section[key] for key in section if key in made.known()}
            kwargs = {**kwargs, **made.of_file(kwargs, section), **options}
        known = made.known()
        faults = [
            f"{key}={value!r:.200}: kilotune has no such option.{did_you_mean(key, known)}"
            for key, value in kwargs.items()
            if key not in known and value not in (None, False, "", [], {})
        ]
        if faults:
            raise ConfigError(gather(f"{made.__name__}:", faults))
        return made(**{key: value for key, value in kwargs.items() if key in known})

    @classmethod
    def known(cls) -> list[str]:
        """The names of all options."""
        return [one.name for one in fields(cls)]

    @classmethod
    def of_file(cls, values: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
        """What a file means beyond what it says."""
        return {}

    def copy(self, **changes: Any) -> Self:
        """A copy with some values changed, checked again."""
        return replace(self, **changes)


@dataclass
class PromptLearningConfig(PeftConfig, ABC):
    """As in PEFT, for code that asks whether a configuration is one; no method here is."""


@final
@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """As in PEFT, for libraries that ask whether a configuration is one. None can be made."""

    def __post_init__(self) -> None:
        raise UnsupportedError("PrefixTuningConfig: kilotune trains no prompts; use LoraConfig or VeraConfig")


def check_config(config: object) -> None:
    """Refuse what is no configuration of ours, such as one of PEFT's own in a script of which half was changed.

    Raises:
        ConfigError: it is none.

    """
    if not isinstance(config, PeftConfig):
        raise ConfigError(f"expected a configuration of kilotune.peft, got {type_name(config)}")


def _unset(option: Field[Any], value: Any) -> bool:
    """Whether an option of ours has the value that it has where nobody has set it, or that files are read with."""
    return bool(option.metadata.get("ours")) and value in (option.default, option.metadata.get("read", option.default))


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return vars(value)
