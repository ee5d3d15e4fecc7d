"""AdapterModel: a base model with adapters in it, and all that one does with it. The vocabulary is PEFT's."""

from __future__ import annotations

import os
from abc import ABC
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from .. import storage
from ..adapter_files import writing
from ..adapter_files.fitting import check_base, match_tensors
from ..adapter_files.names import check_adapter_name
from ..adapter_files.peft_layout import BASE
from ..adapter_files.reading import AdapterFile, open_adapter
from ..adapter_files.stands_on import StandsOn
from ..adapter_files.writing import DEFAULT
from ..added_modules import Added, base_modules
from ..config import AdapterConfig
from ..errors import AdapterError, ConfigError, MergeError, UnsupportedError, type_name
from ..injection import inject
from ..injection.installed_adapter import Installed
from ..injection.tree import layer_around, own_modules
from ..kernels.ways import Way
from ..layers.active_adapters import ActiveState
from ..layers.adapted import AdaptedLayer
from ..layers.slot import slot_key
from ..projections.matrices import Projections
from . import base_overrides, merged_state, merging
from .active_model import ActiveModel
from .adapter_configs import Configs
from .merging import MergeReport
from .parameter_report import ParameterReport, count_parameters
from .routed_model import Source, check_rows, generate
from .unreduced import came_after_shards, check_reduced
from .unused_layers import unwatch

__all__ = ["DEFAULT", "AdapterModel"]

# What transformers' Trainer, and TRL's, ask of a model when they are made (the second before that, where the base is
# quantised). No properties: torch.jit.trace asks for all of a class's.
ASKED_BY_TRAINERS = ("is_distributed_loading_by_transformers", "_hf_peft_config_loaded")


