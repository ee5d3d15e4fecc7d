"""Pictures: folders of them by class, and opening one, from a path or from bytes in a table."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError, MissingExtraError, first_line, gather
from .tables import Places, Table

__all__ = ["IMAGE_SUFFIXES", "image_fault", "image_folder", "open_image"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "dev", "test")


def image_folder(path: Path) -> Table:
    """A folder with one folder per class: columns ``image`` (path) and ``label`` (the class folder's name).

    Raises:
        ConfigError: it is not laid out so.

    """
    if not path.is_dir():
        raise ConfigError(f"{path}: expected a folder with one folder of images per class")
    classes = sorted(item for item in path.iterdir() if item.is_dir() and not item.name.startswith("."))
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    for folder in classes:
        files = sorted(item for item in folder.rglob("*") if item.is_file() and not item.name.startswith("."))
        pictures = [item for item in files if item.suffix.lower() in IMAGE_SUFFIXES]
        rows += [{"image": str(item), "label": folder.name} for item in pictures]
        if not pictures:
            faults.append(f"{folder}: no images (known: {', '.join(IMAGE_SUFFIXES)})")
    splits = [folder.name for folder in classes if folder.name.lower() in SPLIT_NAMES]
    if splits and len(splits) == len(classes):
        faults = [f"{path} holds splits, not classes: set data.train to {path / splits[0]}, and the others likewise"]
    if not classes:
        faults.append(f"{path}: expected one folder of images per class, found no folder in it")
    if faults:
        raise ConfigError(gather("the images cannot be read:", faults))
    sources = tuple(row["image"] for row in rows)
    return Table(rows, ("image", "label"), Places.files(sources))


def open_image(value: Any, folder: Path | None) -> Any:
    """A PIL image in RGB, from a path (relative to ``folder``), bytes, or ``datasets``' mapping of the two.

    Raises:
        ConfigError: it cannot be decoded.
        MissingExtraError: Pillow is not installed.

    """
    opened = _opened(value, folder)
    try:
        return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # PIL raises SyntaxError for broken PNG chunks
        raise ConfigError(f"{_named(value)}: a broken image: {first_line(error)}") from error
    finally:
        if opened is not value:
            opened.close()


def image_fault(value: Any, folder: Path | None) -> str | None:
    """Why a picture cannot be opened, by its header alone; None when it can."""
    try:
        _opened(value, folder).close()
    except MissingExtraError:
        raise
    except ConfigError as error:
        return str(error)
    return None


def _opened(value: Any, folder: Path | None) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "train", "Opening images") from error
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    try:
        # A picture of more pixels than Pillow trusts (a small file can unpack to gigabytes) is its own kind of error.
        if isinstance(value, bytes):
            return Image.open(io.BytesIO(value))
        if isinstance(value, str) and value:
            path = Path(value).expanduser()
            return Image.open(path if folder is None or path.is_absolute() else folder / path)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no image {error.filename}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{_named(value)}: no image that can be opened: {first_line(error)}") from error
    raise ConfigError(f"expected an image or its path, got {type(value).__name__}")


def _named(value: Any) -> str:
    if isinstance(value, Mapping):
        value = value.get("path")
    return value if isinstance(value, str) and value else "an image"
