"""A report as one HTML page that needs nothing but itself, and files that are written all together or not at all.

A page is a template file beside the code that gives its values; it extends ``templates/base.html``.
"""

from __future__ import annotations

import base64
import importlib
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from ..errors import KilotuneError, MissingExtraError
from ..whole_file import replacing

__all__ = ["check_folder", "publish", "render", "require_packages"]


def require_packages(extra: str = "demo", purpose: str = "The demo's report") -> None:
    """Fail at once, rather than after a minute of training, when a report's charts or its page cannot be made.

    Raises:
        MissingExtraError: matplotlib or Jinja2 is not installed.
    """
    for module in ("matplotlib.figure", "jinja2"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise MissingExtraError(module.partition(".")[0], extra, purpose) from error


def render(package: str, template: str, **values: object) -> str:
    """The HTML of a template file that lies in ``package``.

    Args:
        package: dotted name of the package.
        template: name of the file; what it extends may also be one of ``templates/`` here.
        values: what the template may name: text is escaped, and bytes become Base64 by the filter ``base64``.

    Raises:
        jinja2.UndefinedError: the template names what is not among the values.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, ""), PackageLoader(__package__)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
    return environment.get_template(template).render(values)


# -- files ---------------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Fail before the training, rather than after it, when a report cannot be written into ``folder``.

    Raises:
        KilotuneError: it is a file, or neither it nor the folder above may be written to.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise KilotuneError(f"the report cannot be written into {folder}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise KilotuneError(f"the report cannot be written into {folder}: no permission to write to {nearest}")


def publish(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write files below ``folder``: all of them aside first, then each renamed into place, in order.

    Raises:
        KilotuneError: one could not be written; then nothing is left aside.
    """
    targets = [folder / name for name in files]
    try:
        with ExitStack() as aside:
            for target, content in reversed([*zip(targets, files.values())]):  # the last one in is renamed first
                target.parent.mkdir(parents=True, exist_ok=True)
                aside.enter_context(replacing(target, shared=True)).write_bytes(content)
    except OSError as error:
        raise KilotuneError(f"could not write the report into {folder}: {error}") from error
    return targets
