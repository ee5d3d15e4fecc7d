"""Opening a store by its URL."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from ...errors import ConfigError, did_you_mean
from .names import check_namespace, check_packing

if TYPE_CHECKING:
    from torch import nn

    from ...injection.fingerprint import Fingerprint
    from .adapter_store import AdapterStore

__all__ = ["DEFAULT", "open_store"]

DEFAULT = "default"  # the namespace of who has only one
FORMS = "sqlite:///adapters.db, postgresql://user:password@host/database, or a folder of adapters"


def open_store(
    url: str | Path,
    *,
    namespace: str = DEFAULT,
    base: nn.Module | Fingerprint | None = None,
    packing: str = "float32",
    read_only: bool = False,
    timeout: float = 60.0,
) -> AdapterStore:
    """Open a store of adapters; one in a database is made where it is not there yet.

    Args:
        url: ``sqlite:///adapters.db`` (four slashes for an absolute path), ``postgresql://...`` as PostgreSQL writes
            it, or a folder whose subfolders are adapters as PEFT writes them, which is for reading only.
        namespace: whose adapters; the handle reaches no others.
        base: the model that they belong to (or its fingerprint): adapters that are known to be of another one are
            refused, and what is put without a base of its own is noted to be of this one.
        packing: how numbers are kept where ``put`` does not say: "float32", "bfloat16" or "int8".
        read_only: refuse every change; a store that is not there is then an error.
        timeout: seconds to wait for others who are writing, and for a server.

    Raises:
        StoreError: it cannot be opened. ConfigError: a URL of no known kind, or another argument is wrong.
        MissingExtraError: PostgreSQL's driver is not installed.

    """
    check_namespace(namespace)
    check_packing(packing)
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 <= timeout < 1e6:
        raise ConfigError(f"timeout: expected a number of seconds from 0, got {timeout!r}")
    known = None if base is None else _fingerprint(base)
    text = str(url) if isinstance(url, str | Path) else ""
    if not text or text == "file://":
        raise ConfigError(f"{url!r} names no store: expected {FORMS}")
    scheme = match.group(1).lower() if (match := re.match(r"([A-Za-z][A-Za-z0-9+]*):", text)) else ""
    if scheme == "sqlite":
        from .sqlite import SqliteStore

        return SqliteStore(text, _sqlite_path(text), namespace, known, packing, read_only, timeout)
    if scheme in ("postgresql", "postgres"):
        from .postgres import PostgresStore

        return PostgresStore(_without_password(text), text, namespace, known, packing, read_only, timeout)
    path = Path(text.removeprefix("file://"))
    if path.is_dir() and scheme in ("", "file"):
        from .folder import FolderStore

        if packing != "float32":
            raise ConfigError(f"packing={packing!r}: {path} is a folder, which a store only reads")
        return FolderStore(path, namespace, known)
    raise ConfigError(_strange(text, scheme, path))


def _fingerprint(base: nn.Module | Fingerprint) -> Fingerprint:
    from ...injection.fingerprint import Fingerprint  # needs torch, which a wrong URL does without

    return base if isinstance(base, Fingerprint) else Fingerprint.of(base)


def _strange(url: str, scheme: str, path: Path) -> str:
    if scheme == "" and (path.is_file() or path.suffix in (".db", ".sqlite", ".sqlite3")):
        return f"{url!r} is no URL; for an SQLite file write sqlite:///{url}"
    if scheme in ("", "file"):
        return f"{url!r} is neither a folder that is there nor the URL of a store: {FORMS}"
    hint = did_you_mean(scheme, ("sqlite", "postgresql"))
    return f"no store of the kind {scheme!r}.{hint} There are {FORMS}"


def _sqlite_path(url: str) -> Path:
    if not url.lower().startswith("sqlite:///"):
        raise ConfigError(f"{url!r}: expected three slashes and a path, as in sqlite:///adapters.db")
    path = url[len("sqlite:///") :]
    if "?" in path or "#" in path or "\0" in path:
        raise ConfigError(f"{url!r}: the path of an SQLite file must be without ? and #, and it takes no options")
    if path in ("", ":memory:") or path.endswith("/"):
        raise ConfigError(f"{url!r} names no file; a store is kept in one, as in sqlite:///adapters.db")
    return Path(path)


def _without_password(url: str) -> str:
    """For messages. A password may also stand among the options."""
    try:
        parts = urlsplit(url)
    except ValueError as error:  # the URL is not repeated: it may hold a password
        raise ConfigError(f"the store's URL cannot be read: {error}; expected {FORMS}") from None
    place = parts.netloc
    if "@" in place:
        who, _, host = place.rpartition("@")
        place = f"{who.partition(':')[0]}@{host}"
    kept = [option for option in parts.query.split("&") if option and not re.match(r"(ssl)?passw", option)]
    return urlunsplit((parts.scheme, place, parts.path, "&".join(kept), ""))
