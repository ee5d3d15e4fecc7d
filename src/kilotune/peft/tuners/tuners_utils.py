"""PEFT's BaseTuner, our model with adapters in it under PEFT's names, and BaseTunerLayer, one of its layers."""

from __future__ import annotations

import warnings
from abc import ABC, ABCMeta
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar, final

import torch
from torch import nn

from ...adapter_files.reading import AdapterFile
from ...candidates import inside, matches_names
from ...errors import AdapterError, MergeError, did_you_mean
from ...injection import inject
from ...injection.targets import in_layers
from ...injection.tree import every_wrapper
from ...layers.adapted import AdaptedLayer
from ...layers.outside import Outside, Shown
from ...layers.saved_module import SavedModule
from ...model.adapter_model import DEFAULT, AdapterModel
from ..config import PeftConfig, check_config
from ..inspecting import all_linear as _maybe_include_all_linear_layers
from ..inspecting import keys_under as _filter_state_dict_by_key_prefixes
from ..inspecting import matched_modules as inspect_matched_modules
from ..inspecting import state_prefixes as _get_tuner_state_dict_key_prefixes
from ..inspecting import tied_to_embedding
from ..layer_shape import LAYER, SAVED, TUNER, adapters_in, becomes_lora
from ..on_off import active, is_off, switch
from ..replication import replicate
from ..targets import minimal as _find_minimal_target_modules
from ..targets import settled, settled_file
from ..utils.warning import PeftWarning

__all__ = [
    "BaseTuner",
    "BaseTunerLayer",
    "_filter_state_dict_by_key_prefixes",
    "_find_minimal_target_modules",
    "_get_tuner_state_dict_key_prefixes",
    "_maybe_include_all_linear_layers",
    "check_target_module_exists",
    "inspect_matched_modules",
]

CHOSEN = ("target_modules", "modules_to_save", "feedforward_modules")  # what a model fills in


