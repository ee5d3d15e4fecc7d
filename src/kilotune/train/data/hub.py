"""Data sets of the Hugging Face hub, through the ``datasets`` library; from its caches where there is no network.

Tested with datasets 5.2. Datasets that bring their own Python code are not run: the library no longer does, nor do we.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError, MissingExtraError, did_you_mean, first_line
from .tables import Places, Table

__all__ = ["as_table", "read_hub"]


def read_hub(name: str, subset: str | None, split: str) -> Table:
    """One split of a data set of the hub, or of a folder that is laid out like one.

    Raises:
        ConfigError: it is not there, cannot be reached, or has no such subset or split.
        MissingExtraError: ``datasets`` is not installed.

    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "train", "A data set of the hub") from error
    try:
        splits = _load(datasets, name, subset)
    except ConnectionError as error:
        raise ConfigError(
            f"hub:{name} cannot be reached ({first_line(error)}), and is not in the local cache. Load it once where "
            "there is a network and bring the cache (HF_HOME) here, or download its files and give their paths instead"
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"hub:{name}: {first_line(error)}") from error
    if split not in splits:
        found = ", ".join(splits)
        hint = did_you_mean(split, splits)
        raise ConfigError(f"hub:{name} has no split {split!r}.{hint} It has: {found}; data.splits says which is which")
    return as_table(splits[split], f"hub:{name} {split}")


def _load(datasets: Any, name: str, subset: str | None) -> Mapping[str, Any]:
    """All splits; where the hub cannot be reached, from what huggingface_hub has in its cache."""
    try:
        return dict(datasets.load_dataset(name, subset))
    except ConnectionError as error:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = snapshot_download(name, repo_type="dataset", local_files_only=True)
        except (LocalEntryNotFoundError, HFValidationError):
            raise error from None
        return dict(datasets.load_dataset(folder, subset))


def as_table(rows: Any, source: str) -> Table:
    """A ``datasets.Dataset`` as a table: pictures stay encoded until they are used, class numbers keep their names."""
    from datasets import ClassLabel, Image

    classes = {}
    for column, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(column, Image(decode=False))
        inner = getattr(feature, "feature", feature)  # of a list
        if isinstance(inner, ClassLabel):
            classes[column] = tuple(inner.names)
    return Table(rows, tuple(rows.column_names), Places.of(source, " row ", range(1, len(rows) + 1)), classes)