class AdapterModel(ActiveModel, ABC):
    """A base model with adapters in it. The base model is changed in place, and its weights are frozen.

    Args:
        model: any ``nn.Module``.
        config: what to adapt and how.
        adapter_name: the first adapter's name; it is active at once.

    Every attribute of the base model is passed through. ``model`` is the base model itself.

    """

    configs: ClassVar[tuple[type[AdapterConfig], ...]] = (AdapterConfig,)

    def __init__(self, model: nn.Module, config: AdapterConfig, adapter_name: str = DEFAULT) -> None:
        super().__init__()
        self._take(model)
        self.add_adapter(adapter_name, config)
        self._activate((adapter_name,), train=not config.inference_mode)

    def _take(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"expected a torch.nn.Module as the base model, got {type_name(model)}")
        inject.check_base(model)
        self.model = model
        self.projections = Projections()
        self.shared_parameters = Added()
        self._state = ActiveState()
        self._installed: dict[str, Installed] = {}
        self._sources: list[Source] = []
        self._perhaps_trained: set[str] = set()  # no other adapter's parameters have gradients
        self._unreduced = False
        # With the names of tied weights, which merging for good takes apart.
        everything = model.named_parameters(remove_duplicate=False)
        self._was_trainable = {name for name, p in everything if p.requires_grad}
        self.merge_report = MergeReport({})
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward, with the active adapters; ``adapter_names``: as in :meth:`route`, for this call."""
        if self._unreduced and self.training and torch.is_grad_enabled():
            check_reduced(self)
            self._unreduced = False
        if (names := kwargs.pop("adapter_names", None)) is None:
            self._state.now()  # noted before any checkpoint begins
            return self.model(*args, **kwargs)
        check_rows(names, args, kwargs)
        with self.route(names):
            return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "_installed", "_state"):
                raise
            if name in ASKED_BY_TRAINERS:
                raise ConfigError(
                    "a Trainer takes kilotune.train.for_trainer(model), not the model of get_peft_model() itself: of "
                    "that it would save the whole base and no adapter, and its fused head would not find the layers"
                ) from None
            found = getattr(self.model, name)
            return partial(generate, self, found) if name == "generate" else found

    # -- looking ---------------------------------------------------------------------------------

    @property
    def base_model(self) -> AdapterModel:
        """PEFT keeps a second object here; in kilotune one serves, so ``x.base_model.model`` is the base."""
        return self

    def get_base_model(self) -> nn.Module:
        """The base model (with its adapted layers in it)."""
        return self.model

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        """The configurations of all adapters, by name, with targets and heads filled in; for reading."""
        return Configs({name: installed.config for name, installed in self._installed.items()})

    def installed(self, adapter_name: str) -> Installed:
        """One adapter's parts: its config, method, layers and modules saved whole; AdapterError if it is not there."""
        return self._installed[self._known(adapter_name)]

    def adapted_layers(self) -> dict[str, AdaptedLayer]:
        """All adapted layers by their dotted name in the base model."""
        around = ((name, layer_around(module)) for name, module, _ in inject.walk(self.model))
        return {name: layer for name, layer in around if layer is not None}

    def adapter_parameters(self, adapter_name: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """(``<layer>.<parameter>``, parameter) of one adapter; of the active one when no name is given."""
        for name in (self._known(adapter_name),) if adapter_name is not None else self._state.active:
            yield from self._installed[name].parameters()

    def report(self) -> ParameterReport:
        """Counts and bytes by memory location."""
        return count_parameters(self)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters, as PEFT counts: without the shared projections, which :meth:`report` has."""
        report = self.report()
        return report.trainable, report.total - report.frozen_shared

    def print_trainable_parameters(self) -> None:
        """Print PEFT's line, and the shared projections beside it."""
        print(self.report().line())

    # -- adapters --------------------------------------------------------------------------------

    def add_adapter(self, adapter_name: str, peft_config: AdapterConfig) -> None:
        """Add an adapter beside those there; it is not active until :meth:`set_adapter`.

        Rank, seed, targets and method may differ from those of the others.

        Raises:
            AdapterError: the name is taken or invalid. TargetError, ConfigError, UnsupportedError: see ``inject.plan``.

        """
        self._check_new_name(adapter_name)
        if not isinstance(peft_config, self.configs):
            wanted = " or ".join(c.__name__ for c in self.configs)
            raise ConfigError(f"{type(self).__name__}: expected a {wanted}, got {type_name(peft_config)}")
        self._install(inject.plan(self.model, adapter_name, inject.with_base_name(self.model, peft_config)), None)

    def _install(self, made: inject.Plan, tensors: dict[str, torch.Tensor] | None) -> None:
        storage.prepare(own_modules(self.model))  # first: where its warnings are errors, nothing is installed yet
        installed = inject.apply(self.model, made, self._state, self.projections, tensors)
        if not self._installed:
            installed.freeze_others(self.model)  # later adapters leave what a user has unfrozen since as it is
            merged_state.watch_state_dicts(self.model)
        self._installed[made.adapter] = installed
        if installed.shared.trained:
            held = nn.ParameterDict(installed.shared.trained)
            installed.shared.trained = self.shared_parameters[slot_key(made.adapter)] = held
        merged_state.watch_tables(self.model)
        self._unreduced = self._unreduced or came_after_shards(self.model)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str] | AdapterFile,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        strict_base: bool = False,
    ) -> None:
        """Load an adapter that kilotune or PEFT wrote, from a folder or a hub id; not active until set.

        With ``is_trainable`` its parameters have gradients at once, as in PEFT, until another adapter is set.
        What was read already will do too: ``store.get("ann").file()`` of an adapter store.
        Everything is checked before the model is touched. A base with other weights than those that the adapter was
        trained on is told by an :class:`OtherBaseWarning`, as far as the file says which they were (one of ours does),
        the base is here (not on meta, not sharded), and both are not quantised; where one is, only by and large.

        Args:
            model_id, revision, subfolder, token, cache_dir, local_files_only: the folder, or where on the hub it is.
            adapter_name: what to call it here.
            is_trainable: False: its parameters are frozen, and the model is put into eval mode.
            strict_base: refuse a base with other weights.

        Raises:
            CheckpointError: the files are damaged or unsafe, or do not fit the model (all misfits listed), or its base
                (``strict_base``). UnsupportedError: ``is_trainable``, and it cannot be trained on.

        """
        self._check_new_name(adapter_name)
        file = open_adapter(model_id, revision, subfolder, token, cache_dir, local_files_only)
        if not isinstance(file.config, self.configs):
            raise ConfigError(
                f"{type(self).__name__} cannot load a {type(file.config).__name__} adapter; use PeftModel"
            )
        if is_trainable and (why := file.method.untrainable) is not None:
            raise UnsupportedError(f"is_trainable: the adapter in {file.folder} cannot be trained on: {why}")
        config = file.config.replace(inference_mode=not is_trainable)
        made = inject.plan(self.model, adapter_name, config, file.method, strict=False)
        tensors = match_tensors(file, made, type(self.model).__name__)
        check_base(file, made, inject.base_name(self.model) or type(self.model).__name__, strict_base)
        if made.base is None:  # as when only shapes are here: what is written from there is still of the file's base
            made.base = file.metadata.get(BASE)
        stands = StandsOn.of_header(file.metadata)
        self._install(made, tensors)
        self._installed[adapter_name].marks = {} if stands is None else stands.header()
        if is_trainable:
            self._perhaps_trained.add(adapter_name)
            for _, parameter in self._installed[adapter_name].parameters():
                parameter.requires_grad_(True)
        elif any(module.training for module in base_modules(self)):
            self.eval()  # reaches every adapter, so only where it changes something

    def set_way(self, way: str) -> None:
        """Say how layers with low-rank adapters run; for tests and experts, since 'picked' is the default.

        Args:
            way: 'picked' (the cost model of docs/performance.md), 'factored', 'merged' or 'dense'. The last two are for
                linear layers that are nothing but their product, and in 16 bits for steps in which the change's
                measured rounding error is small; everything else runs factored.

        Raises:
            ConfigError: another way.

        """
        self._state.way = Way.of(way)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the only active one, the adapter added first of those left becomes
        active; with none left, the base model alone runs.

        Raises:
            AdapterError: no such adapter. MergeError: it is merged.

        """
        name = self._known(adapter_name)
        self._state.refuse_in_route(f"delete adapter {name!r}", name)
        if name in self._state.merged:
            raise MergeError(f"adapter {name!r} is merged into the weights; call unmerge_adapter() before deleting it")
        trained = self._trained()
        inject.remove(self.model, name, self._installed.pop(name), self.projections)
        merged_state.watch_tables(self.model)
        if (key := slot_key(name)) in self.shared_parameters:
            del self.shared_parameters[key]
        before = self._state.active
        left = tuple(n for n in before if n != name)
        self._state.watched.discard(name)
        alone = bool(before) and not left  # where nothing was active, nothing is
        self._state.change(active=tuple(islice(self._installed, 1)) if alone else left, removed=name)
        if alone:
            self._set_requires_grad(True)
        else:
            self._train([name for name in left if name in trained])

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside this context the model is exactly the base model, merged adapters included.

        It holds for this thread and coroutine, and those that are started in it; others run as before meanwhile. It
        may be nested. A forward that gradient checkpointing runs again runs as it did at first.

        Raises:
            UnsupportedError: from a forward, while adapters are merged into a layer whose forward was replaced.

        """
        with self._state.disabling():
            yield

    # -- merge -----------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Put adapters (the active ones, or those named) into the base weights, until :meth:`unmerge_adapter`.

        Args:
            adapter_names: which ones.
            safe_merge: first compute everything, and refuse, having changed nothing, if a value is not finite.

        Quantised weights are rounded anew in their own scheme meanwhile; ``merge_report`` says what that took.

        Raises:
            MergeError: merged already, not linear, or (safe_merge) not finite.

        """
        names = self.active_adapters if adapter_names is None else self._named(adapter_names)
        again = [name for name in names if name in self.merged_adapters]
        if again or not names:
            what = f"adapters {again} are merged already" if again else "no adapter is active"
            raise MergeError(f"merge_adapter: {what}; call unmerge_adapter() first, or name others")
        self._merge(names, safe_merge, progressbar=False)

    def _merge(self, names: list[str], safe_merge: bool, progressbar: bool, dtype: torch.dtype | None = None) -> None:
        self._check_enabled("merge")
        run = (self.adapted_layers(), self._installed, self._state, names, safe_merge, progressbar)
        self.merge_report = merging.merge(self.model, dtype, *run)
        if self._state.merged:
            merged_state.refuse_tying(self.model, self._state.merged)

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out; the base weights have their very bits again.

        Raises:
            MergeError: nothing is merged.

        """
        self._check_enabled("unmerge")
        if not self.merged_adapters:
            raise MergeError("unmerge_adapter: no adapter is merged")
        self._unmerge()

    def _unmerge(self) -> None:
        for layer in self.adapted_layers().values():
            layer.unmerge()
        self._state.change(merged=())
        merged_state.allow_tying(self.model)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        dtype: torch.dtype | None = None,
        requantize: bool = False,
    ) -> nn.Module:
        """Merge for good, and return the plain base model: no wrapper is left, and this object is spent.

        A weight that was tied to another module's gets a value of its own; the other module keeps the base's, and the
        config of a transformers model has ``tie_word_embeddings=False`` then.
        ``merge_report`` of this object then says what storing the merged weights took, layer by layer.

        Args:
            progressbar, safe_merge, adapter_names: show the progress on stderr, and as in :meth:`merge_adapter`.
            dtype: give a dense model, all of whose floats, quantised layers included, are of this dtype; rounded once.
            requantize: round the merged weights of quantised layers anew, in the scheme that they had.

        Raises:
            MergeError: as in :meth:`merge_adapter`, or a quantised base and neither ``dtype`` nor ``requantize``.

        """
        names = self.active_adapters if adapter_names is None else self._named(adapter_names)
        self._check_enabled("merge")
        merging.check_choice(self.adapted_layers(), names, dtype, requantize)
        if dtype is not None:
            self._merge(names, safe_merge, progressbar, dtype)
            merging.untie(self.model)
            return self._release()
        with merging.all_or_nothing(self.adapted_layers(), self._state):
            self._state.change(active=tuple(names))
            if set(names) != set(self._state.merged):  # exactly these, whatever is merged now
                self._unmerge()
                self._merge(names, safe_merge, progressbar)
        inject.strip(self.model, lambda saved: saved.current())
        merging.untie(self.model)
        return self._release()

    def unload(self) -> nn.Module:
        """Return the base model as it was before the first adapter; this object is spent."""
        self._check_enabled("unload")
        self._unmerge()
        inject.strip(self.model, lambda saved: saved.original_module)
        return self._release()

    def _release(self) -> nn.Module:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self._was_trainable)
        self._installed = {}
        self._state.change(active=(), merged=())
        self.shared_parameters = Added()
        for owner in list(self.projections.owners()):
            self.projections.release(owner)
        storage.release(own_modules(self.model))
        base_overrides.remove_overrides(self.model)
        unwatch(self.model)
        return self.model

    # -- files -----------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        is_main_process: bool = True,
    ) -> None:
        """Write adapters in PEFT's layout: 'default' into the folder itself, others into subfolders.

        Args:
            save_directory: the folder; made where it is not there.
            safe_serialization: as in PEFT; only True, because kilotune writes no pickles.
            selected_adapters: which ones; all by default.
            is_main_process: False writes nothing. Where an adapter is sharded, all processes have to call this.

        """
        writing.check_safe(safe_serialization)
        names = list(self._installed) if selected_adapters is None else self._named(selected_adapters)
        chosen = {name: self._installed[name] for name in names}
        writing.save(writing.folders(Path(save_directory), chosen), is_main_process)

    # -- checks ----------------------------------------------------------------------------------

    def _check_new_name(self, name: str) -> None:
        check_adapter_name(name)
        if name in self._installed:
            raise AdapterError(f"the adapter name {name!r} is taken; delete_adapter({name!r}) first, or take another")

    def _check_enabled(self, purpose: str) -> None:
        self._state.refuse_where_disabled(purpose)
        self._state.refuse_in_route(purpose)