class BaseTuner(Shown, AdapterModel, ABC):
    """What PEFT keeps in ``model.base_model``: the base in ``.model``, and the adapters in it.

    Args:
        model: any module.
        peft_config: of the first adapter, or of several by name.
        adapter_name: the first adapter's.
        low_cpu_mem_usage: on the meta device, without numbers, until the adapter is loaded.

    """

    outside: Outside | None = TUNER
    prefix: ClassVar[str]  # what the names of a method's tensors begin with
    uses_shared_state: ClassVar[bool] = False  # whether layers need more than themselves: none here do

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str = DEFAULT,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self._configs: dict[str, PeftConfig] = {}
        self._own_weights: dict[str, list[str]] = {}
        self._take(model)
        given = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        for name, config in given.items():
            self.inject(name, config, low_cpu_mem_usage)
        self._activate((adapter_name,), train=not given[adapter_name].inference_mode)

    @classmethod
    def empty(cls, model: nn.Module) -> BaseTuner:
        """A model without adapters so far."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._configs, made._own_weights = {}, {}
        made._take(model)
        return made

    # -- adapters --------------------------------------------------------------------------------

    def inject(self, adapter_name: str, peft_config: PeftConfig, low_cpu_mem_usage: bool = False) -> None:
        """Add an adapter; not active until it is set. low_cpu_mem_usage: without numbers, until it is loaded."""
        check_config(peft_config)
        if adapter_name in self._installed:
            raise AdapterError(
                f"an adapter {adapter_name!r} is in the model; delete_adapter() first, or take another name"
            )
        self._check_new_name(adapter_name)
        config, weights = settled(self.model, inject.with_base_name(self.model, peft_config.translated()))
        with self._replicated(peft_config):
            self._install(inject.plan(self.model, adapter_name, config), None)
        self._note(adapter_name, peft_config, weights)
        for slot in self._installed[adapter_name].slots().values() if low_cpu_mem_usage else ():
            slot.to("meta")

    def take_file(self, file: AdapterFile, adapter_name: str, peft_config: PeftConfig, is_trainable: bool) -> None:
        """Add an adapter that was read."""
        file, weights = settled_file(self.model, file)
        with self._replicated(peft_config):
            AdapterModel.load_adapter(self, file, adapter_name, is_trainable)
        self._note(adapter_name, peft_config, weights)

    @contextmanager
    def _replicated(self, peft_config: PeftConfig) -> Iterator[None]:
        """Blocks as ``layer_replication`` asks for them; as they were, where the adapter cannot be added."""
        ranges = getattr(peft_config, "layer_replication", None)
        done = replicate(self.model, ranges, bool(self._installed)) if ranges else None
        try:
            yield
        except BaseException:
            if done is not None:
                done.undo()
            raise

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig) -> None:  # type: ignore[override]
        """Add an adapter; not active until it is set."""
        self.inject(adapter_name, peft_config)

    def load_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the model around this one loads adapters."""
        raise AdapterError("load_adapter() is of the PeftModel around this, or of kilotune.PeftModel")

    def _note(self, adapter_name: str, peft_config: PeftConfig, weights: Sequence[str] = ()) -> None:
        """Keep the configuration as PEFT has it, filled in, and show new wrappers under PEFT's names.

        weights: layers' own weights, which stand in ``target_parameters`` and are not among the targets that are shown.
        """
        found = self._installed[adapter_name].config
        changes: dict[str, Any] = {"base_model_name_or_path": found.base_model_name_or_path}
        self._own_weights[adapter_name] = list(weights)
        for name in CHOSEN[1:] if weights else CHOSEN:
            if (value := getattr(found, name, None)) is not None and name in peft_config.known():
                changes[name] = value if isinstance(value, str) else set(value)
                changes[name] = list(value) if name == "modules_to_save" else changes[name]
        for name, value in changes.items():  # as in PEFT, the one that was given is filled in
            setattr(peft_config, name, value)
        self._configs[adapter_name] = peft_config
        for wrapper in every_wrapper(self.model):
            if isinstance(wrapper, AdaptedLayer):
                wrapper.outside = LAYER
            elif isinstance(wrapper, SavedModule):
                wrapper.outside = SAVED

    @property
    def peft_config(self) -> dict[str, PeftConfig]:  # type: ignore[override]
        """The configurations of all adapters, by name, with targets and heads filled in."""
        return self._configs

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. Where it was the only active one, the first of the others by name is so now, with a
        warning; see :meth:`kilotune.PeftModel.delete_adapter`."""
        if self._known(adapter_name) in self.merged_adapters:
            raise MergeError(
                f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. Please unmerge them first."
            )
        alone = self.active_adapters == [adapter_name]
        self._remove(adapter_name)
        if not alone or not self._installed:
            return
        if not self.merged_adapters:
            self._activate((min(self._installed),), train=True)
        warnings.warn(
            f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to "
            f"{', '.join(self.active_adapters)}.",
            PeftWarning,
            stacklevel=3,
        )

    def _remove(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._own_weights.pop(adapter_name, None)
        self._configs.pop(adapter_name, None)  # one that a conversion puts beside others has none
        if (off := self._state.switched_off) is not None:
            left = tuple(name for name in off if name != adapter_name)
            self._state.switched_off = left or tuple(self._installed)[:1]

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several at once, the active ones. Merged ones are taken out first, as in PEFT; where all
        are switched off they stay so until :meth:`enable_adapter_layers`."""
        names = self._named(adapter_name)
        self._perhaps_trained.update(self._installed)  # a layer's own set_adapter() is not seen here
        if self.merged_adapters:
            warnings.warn("adapters are merged: they are taken out before others are set", PeftWarning, stacklevel=2)
            self.unmerge_adapter()
        super().set_adapter(names, inference_mode)

    def _activate(self, names: tuple[str, ...], train: bool) -> None:
        on = self._state.switched_off is None
        switch(self._state, on=True)
        try:
            super()._activate(names, train)
        finally:
            switch(self._state, on)

    # -- on and off ------------------------------------------------------------------------------

    def disable_adapter_layers(self) -> None:
        """The base runs alone until :meth:`enable_adapter_layers`; merged adapters are taken out first."""
        if self.merged_adapters:
            warnings.warn("adapters are merged: they are taken out before all are disabled", PeftWarning, stacklevel=2)
            self.unmerge_adapter()
        switch(self._state, on=False)

    def enable_adapter_layers(self) -> None:
        """What was active before :meth:`disable_adapter_layers` is so again."""
        switch(self._state, on=True)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, whether they are disabled or not."""
        return active(self._state)

    @property
    def enabled(self) -> bool:
        """Whether adapters run, here and now."""
        return not is_off(self._state)

    def _known(self, name: str) -> str:
        if not isinstance(name, str) or name not in self._installed:
            there = ", ".join(map(repr, self._installed)) or "none"
            raise AdapterError(
                f"Adapter {name} does not exist.{did_you_mean(str(name), self._installed)} There: {there}"
            )
        return name

    # -- merging ---------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Put adapters into the weights; those that are there already are passed over; a warning where all are."""
        names = self.active_adapters if adapter_names is None else self._named(adapter_names)
        again = [name for name in names if name in self.merged_adapters]
        if new := [name for name in names if name not in again]:
            with _pefts_words(new):
                super().merge_adapter(new, safe_merge)
        else:
            warnings.warn("All adapters are already merged, nothing to do", PeftWarning, stacklevel=2)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        dtype: torch.dtype | None = None,
        requantize: bool = False,
    ) -> nn.Module:
        """Merge for good; see :meth:`kilotune.PeftModel.merge_and_unload`."""
        with _pefts_words(self.active_adapters if adapter_names is None else adapter_names):
            return super().merge_and_unload(progressbar, safe_merge, adapter_names, dtype=dtype, requantize=requantize)

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out; where none are merged, a warning says so."""
        if not self.merged_adapters:
            warnings.warn("no adapter is merged; there is nothing to take out", PeftWarning, stacklevel=2)
            return
        super().unmerge_adapter()

    def supports_lora_conversion(self, adapter_name: str = DEFAULT) -> bool:
        """Whether a LoRA can stand for an adapter: it adds to weights, each of which is one matrix."""
        installed = self.installed(adapter_name)
        return all(becomes_lora(installed.layers[name], slot) for name, slot in installed.slots().items())

    # -- other names -----------------------------------------------------------------------------

    def model_wide(self, key: str) -> nn.ParameterDict:
        """A trained vector of a whole model by adapter, such as ``unilora_theta_d``."""
        found = nn.ParameterDict()
        for name, installed in self._installed.items():
            if key in installed.shared.trained:
                found.register_parameter(name, installed.shared.trained[key])
                found._keys[name] = None
        return found

    @property
    def targeted_module_names(self) -> list[str]:
        """The names of the adapted layers."""
        found = (name for installed in self._installed.values() for name in installed.slots())
        weights = self.targeted_parameter_names
        return [name for name in dict.fromkeys(found) if name not in weights and f"{name}.weight" not in weights]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The names of the parameters that ``target_parameters`` took."""
        found: dict[str, None] = {}
        for adapter, installed in self._installed.items():
            experts = [name for name in installed.slots() if installed.layers[name].kind.parameter is not None]
            found.update(dict.fromkeys([*self._own_weights.get(adapter, ()), *experts]))
        return list(found)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        return tied_to_embedding(self)

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The base's configuration as a dictionary; that of a plain module says that it is custom."""
        config: Any = getattr(model, "config", {"model_type": "custom"})
        if is_dataclass(config) and not isinstance(config, type):
            return asdict(config)
        return dict(config) if isinstance(config, dict) else dict(config.to_dict())

    def _release(self) -> nn.Module:
        self._configs, self._own_weights = {}, {}
        return super()._release()


