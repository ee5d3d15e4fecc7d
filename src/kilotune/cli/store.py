"""``kilotune store``: adapters by name and version, in SQLite, PostgreSQL or a folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._ui.sizes import readable_bytes
from ..errors import ConfigError
from ..fleet.store.names import SHARED
from ._output import Json, console, print_json, rows_table, warn

if TYPE_CHECKING:
    from ..fleet.store import AdapterStore, Moved, Standing, Version

__all__ = ["app"]

NO = 1
app = typer.Typer(
    name="store",
    no_args_is_help=True,
    help="Keep adapters by name and version: put, get, ls, show, rm; aliases; import, export, verify, gc.",
)

Url = Annotated[
    str,
    typer.Argument(
        metavar="STORE",
        help="sqlite:///adapters.db, postgresql://user:password@host/database, or a folder.",
    ),
]
Space = Annotated[str, typer.Option("--namespace", help="Whose adapters; nothing reaches those of others.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name.")]
Which = Annotated[
    str | None, typer.Option("--version", help="A version's number, an alias, or 'latest' (the newest, the default).")
]
Packing = Annotated[
    str | None,
    typer.Option(help="How numbers are kept: 'float32' (every bit as it is), 'bfloat16' or 'int8'; see docs/store.md."),
]
Tags = Annotated[list[str] | None, typer.Option("--tag", help="A word to find it by; may be given several times.")]
Pattern = Annotated[str | None, typer.Argument(metavar="[PATTERN]", help="Which names: * ? [...] as in a shell.")]


def which(text: str | None) -> int | str | None:
    """A version as the command line has it."""
    return int(text) if text is not None and text.isdecimal() and len(text) < 12 else text


def _opened(store: str, namespace: str, read_only: bool = False) -> AdapterStore:
    from ..fleet.store import open_store

    return open_store(store, namespace=namespace, read_only=read_only)


def _metadata(words: Sequence[str] | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in words or ():
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"--metadata {word!r}: expected key=value")
        try:
            found[key] = json.loads(value)
        except (ValueError, RecursionError):
            found[key] = value
    return found


@app.command()
def put(
    store: Url,
    name: Name,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's folder, or a hub id.")],
    namespace: Space = "default",
    alias: Annotated[str | None, typer.Option(help="Let this alias name the new version.")] = None,
    tag: Tags = None,
    metadata: Annotated[
        list[str] | None, typer.Option(help="key=value, the value as JSON or plain text; may be given several times.")
    ] = None,
    packing: Packing = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            metavar="NAME[/VERSION]",
            help="The shared adapter that it was trained on top of, of this namespace or of '@shared'.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put an adapter into a store as the newest version of NAME."""
    given = _metadata(metadata)
    with _opened(store, namespace=namespace) as opened:
        made = opened.put(name, adapter, metadata=given, tags=tag or (), alias=alias, packing=packing, on=on)
    if as_json:
        print_json(made.to_dict())
    else:
        named = "" if alias is None else f", named {alias}"
        below = "" if made.stands_on is None else f", on {_below(made)}"
        size = f"{readable_bytes(made.size)} ({made.packing})"
        console().print(f"{made.name}: version {made.version}{named}{below}, {size}", markup=False)


def _below(version: Version) -> str:
    """What a version stands on, in words; nothing where it stands alone."""
    on = version.stands_on
    if on is None:
        return ""
    more = (" of @shared" if on.namespace == SHARED else "") + (", which was removed" if on.removed else "")
    return f"{on.name} (version {on.version}{more})"


@app.command()
def get(
    store: Url,
    name: Name,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write, in PEFT's layout.")],
    version: Which = None,
    namespace: Space = "default",
    force: Annotated[bool, typer.Option("--force", help="Write over an adapter that is in OUT already.")] = False,
    as_json: Json = False,
) -> None:
    """Write an adapter out of a store into a folder."""
    if out.exists() and not force and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"{out} holds something already; give another folder, or --force")
    with _opened(store, namespace=namespace, read_only=True) as opened:
        record = opened.get(name, which(version))
        record.save(out)
    if as_json:
        print_json({**record.info.to_dict(), "out": str(out)})
    else:
        console().print(f"wrote {out}: {name}, version {record.info.version}", markup=False)
        if record.info.stands_on is not None:
            told = f"it stands on {_below(record.info)}, without which it is another adapter; get that one, too"
            console().print(told, markup=False)


