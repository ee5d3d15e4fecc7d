"""The base of a joint training: put into the state in which it runs, and back; adapters out of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ...adapter_files.writing import state_of
from ...config import AdapterConfig
from ...errors import ConfigError, type_name
from ...model.adapter_model import AdapterModel
from ..bank.adapter_bank import free_key
from ..bank.forms import ResidentForm
from ..store import Contents, Fingerprint, StandsOn
from .wrapping import wrap

__all__ = ["contents_of", "form_in", "prepared"]


@contextmanager
def prepared(model: nn.Module, on: object = None) -> Iterator[AdapterModel]:
    """``model`` frozen, in eval mode and without a cache of keys and values; afterwards it is what it was.

    on: what users' adapters are to stand on; where that is the name of an adapter, it alone may be active.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: expected a torch.nn.Module, got {type_name(model)}")
    if isinstance(model, AdapterModel):
        _check_runs_as(model, on)
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


def _check_runs_as(model: AdapterModel, on: object) -> None:
    """Refuse a model that runs as something else than what the users' adapters are trained on."""
    model._check_enabled("train users' adapters")
    active = [name for name in model.active_adapters if name not in model.merged_adapters and name != on]
    if active:
        where = "the base without them" if on is None else f"{on!r} without them"
        raise ConfigError(
            f"model: the adapters {active} are active, and users' adapters are trained on {where}. To train on top of "
            f"one of them, name it: on={active[0]!r}; else call set_adapter([])"
        )


def form_in(model: AdapterModel, config: AdapterConfig, held: ExitStack) -> ResidentForm:
    """The form of the adapters, in the model until ``held`` is left."""
    form = ResidentForm(model, config, free_key(model))
    held.callback(form.release)
    return form


def contents_of(form: ResidentForm, row: Tensor, base: Fingerprint, on: StandsOn | None = None) -> Contents:
    """A row (length,) as the adapter that ``save_pretrained`` would write; its header says what it stands on."""
    places = form.all_places()
    parts = torch.split(row.detach().cpu().clone(), [place.end - place.begin for place in places])
    values: dict[str, dict[str, Tensor]] = {layer: {} for layer in form.places}
    for place, part in zip(places, parts, strict=True):
        values[place.layer][place.key] = part if len(place.shape) == 1 else part.view(place.shape)
    config, tensors, header = state_of(form.installed, values)
    return Contents(config, tensors, header if on is None else {**header, **on.header()}, base)