@contextmanager
def _pefts_words(names: Sequence[str]) -> Iterator[None]:
    """Say of values that are not finite what PEFT's users look for, before what we say."""
    try:
        yield
    except MergeError as error:
        if "not finite" not in str(error):
            raise
        seems = f"The adapter {names[0] if len(names) == 1 else list(names)} seems to be broken"
        raise MergeError(f"NaNs detected in the merged weights. {seems}.\n{error}") from None


def check_target_module_exists(config: PeftConfig, key: str) -> bool:
    """Whether a configuration's targets take a module of this dotted name, as far as names alone say.

    Args:
        config: of the adapter.
        key: the module's name.

    """
    ours = config.translated()
    if matches_names(ours.exclude_modules, key, "exclude_modules") or inside(ours.modules_to_save, key):
        return False
    return bool(ours.target_modules) and matches_names(ours.target_modules, key) and in_layers(key, ours)


@final
class _LayerNames(ABCMeta):
    """Classes of PEFT's layers: which of our wrappers are of them is asked, not inherited."""

    method: str
    bases: tuple[str, ...]
    of_parameters: bool

    def __instancecheck__(cls, instance: object) -> bool:
        if not isinstance(instance, AdaptedLayer):
            return False
        slots = adapters_in(instance).values()
        methods = {slot.method.name for slot in slots if slot.method is not None}
        named = not cls.method or cls.method in methods
        if cls.of_parameters:
            return named and instance.kind.parameter is not None
        return named and (not cls.bases or type(instance.base_layer).__name__ in cls.bases)


class BaseTunerLayer(metaclass=_LayerNames):
    """A layer with adapters: ``isinstance(module, BaseTunerLayer)``. None is made of it."""

    method: ClassVar[str] = ""
    bases: ClassVar[tuple[str, ...]] = ()
    of_parameters: ClassVar[bool] = False  # only what adapts a parameter of a module, such as its experts