@app.command()
def show(store: Url, name: Name, version: Which = None, namespace: Space = "default", as_json: Json = False) -> None:
    """Say all of one version, with what it stands on and who stands on it."""
    with _opened(store, namespace=namespace, read_only=True) as opened:
        info = opened.info(name, which(version))
        others = opened.standing_on(info.name, info.version)
        named = sorted(alias for alias, number in opened.aliases(info.name).items() if number == info.version)
    if as_json:
        print_json({**info.to_dict(), "aliases": named, "stood_on_by": {**vars(others), "names": list(others.names)}})
        return
    rows = [
        ("version", str(info.version)),
        ("aliases", ", ".join(named)),
        ("created (UTC)", f"{info.created:%Y-%m-%d %H:%M:%S}"),
        ("used (UTC)", "" if info.used is None else f"{info.used:%Y-%m-%d %H:%M:%S}"),
        ("size", f"{readable_bytes(info.size)} ({info.packing})"),
        ("tags", ", ".join(info.tags)),
        ("metadata", json.dumps(dict(info.metadata), ensure_ascii=False) if info.metadata else ""),
        ("SHA-256", info.sha256),
        *([("brings", ", ".join(info.files))] if info.files else []),
        ("stands on", _below(info) or "nothing: it is whole by itself"),
        ("stood on by", str(others) or "nobody"),
    ]
    console().print(rows_table(info.name, ("",), rows, justify="left"))


@app.command()
def ls(
    store: Url,
    pattern: Pattern = None,
    tag: Tags = None,
    versions: Annotated[bool, typer.Option("--versions", help="Every version, not the newest alone.")] = False,
    after: Annotated[str | None, typer.Option(help="Begin behind this name.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many.", min=1)] = 50,
    namespace: Space = "default",
    as_json: Json = False,
) -> None:
    """List what is there, by name. With --tag only what has all of the tags."""
    with _opened(store, namespace=namespace, read_only=True) as opened:
        found = list(opened.ls(pattern, tags=tag or (), versions=versions, after=after, limit=limit + 1))
        shown = found[:limit]
        aliases = {info.name: opened.aliases(info.name) for info in shown}
    documents = [
        {**info.to_dict(), "aliases": sorted(a for a, version in aliases[info.name].items() if version == info.version)}
        for info in shown
    ]
    if as_json:
        print_json({"adapters": documents, "more": len(found) > limit})
        return
    stacks = any(info.stands_on is not None for info in shown)
    rows = [
        (
            document["name"],
            str(document["version"]),
            ", ".join(document["aliases"]),
            document["created"][:19].replace("T", " "),
            "" if document["used"] is None else document["used"][:19].replace("T", " "),
            readable_bytes(document["size"]),
            document["packing"],
            ", ".join(document["tags"]),
            *([_below(info)] if stacks else []),
        )
        for document, info in zip(documents, shown)
    ]
    heads = (
        "version",
        "aliases",
        "created (UTC)",
        "used",
        "size",
        "packing",
        "tags",
        *(["stands on"] if stacks else []),
    )
    console().print(rows_table("", heads, rows, justify="left"))
    if len(found) > limit:
        console().print(f"... and more; go on with --after {shown[-1].name!r}", markup=False)


