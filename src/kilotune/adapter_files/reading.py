"""Reading an adapter, the one way in: :func:`open_adapter`. What a model is, nobody here knows.

::

    open_adapter
      files.locate        a folder or a hub id -> its folder
      files.read_files    the two files, each checked by itself: TwoFiles
      parse               PEFT's layout -> config, method, and tensors by layer: AdapterFile
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor

from ..config import CLOSED, SECTION, AdapterConfig
from ..errors import CheckpointError, ConfigError, gather
from ..methods import Kept, Method, load_method, make_method, method_of_file
from .files import CONFIG_NAME, TwoFiles, locate, read_files, weights_of
from .peft_layout import EXTRA_PREFIX, FACTORS, PREFIX, PROJECTIONS, Said, config_checksum, header_options, said_of

__all__ = ["AdapterFile", "open_adapter", "parse"]

DOUBLES_UP_TO = (0, 21, 2)  # the last PEFT for which that is known
# What every PEFT that adapts an attention writes beside LoRA's options, also those before 0.18, which do not name
# themselves.
OLDER_PEFTS = "loftq_config"


@final
@dataclass(frozen=True)
class AdapterFile:
    """An adapter as it was read, not yet held against a model.

    files: what its two files say. tensors: PEFT's keys without prefix (``fc1.vera_lambda_b``); extra: those that belong
    to no layer, or are brought along. section: our part of the config. doubled: see :func:`_doubled`.
    checksum: of projections that are not in it (SHA-256, hexadecimal), the fingerprint of factors, or None. said: what
    the method says of each key of the files.
    """

    files: TwoFiles
    config: AdapterConfig
    method: Method[Any]
    tensors: dict[str, Tensor]
    extra: dict[str, Tensor]
    section: dict[str, Any]
    doubled: bool | None
    checksum: str | None
    said: Mapping[str, Said]

    @property
    def brought(self) -> list[str]:
        """The keys of the frozen tensors that it brings along, as they are in the files."""
        return [key for key, said in self.said.items() if said.kept is Kept.BROUGHT]

    @property
    def folder(self) -> Path:
        """Where it was read from, for messages."""
        return self.files.folder

    @property
    def metadata(self) -> Mapping[str, str]:
        """The header's of the weights."""
        return self.files.header


def open_adapter(
    source: str | os.PathLike[str] | AdapterFile,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> AdapterFile:
    """The adapter in a folder or under a hub id (see :func:`locate`); ``source`` itself where it was read already."""
    options = {"revision": revision, "subfolder": subfolder, "token": token, "cache_dir": cache_dir}
    if not isinstance(source, AdapterFile):
        return parse(read_files(locate(source, **options, local_files_only=local_files_only)))
    if given := [name for name, value in options.items() if value is not None]:
        raise ConfigError(f"{', '.join(given)}: for a folder or a hub id only; {source.folder} has been read already")
    return source


def parse(files: TwoFiles) -> AdapterFile:
    """The adapter that two files hold, checked as far as can be without a model.

    Raises:
        CheckpointError, ConfigError: they are no adapter, or do not belong together.

    """
    folder, whole, tensors, metadata = files.folder, files.config, files.tensors, files.header
    values, weights = dict(whole), weights_of(folder, whole)
    section = values.pop(SECTION, {})
    ours = {key: value for key, value in section.items() if key not in ("format", "weights", PROJECTIONS, FACTORS)}
    ours.update(header_options(weights, metadata))
    try:
        method_cls = method_of_file(str(values.get("peft_type")))
        config = method_cls.config_cls.from_file(values, ours)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG_NAME}: {error}") from error
    expected = metadata.get("kilotune_config_sha256")
    if expected not in (None, config_checksum(whole, config.option_names())):
        raise CheckpointError(
            f"{folder}: {CONFIG_NAME} and {weights.name} do not belong together: one of them was changed, or writing "
            "them was cut off between the two; save the adapter again"
        )
    layered = {k.removeprefix(PREFIX): v for k, v in tensors.items() if k.startswith(PREFIX)}
    rest = {k: v for k, v in tensors.items() if not k.startswith(PREFIX)}
    strange = sorted(k for k in rest if not k.startswith(EXTRA_PREFIX))
    if strange:
        raise CheckpointError(gather(f"{weights}: keys that do not begin with {EXTRA_PREFIX!r}:", strange))
    extra = {k.removeprefix(EXTRA_PREFIX): v for k, v in rest.items()}
    if exact := sorted(k for k, v in rest.items() if not v.is_floating_point()):
        raise CheckpointError(gather(f"{weights}: expected floating-point tensors:", exact))
    said = said_of(make_method(config), tensors)
    brought = [k.removeprefix(PREFIX) for k, s in said.items() if s.layer and s.kept is Kept.BROUGHT]
    extra.update({key: layered.pop(key) for key in brought})
    layered = method_cls.from_layers(config, layered)
    checksum = metadata.get(f"kilotune_{PROJECTIONS}", section.get(PROJECTIONS, section.get(FACTORS)))
    if not isinstance(checksum, str | None):
        raise CheckpointError(f"{folder / CONFIG_NAME}: {PROJECTIONS}: expected a checksum, got {checksum!r}")
    method = load_method(config, extra, checksum)
    doubled = _doubled(whole, metadata, config)
    return AdapterFile(files, method.config, method, layered, extra, section, doubled, checksum, said)


def _doubled(values: Mapping[str, Any], metadata: Mapping[str, str], config: AdapterConfig) -> bool | None:
    """Whether a PEFT wrote the file that adds the change of an attention's out_proj twice (huggingface/peft#3774).

    With twice the second factor the adapter does here what it did where it was trained. None: who wrote the file cannot
    be told. Its header says that we did; where another tool has written that anew, adapter_config.json does.
    """
    if "kilotune_format" in metadata or str(values["peft_type"]).upper().startswith(CLOSED):
        return False
    if (version := values.get("peft_version")) is not None:
        numbers = re.match(r"(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?", str(version))
        return not numbers or tuple(int(number or 0) for number in numbers.groups()) <= DOUBLES_UP_TO
    if "peft_version" in values:
        return False
    if OLDER_PEFTS in values:
        return True
    return False if values.keys() >= config.to_dict().keys() - {"peft_version"} else None  # older ones of ours
