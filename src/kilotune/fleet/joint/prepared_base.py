"""The base of a joint training: put into the state in which it runs, and back; adapters out of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from ...adapter_files.writing import state_of
from ...config import AdapterConfig
from ...errors import ConfigError, type_name
from ...model.adapter_model import AdapterModel
from ..bank.adapter_bank import free_key
from ..bank.forms import ResidentForm
from ..store import Contents, Fingerprint
from .wrapping import wrap

__all__ = ["contents_of", "form_in", "prepared"]


@contextmanager
def prepared(model: nn.Module) -> Iterator[AdapterModel]:
    """``model`` frozen, in eval mode and without a cache of keys and values; afterwards it is what it was."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: expected a torch.nn.Module, got {type_name(model)}")
    if isinstance(model, AdapterModel):
        _check_runs_as_base(model)
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    config = getattr(model, "config", None)
    caches = getattr(config, "use_cache", None)
    adapted = model if isinstance(model, AdapterModel) else wrap(model)
    try:
        adapted.eval()
        if config is not None and caches is not None:
            config.use_cache = False
        yield adapted
    finally:
        if adapted is not model:
            adapted.unload()
        if config is not None and caches is not None:
            config.use_cache = caches
        for module, mode in modes.items():
            module.training = mode
        for parameter, requires in wanted.items():
            parameter.requires_grad_(requires)


def _check_runs_as_base(model: AdapterModel) -> None:
    """Refuse a model that runs as something else than what the users' adapters are trained on."""
    model._check_enabled("train users' adapters")
    on = [name for name in model.active_adapters if name not in model.merged_adapters]
    if on:
        raise ConfigError(
            f"model: the adapters {on} are active, and users' adapters are trained on the base without them. To train "
            "on top of them, give merge_and_unload(), and serve over that base; on the base alone, call set_adapter([])"
        )


def form_in(model: AdapterModel, config: AdapterConfig, held: ExitStack) -> ResidentForm:
    """The form of the adapters, in the model until ``held`` is left."""
    form = ResidentForm(model, config, free_key(model))
    held.callback(form.release)
    return form


def contents_of(form: ResidentForm, row: Tensor, base: Fingerprint) -> Contents:
    """A row (length,) as the adapter that ``save_pretrained`` would write."""
    apart = {
        layer: [(place.key, place.of(row.unsqueeze(0))[0]) for place in form.places[layer]] for layer in form.slots
    }
    try:
        for layer, values in apart.items():
            for key, value in values:
                form.slots[layer].register_parameter(key, nn.Parameter(value, requires_grad=False))
        config, tensors, header = state_of(form.installed)
    finally:
        for slot in form.slots.values():
            slot._parameters.clear()
    return Contents(config, tensors, header, base)