@app.command()
def rm(
    store: Url,
    name: Name,
    version: Annotated[str | None, typer.Option("--version", help="A version's number, an alias, or 'latest'.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every version, and the aliases.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even if an alias names it, or others stand on it.")] = False,
    namespace: Space = "default",
    as_json: Json = False,
) -> None:
    """Remove one version of an adapter, or with --all the whole of it."""
    if (version is None) != every:
        raise ConfigError("say what to remove: --version with a number, an alias or 'latest', or --all")
    with _opened(store, namespace=namespace) as opened:
        broken = _standing(opened, name, None if every else which(version)) if force else []
        count = opened.rm(name, None if every else which(version), force=force)
    if as_json:
        print_json({"name": name, "removed": count, "broken": [str(others) for others in broken]})
        return
    console().print(f"{name}: removed {count} version{'s' * (count != 1)}", markup=False)
    for others in broken:
        warn(f"{others} stood on it, and answer no more until they are put anew")


def _standing(opened: AdapterStore, name: str, version: int | str | None) -> list[Standing]:
    """Who stands on what is to be removed."""
    versions = opened.versions(name) if version is None else [opened.info(name, version)]
    return [others for info in versions if (others := opened.standing_on(name, info.version))]


@app.command()
def alias(
    store: Url,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="The word, such as live.")],
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="The adapters.")],
    version: Which = None,
    back: Annotated[bool, typer.Option("--back", help="Roll back: what it named before its last move.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Take the alias away.")] = False,
    namespace: Space = "default",
    as_json: Json = False,
) -> None:
    """Let ALIAS name a version of each NAME (the newest by default), for all of them or for none."""
    if back + remove + (version is not None) > 1:
        raise ConfigError("--version, --back and --remove exclude each other")
    if remove and len(names) != 1:
        raise ConfigError("--remove takes one NAME")
    found: dict[str, int | None]
    with _opened(store, namespace=namespace) as opened:
        if remove:
            opened.unalias(names[0], alias)
            found = {names[0]: None}
        elif back:
            found = {**opened.roll_back(alias, names)}
        else:
            found = {**opened.roll_out(alias, dict.fromkeys(names, which(version)))}
    if as_json:
        print_json({"alias": alias, "versions": found})
    else:
        for name, number in found.items():
            told = f"{alias} is taken away" if number is None else f"{alias} names version {number}"
            console().print(f"{name}: {told}", markup=False)


@app.command()
def verify(
    store: Url,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME...]", help="Only these adapters.")] = None,
    namespace: Space = "default",
    as_json: Json = False,
) -> None:
    """Read everything, and hold it against its hashes. Exits with 1 where something is wrong."""
    with _opened(store, namespace=namespace, read_only=True) as opened:
        faults = list(opened.verify(names or None))
        count = len(names) if names else sum(1 for _ in opened.names())
    if as_json:
        print_json({"adapters": count, "faults": [vars(fault) for fault in faults]})
    else:
        for fault in faults:
            print(f"error: {fault}", file=sys.stderr)
        console().print(f"{count} adapters, {len(faults)} faults", markup=False)
    if faults:
        raise typer.Exit(NO)


@app.command()
def stats(store: Url, namespace: Space = "default", as_json: Json = False) -> None:
    """Say how much is in a namespace, and how much the store takes on disk."""
    with _opened(store, namespace=namespace, read_only=True) as opened:
        found = opened.stats()
    if as_json:
        print_json({**vars(found), "packed": dict(found.packed), "payload_bytes": found.payload_bytes})
        return
    rows = [
        ("adapters", f"{found.names:,}"),
        ("versions", f"{found.versions:,}"),
        ("aliases", f"{found.aliases:,}"),
        ("forms (what many have in common)", f"{found.forms:,}"),
        *((f"numbers in {packing}", readable_bytes(size)) for packing, size in found.packed.items()),
        ("names, tags and metadata", readable_bytes(found.metadata_bytes)),
        ("the store on disk, all namespaces", readable_bytes(found.store_bytes)),
    ]
    console().print(rows_table("", ("",), rows))


