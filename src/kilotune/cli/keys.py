"""``kilotune keys``: the API keys of a service."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..serve.http.keys import ROLES, TENANT, Key, add_key, read_keys, remove_key
from ._output import Json, console, print_json, rows_table

__all__ = ["app"]

app = typer.Typer(
    name="keys",
    no_args_is_help=True,
    help="Make, list and remove the API keys of kilotune serve. The file holds hashes; a key is shown once.",
)

File = Annotated[Path, typer.Argument(metavar="FILE", help="The file of keys, as kilotune serve --keys takes it.")]


def _shown(key: Key) -> dict[str, Any]:
    told = {name: value for name, value in asdict(key).items() if name != "sha256"}
    return {**told, "signs": key.signs is not None}


def _role(key: Key) -> str:
    user = [] if key.user is None else [f"of {key.user}"]
    return ", ".join([key.role, *["trains"] * key.trains, *["signs"] * (key.signs is not None), *user])


@app.command()
def add(
    file: File,
    namespace: Annotated[
        str | None, typer.Option(help="Whose adapters it is for; a manager's may be left out: all of them.")
    ] = None,
    role: Annotated[
        str,
        typer.Option(help=f"{', '.join(ROLES)}: to ask adapters; to put, move and delete them; to read the metrics."),
    ] = TENANT,
    note: Annotated[str, typer.Option(help="A few words to know it by.")] = "",
    trains: Annotated[
        bool, typer.Option("--trains", help="A tenant's may upload files and have models trained from them.")
    ] = False,
    user: Annotated[
        str | None, typer.Option(help="The one person whose key a tenant's is: feedback and the model 'personal'.")
    ] = None,
    signs: Annotated[
        bool,
        typer.Option(
            "--signs",
            help="A tenant's backend says for which user it asks, by a JWT that it signs with a secret, printed too.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a key, and write its hash into FILE. It is printed now, and cannot be had again."""
    key, kept = add_key(file, role, namespace, note, trains, user, signs)
    if as_json:
        print_json({**_shown(kept), "key": key, **({} if kept.signs is None else {"secret": kept.signs})})
        return
    console().print(key, markup=False, soft_wrap=True)
    if kept.signs is not None:
        console().print(kept.signs, markup=False, soft_wrap=True)


@app.command("ls")
def ls(file: File, as_json: Json = False) -> None:
    """List the keys of FILE."""
    keys = read_keys(file)
    if as_json:
        print_json({"keys": [_shown(key) for key in keys]})
        return
    rows = [
        (key.id, _role(key), key.namespace or "(all)", key.created[:19].replace("T", " "), key.note) for key in keys
    ]
    console().print(rows_table("", ("role", "namespace", "created (UTC)", "note"), rows, justify="left"))


@app.command()
def rm(
    file: File,
    name: Annotated[str, typer.Argument(metavar="ID", help="The key's id, as ls has it.")],
    as_json: Json = False,
) -> None:
    """Take a key out of FILE; a running service refuses it from about a second later on."""
    gone = remove_key(file, name)
    if as_json:
        print_json({"removed": _shown(gone)})
    else:
        console().print(f"removed {gone.id} ({gone.role}, {gone.namespace or 'all namespaces'})", markup=False)
