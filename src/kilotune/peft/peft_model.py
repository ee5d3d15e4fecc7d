"""PEFT's PeftModel and its sisters: a model with adapters in it, under PEFT's names all the way down.

::

    PeftModel
      base_model    LoraModel, VeraModel, ...: our model with adapters (tuners/tuners_utils.py)
        model       the base, with our layers in it, which show themselves as PEFT's (layer_shape.py)
"""

from __future__ import annotations

import os
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor, nn

from ..adapter_files.files import TwoFiles, locate, read_files
from ..adapter_files.reading import AdapterFile, parse
from ..adapter_files.writing import DEFAULT, check_safe, folders
from ..convert import to_lora
from ..errors import ConfigError
from ..model.adapter_model import ASKED_BY_TRAINERS
from . import in_place
from .config import PeftConfig, check_config
from .hub import push_to_hub, write_card
from .status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from .tuners.lora.config import refuse_offload
from .tuners.mixed import tuner_of
from .tuners.tuners_utils import BaseTuner
from .utils.other import QUANTISED, let_inputs_have_gradients
from .utils.save_and_load import (
    refuse_embedding_layers,
    renamed,
    replace_numbers,
    save_adapter,
    write_auto_mapping,
)

__all__ = [
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "get_layer_status",
    "get_model_status",
]

HUB = ("revision", "subfolder", "token", "cache_dir", "local_files_only")
# Options of PEFT's that ask for what is so here in any case, or of other devices; with what they may be.
ACCEPTED = (
    *("ephemeral_gpu_offload", "low_cpu_mem_usage", "use_safetensors", "torch_device", "torch_dtype", "dtype"),
    *("device_map", "max_memory", "offload_folder", "offload_dir", "offload_buffers"),
)


