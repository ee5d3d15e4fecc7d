"""The adapters of a model that a Trainer has: what its training changes, and what of that goes into a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ...adapter_files import writing
from ...adapter_files.peft_layout import BOOKKEEPING
from ...errors import CheckpointError, ConfigError, gather
from ...injection.installed_adapter import Installed
from ...model.adapter_model import AdapterModel
from ...model.base_overrides import override
from ...weak import Weak
from ...whole_file import replacing

__all__ = ["OPTIONS", "STATE_NAME", "HandedOver", "Wide"]

STATE_NAME = "model.safetensors"  # where a Trainer looks for what it is to load
OPTIONS = "kilotune.options"  # in that file: the adapters' options as JSON, its bytes as a tensor
HANDED = "_kilotune_handed"


@final
class HandedOver:
    """The adapters of ``model``, and ``root``, which a Trainer has for it.

    It hangs on the root, so it holds neither the root nor the model, which holds the root: they would be freed by the
    garbage collector only.
    """

    def __init__(self, model: AdapterModel, root: nn.Module) -> None:
        self.installed, self.state, self._root = model._installed, model._state, Weak(root)
        self.wide = Wide(root)
        override(root, HANDED, self)

    @staticmethod
    def has(root: nn.Module) -> bool:
        """Whether a model is handed over."""
        return HANDED in root.__dict__

    @staticmethod
    def of(root: nn.Module) -> HandedOver:
        """What hangs on a model that is."""
        handed: HandedOver = root.__dict__[HANDED]
        return handed

    @property
    def root(self) -> nn.Module:
        return self._root()

    def active(self) -> dict[str, Installed]:
        """The active adapters by name."""
        return {name: self.installed[name] for name in self.state.active}

    def save(self, folder: Path, is_main_process: bool = True) -> None:
        """Write all adapters, as the model's own ``save_pretrained`` does."""
        writing.save(writing.folders(folder, self.installed), is_main_process)

    def check_trains(self) -> None:
        """Refuse a forward of training from which no trained parameter would get a gradient.

        Raises:
            ConfigError: says why, and what to do.

        """
        state = self.state
        if state.merged:
            raise ConfigError(
                f"nothing would be trained: adapters {list(state.merged)} are merged into the base; "
                "unmerge_adapter() first"
            )
        if state.now().disabled:
            raise ConfigError("nothing would be trained: the adapters are disabled; train outside disable_adapter()")
        if not any(parameter.requires_grad for parameter in self.root.parameters()):
            names = list(state.active)
            raise ConfigError(
                f"nothing would be trained: the active adapters {names} are for inference; load them with "
                "is_trainable=True, or set_adapter() others"
                if names
                else f"nothing would be trained: no adapter is active; set_adapter() one of {sorted(self.installed)}, "
                "or add one"
            )

    # -- what training changes -----------------------------------------------------------------------

    def trained(self) -> dict[str, Tensor]:
        """What training changes, and what of the active adapters cannot be made again, by its name in the root."""
        root = self.root
        names = {id(tensor): name for name, tensor in root.named_buffers()}
        names.update((id(parameter), name) for name, parameter in root.named_parameters())
        found = [*self._of_adapters(), *(p for p in root.parameters() if p.requires_grad), *_running(root)]
        return {names[id(tensor)]: tensor for tensor in found}

    def _of_adapters(self) -> Iterator[Tensor]:
        for installed in self.active().values():
            for slot in installed.slots().values():
                yield from slot.parameters()
            yield from installed.shared.trained.values()
            for saved in installed.saved.values():
                copy = saved.modules_to_save[installed.key]
                yield from copy.parameters()
                yield from copy.buffers()

    def modules(self) -> list[nn.Module]:
        """The modules that hold the parameters of all adapters."""
        return [module for installed in self.installed.values() for module in installed.modules()]

    def write_state(self, folder: Path) -> None:
        """Write what training changes, which a Trainer resumes from."""
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.trained().items()}
        tensors[OPTIONS] = self.options()
        try:
            with replacing(folder / STATE_NAME) as fresh:
                save_file(tensors, fresh, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
            raise CheckpointError(f"cannot write {folder / STATE_NAME}: {error}") from error

    # -- options -------------------------------------------------------------------------------------

    def options(self) -> Tensor:
        """The options of the active adapters that decide what their tensors mean: JSON, its bytes as a tensor."""
        options = json.dumps(self._options(), sort_keys=True).encode()
        return torch.frombuffer(bytearray(options), dtype=torch.uint8)

    def _options(self) -> dict[str, dict[str, Any]]:
        configs = {name: installed.config for name, installed in self.active().items()}
        values = {name: {**config.to_dict(), **config.ours()} for name, config in configs.items()}
        return {name: {k: v for k, v in own.items() if k not in BOOKKEEPING} for name, own in values.items()}

    def check_options(self, held: Tensor) -> None:
        """Refuse a checkpoint of adapters that were made otherwise, which tensors of equal shapes do not tell."""
        theirs: Mapping[str, Any] = json.loads(bytes(held.tolist()))
        ours = json.loads(json.dumps(self._options()))
        if theirs.keys() != ours.keys():
            raise CheckpointError(
                f"the checkpoint is of the active adapters {sorted(theirs)}, the model's are {sorted(ours)}; "
                "set_adapter() the same ones"
            )
        faults = [
            f"{adapter}: {key}: the checkpoint has {theirs[adapter].get(key)!r}, the model {ours[adapter].get(key)!r}"
            for adapter in ours
            for key in sorted({*theirs[adapter], *ours[adapter]})
            if theirs[adapter].get(key) != ours[adapter].get(key)
        ]
        if faults:
            raise CheckpointError(gather("the checkpoint is of an adapter with other options:", faults))


@final
class Wide:
    """The parameters that were float32 when a model was handed over."""

    def __init__(self, root: nn.Module) -> None:
        wide = [p for p in root.parameters() if p.requires_grad and p.dtype == torch.float32]
        self.kept = [(parameter, parameter.detach().clone()) for parameter in wide]

    def restore(self) -> None:
        """Make those that are bfloat16 now float32 again: what they were, where that is what was rounded."""
        for parameter, kept in self.kept:
            if parameter.dtype == torch.bfloat16:
                rounded = parameter.detach()
                same = torch.equal(kept.to(rounded), rounded)
                parameter.data = kept.to(rounded.device, copy=True) if same else rounded.float()


def _running(root: nn.Module) -> Iterator[Tensor]:
    """The running statistics of batch norms, which training moves however frozen they are."""
    for module in root.modules():
        if isinstance(module, _NormBase):
            yield from module.buffers(recurse=False)