@app.command()
def gc(
    store: Url,
    keep: Annotated[
        int | None,
        typer.Option(min=1, help="Leave this many of the newest versions of each adapter, and what aliases name."),
    ] = None,
    unused_days: Annotated[
        float | None, typer.Option(min=0, help="Of those, remove only what nobody has read for so many days.")
    ] = None,
    compact: Annotated[bool, typer.Option("--compact", help="Give the space back; nobody writes meanwhile.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    namespace: Space = "default",
    as_json: Json = False,
) -> None:
    """Remove old versions (with --keep), and what nobody uses any more."""
    if compact and dry_run:
        raise ConfigError("--compact changes the store, and --dry-run changes nothing")
    unused = None if unused_days is None else _days(unused_days)
    with _opened(store, namespace=namespace, read_only=dry_run) as opened:
        found = opened.gc(keep=keep, unused_for=unused, compact=compact, dry_run=dry_run)
    if as_json:
        print_json({**vars(found), "dry_run": dry_run})
        return
    shared = f"{found.forms} forms, {found.bases} bases, {found.frozen} frozen tensors"
    what = "would remove" if dry_run else "removed"
    console().print(f"{what} {found.versions} versions ({readable_bytes(found.bytes)}), {shared}", markup=False)


def _days(count: float) -> timedelta:
    try:
        return timedelta(days=count)
    except (OverflowError, ValueError):
        raise ConfigError(f"--unused-days: expected a number of days below 1e9, got {count:g}") from None


# -- in bulk ---------------------------------------------------------------------------------------


@app.command("import")
def import_(
    store: Url,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A folder of adapters, or another store.")],
    pattern: Pattern = None,
    version: Which = None,
    history: Annotated[bool, typer.Option("--history", help="Every version, and the aliases.")] = False,
    alias: Annotated[str | None, typer.Option(help="Let this alias name what is put.")] = None,
    packing: Packing = None,
    namespace: Space = "default",
    source_namespace: Annotated[str, typer.Option(help="The namespace in SOURCE.")] = "default",
    as_json: Json = False,
) -> None:
    """Put all adapters of SOURCE into STORE. What is broken is left out and told; the exit code is then 1."""
    from ..fleet.store import copy_adapters

    with (
        _opened(source, namespace=source_namespace, read_only=True) as given,
        _opened(store, namespace=namespace) as opened,
    ):
        _refuse_folder(opened)
        moved = _counted(
            lambda done: copy_adapters(
                given,
                opened,
                pattern,
                version=which(version),
                history=history,
                alias=alias,
                packing=packing,
                done=done,
            )
        )
    _tell("imported", moved, as_json)


@app.command()
def export(
    store: Url,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder; each adapter gets one of its own in it.")],
    pattern: Pattern = None,
    version: Which = None,
    force: Annotated[bool, typer.Option("--force", help="Write over adapters that are there already.")] = False,
    namespace: Space = "default",
    as_json: Json = False,
) -> None:
    """Write adapters into folders, as PEFT does. What fails is told; the exit code is then 1."""
    from ..fleet.store import export_adapters

    with _opened(store, namespace=namespace, read_only=True) as opened:
        moved = _counted(
            lambda done: export_adapters(opened, out, pattern, version=which(version), force=force, done=done)
        )
    _tell("exported", moved, as_json)


def _refuse_folder(opened: AdapterStore) -> None:
    if opened.read_only:
        raise ConfigError(f"{opened.url} is a folder, which a store only reads; use 'kilotune store export'")


def _counted(run: Callable[[Callable[[int], None]], Moved]) -> Moved:
    """Run with a count on stderr, where somebody looks."""
    if not sys.stderr.isatty():
        return run(lambda count: None)
    try:
        return run(lambda count: print(f"\r{count:,} adapters", end="", file=sys.stderr, flush=True))
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _tell(what: str, moved: Moved, as_json: bool) -> None:
    if as_json:
        faults = [vars(fault) for fault in moved.faults]
        print_json({what: moved.count, "bytes": moved.bytes, "faults": faults})
    else:
        for fault in moved.faults:
            warn(f"left out {fault}")
        console().print(f"{what} {moved.count:,} adapters, {readable_bytes(moved.bytes)} of numbers", markup=False)
    if moved.faults:
        raise typer.Exit(NO)