class LoadResult(NamedTuple):
    """Of loading an adapter: both are empty, for what does not fit is an error here."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class PeftModel(nn.Module, ABC):
    """A base model with adapters in it, as PEFT has it; its sisters are the same for a task.

    Args:
        model: any module; changed in place, its weights frozen.
        peft_config: of the first adapter, which is active.
        adapter_name: its name.
        autocast_adapter_dtype: True: trained numbers are float32, whatever the base has. False: in the base's dtype.
        low_cpu_mem_usage: without numbers, on the meta device, until the adapter is loaded.

    Attributes that it does not have are those of ``base_model``, and of the base.

    """

    task: ClassVar[str | None] = None

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = DEFAULT,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        tuner = tuner_of(peft_config)
        self.base_model: BaseTuner = tuner(model, peft_config, adapter_name, low_cpu_mem_usage)
        self._begin()
        if not autocast_adapter_dtype:
            self._in_base_dtype(adapter_name)

    def _begin(self) -> None:
        self.training = self.base_model.training

    @classmethod
    def around(cls, tuner: BaseTuner) -> PeftModel:
        """The model around what is in ``base_model``."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.base_model = tuner
        made._begin()
        return made

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Put a saved adapter, of PEFT or of ours, into a base model; it is active.

        Args:
            model: the base.
            model_id: a folder or a hub id.
            adapter_name: what to call it here.
            is_trainable: False: it is frozen.
            config: in place of that in the folder.
            autocast_adapter_dtype: False: its numbers are kept in the base's dtype.
            ephemeral_gpu_offload: refused where it is True.
            low_cpu_mem_usage: as in PEFT; an adapter is read once in any case.
            key_mapping: pattern -> replacement for keys of the file, without their prefix.
            kwargs: revision, subfolder, token, cache_dir, local_files_only; PEFT's options for devices, which have no
                effect: an adapter is put where its layers are.

        Raises:
            CheckpointError: the files are damaged or unsafe, or do not fit.

        """
        refuse_offload(ephemeral_gpu_offload)
        file = opened(model_id, config, key_mapping, kwargs)
        known = PeftConfig.from_peft_type(**_file_values(file)) if config is None else config
        known.inference_mode = not is_trainable
        tuner = tuner_of(known).empty(model)
        tuner.take_file(file, adapter_name, known, is_trainable)
        tuner._activate((adapter_name,), train=is_trainable)
        made = model_class(known, cls).around(tuner)
        if not autocast_adapter_dtype:
            made._in_base_dtype(adapter_name)
        return made

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> LoadResult:
        """Load an adapter beside those there; not active until :meth:`set_adapter`.

        With the name of an adapter that is there, its numbers are replaced by those of the file; its own options stay,
        and those of the file have to mean the same. The model is put into eval mode where ``is_trainable`` is False.

        Raises:
            CheckpointError: the files are damaged or unsafe, or do not fit.

        """
        refuse_offload(ephemeral_gpu_offload)
        file = opened(model_id, kwargs.pop("config", None), key_mapping, kwargs)
        if adapter_name in self.peft_config:
            result = LoadResult(*replace_numbers(self, file, adapter_name))
            self.train(self.training and is_trainable)
            return result
        known = PeftConfig.from_peft_type(**_file_values(file))
        known.inference_mode = not is_trainable
        self.base_model.take_file(file, adapter_name, known, is_trainable)
        if not autocast_adapter_dtype:
            self._in_base_dtype(adapter_name)
        self.train(self.training and is_trainable)
        return LoadResult([], [])

    # -- looking ---------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configurations of all adapters, by name."""
        return self.base_model.peft_config

    @property
    def peft_type(self) -> str:
        """The first adapter's method."""
        return str(next(iter(self.peft_config.values())).peft_type)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or a list of names where it is not exactly one."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_peft_config(self) -> PeftConfig:
        """The configuration of the first active adapter."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter runs."""
        return self.base_model.enabled and bool(self.active_adapters)

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names of the modules that adapters train whole; None where there are none."""
        found = {
            name for config in self.peft_config.values() for name in getattr(config, "modules_to_save", None) or ()
        }
        return found or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base's dtype, where it says one."""
        return getattr(self.get_base_model(), "dtype", None)

    def get_base_model(self) -> nn.Module:
        """The base, with the adapted layers in it."""
        return self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters."""
        return self.base_model.get_nb_trainable_parameters()

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained."""
        self.base_model.print_trainable_parameters()

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """What adapters each adapted layer has, and how they are."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The same of the whole model."""
        return get_model_status(self)

    def supports_lora_conversion(self, adapter_name: str = DEFAULT) -> bool:
        """Whether a LoRA can stand for the adapter; see :func:`kilotune.peft.convert_to_lora`."""
        return self.base_model.supports_lora_conversion(adapter_name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            if name not in ASKED_BY_TRAINERS:
                return getattr(self.base_model, name)
        if not in_place.installed():
            raise ConfigError(
                "a Trainer takes this for a plain model, of which it saves the whole base: call "
                "kilotune.peft.install() before transformers is imported, or use kilotune.train.for_trainer() with "
                "kilotune.get_peft_model()"
            )
        return getattr(self.get_base_model(), name)

    # -- running ---------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward, with the active adapters; ``adapter_names``: one for each row of the batch."""
        if kwargs.pop("task_ids", None) is not None:
            raise ConfigError("task_ids: for adapters that train prompts, which are not here")
        if (names := kwargs.get("adapter_names")) is not None and self.training:
            raise ConfigError(f"adapter_names={list(names)!r:.200}: for a model in eval mode; call eval() first")
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's ``generate``, with the active adapters; ``adapter_names``: one for each row of the batch."""
        return self.base_model.generate(*args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside this context the base runs alone."""
        with self.base_model.disable_adapter():
            yield

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Let a base's inputs have gradients, which gradient checkpointing with ``use_reentrant=True`` needs."""
        if not any(getattr(model, name, False) for name in QUANTISED):
            let_inputs_have_gradients(model)
        return model

    # -- adapters --------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter beside those there, of any method; not active until :meth:`set_adapter`."""
        self.base_model.inject(adapter_name, peft_config, low_cpu_mem_usage)
        if not autocast_adapter_dtype:
            self._in_base_dtype(adapter_name)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several at once, the active ones."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        self.base_model.delete_adapter(adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train, or freeze them, whether they are active or not."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def _in_base_dtype(self, adapter_name: str) -> None:
        installed = self.base_model.installed(adapter_name)
        for name, slot in installed.slots().items():
            dtype = installed.layers[name].compute_dtype()
            for parameter in slot.values().values():
                parameter.data = parameter.data.to(dtype)
        for parameter in installed.shared.trained.values():
            parameter.data = parameter.data.to(dtype)

    # -- files -----------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write adapters in PEFT's layout: 'default' into the folder itself, others into subfolders.

        Args:
            save_directory: the folder; made where it is not there.
            safe_serialization: only True: kilotune writes no pickles.
            selected_adapters: which ones; all by default.
            save_embedding_layers: "auto" and False: an embedding's base weight is not written. True is refused:
                name the embedding in modules_to_save.
            is_main_process: False writes nothing.
            path_initial_model_for_weight_conversion: anything: write adapters that start with a part of the base
                (PiSSA, OLoRA) as plain LoRA of twice the rank; where they began is known without what is there.
            state_dict: the model's state in place of its own, as where it was gathered.

        Raises:
            ConfigError: an option that is not here.

        """
        check_safe(safe_serialization)
        refuse_embedding_layers(save_embedding_layers)
        names = list(self.peft_config) if selected_adapters is None else self.base_model._named(selected_adapters)
        root = Path(save_directory)
        places = folders(root, {name: self.base_model.installed(name) for name in names})
        plain = path_initial_model_for_weight_conversion is not None
        if plain and (
            others := [name for name in names if self.base_model.installed(name).config.part_of_base is None]
        ):
            raise ConfigError(f"path_initial_model_for_weight_conversion: {others} start with no part of the base")
        for folder, installed in places.items():
            if plain:
                made = to_lora(self.base_model, installed.adapter)
                if is_main_process:
                    made.save(folder)
            else:
                save_adapter(self, installed.adapter, folder, state_dict, is_main_process)
            if is_main_process:
                write_auto_mapping(folder, self.get_base_model())
        if is_main_process:
            write_card(self, root)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write the model card, README.md; one that is there keeps its text and gets what it lacks."""
        write_card(self, Path(output_dir))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Save into a temporary folder and upload that; ``kwargs``: private, token, revision, commit_message."""
        return push_to_hub(self, repo_id, **kwargs)


def opened(
    model_id: str | os.PathLike[str],
    config: PeftConfig | None,
    key_mapping: Mapping[str, str] | None,
    options: Mapping[str, Any],
) -> AdapterFile:
    """An adapter's files, with another configuration or other keys where that is asked for."""
    if unknown := [key for key in options if key not in (*HUB, *ACCEPTED)]:
        raise TypeError(f"unexpected options: {', '.join(unknown)}; known: {', '.join((*HUB, *ACCEPTED))}")
    if options.get("use_safetensors") is False:
        raise ConfigError("use_safetensors=False: pickles are not read, which can run any code")
    files = read_files(locate(model_id, **{key: options[key] for key in HUB if key in options}))
    file = _parsed(files)
    if config is None and not key_mapping:
        return file
    said, header = dict(file.files.config), dict(file.metadata)
    if config is not None:
        check_config(config)
        said.pop("layer_replication", None)  # the configuration's own counts
        said.update(config.translated().to_dict())
        header.pop("kilotune_config_sha256", None)
    tensors = renamed(file.files.tensors, key_mapping)
    return _parsed(replace(file.files, config=said, tensors=tensors, header=header))


def _parsed(files: TwoFiles) -> AdapterFile:
    """What files hold; ``layer_replication`` is of the base that they are for, and stays in what they say."""
    config = {key: value for key, value in files.config.items() if key != "layer_replication"}
    return replace(parse(replace(files, config=config)), files=files)


def _file_values(file: AdapterFile) -> dict[str, Any]:
    return dict(file.files.config)


@final
class PeftModelForCausalLM(PeftModel):
    """For a language model."""

    task: ClassVar[str | None] = "CAUSAL_LM"


@final
class PeftModelForSeq2SeqLM(PeftModel):
    """For a model of an encoder and a decoder."""

    task: ClassVar[str | None] = "SEQ_2_SEQ_LM"


@final
class PeftModelForSequenceClassification(PeftModel):
    """For a classifier of texts, whose head is trained as well."""

    task: ClassVar[str | None] = "SEQ_CLS"


@final
class PeftModelForTokenClassification(PeftModel):
    """For a classifier of tokens, whose head is trained as well."""

    task: ClassVar[str | None] = "TOKEN_CLS"


@final
class PeftModelForQuestionAnswering(PeftModel):
    """For a model that finds answers in a text, whose head is trained as well."""

    task: ClassVar[str | None] = "QUESTION_ANS"


@final
class PeftModelForFeatureExtraction(PeftModel):
    """For a model that gives vectors."""

    task: ClassVar[str | None] = "FEATURE_EXTRACTION"


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: Mapping[str, type[PeftModel]] = {
    str(cls.task): cls
    for cls in (
        PeftModelForSequenceClassification,
        PeftModelForSeq2SeqLM,
        PeftModelForCausalLM,
        PeftModelForTokenClassification,
        PeftModelForQuestionAnswering,
        PeftModelForFeatureExtraction,
    )
}


def model_class(config: PeftConfig, otherwise: type[PeftModel]) -> type[PeftModel]:
    """The class for a configuration's task, or ``otherwise`` where it says none."""
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(config.task_type), otherwise)
