"""API keys: who may do what in which namespace. A file holds their SHA-256; a key itself is told once, when made.

A key is 32 random bytes, so nobody finds one by trying, and a slow hash would only cost each request time::

    {"format": 1, "keys": [{"id": "3f9c1a02", "sha256": "...", "role": "tenant", "namespace": "ann",
                            "created": "2026-11-25T18:00:00+00:00", "note": "her laptop"}]}

``signs`` is a secret as it is, for a signature of HS256 is checked with what makes it. It lets nobody in: a claim
counts with its key only, of which the hash is here.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

from ...adapter_files.names import check_shown
from ...errors import ConfigError, did_you_mean, nearest
from ...fleet.store.names import check_namespace
from ...whole_file import replacing
from ..learning.users import check_user

__all__ = [
    "MANAGER",
    "MONITOR",
    "ROLES",
    "TENANT",
    "Key",
    "Keyring",
    "add_key",
    "fixed_keys",
    "read_keys",
    "remove_key",
]

TENANT, MANAGER, MONITOR = "tenant", "manager", "monitor"
ROLES = (TENANT, MANAGER, MONITOR)
PREFIX = "kt-"
LOOK = 1.0  # seconds between looks at the file
MAX_NOTE = 200
OWNER = "me"  # who asks without a key, on this machine only


@final
@dataclass(frozen=True, slots=True)
class Key:
    """Whom a key stands for.

    id: names it in lists, and is no secret. sha256: of the key. role: "tenant" (the adapters of its namespace answer),
    "manager" (puts, moves and deletes them) or "monitor" (reads the metrics). namespace: None is for managers and
    monitors, and is all of them. trains: a tenant's may upload files and have models trained from them. user: the one
    person whose key it is; None: it is no single one's, or a claim says for whom it asks. signs: the secret of such
    claims; None: none are taken.
    """

    id: str
    sha256: str
    role: str
    namespace: str | None
    created: str
    note: str = ""
    trains: bool = False
    user: str | None = None
    signs: str | None = None


def digest(key: str) -> str:
    """SHA-256 of a key, hexadecimal."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def new_key(
    role: str,
    namespace: str | None,
    note: str = "",
    trains: bool = False,
    user: str | None = None,
    signs: bool = False,
) -> tuple[str, Key]:
    """(a key that nobody has seen, what is kept of it).

    Raises:
        ConfigError: no such role, or a namespace that does not go with it.

    """
    if role not in ROLES:
        raise ConfigError(f"role: expected one of {', '.join(ROLES)}, got {role!r}.{did_you_mean(role, ROLES)}")
    if role == TENANT and namespace is None:
        raise ConfigError("a tenant's key is of one namespace; give --namespace")
    if role == MONITOR and namespace is not None:
        raise ConfigError("a monitor's key is for the metrics of the whole service; leave --namespace out")
    if trains and role != TENANT:
        raise ConfigError(f"a {role}'s key trains nothing; leave --trains out")
    if role != TENANT and (user is not None or signs):
        option = "--signs" if user is None else "--user"
        raise ConfigError(f"a {role}'s key asks for no user; leave {option} out")
    if user is not None and signs:
        raise ConfigError("--user says whose key it is, and with --signs each request says it; take one of them")
    if user is not None:
        check_user(user)
    if namespace is not None:
        check_shown("namespace", check_namespace(namespace))
    if len(note) > MAX_NOTE or any(ord(c) < 32 for c in note):
        raise ConfigError(f"note: at most {MAX_NOTE} characters on one line, got {note!r:.300}")
    name = secrets.token_hex(4)
    key = f"{PREFIX}{name}-{secrets.token_urlsafe(32)}"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    secret = secrets.token_urlsafe(32) if signs else None
    return key, Key(name, digest(key), role, namespace, now, note, trains, user, secret)


# -- the file --------------------------------------------------------------------------------------


def read_keys(path: str | Path) -> list[Key]:
    """The keys in a file.

    Raises:
        ConfigError: it is not there, or is no file of keys.

    """
    path = Path(path)
    try:
        document = json.loads(path.read_bytes())
        if not isinstance(document, dict) or document.get("format") != 1:
            raise ValueError('expected an object with "format": 1')
        keys = [_key(entry) for entry in document["keys"]]
    except FileNotFoundError:
        raise ConfigError(f"there is no file of keys {path}; make one with kilotune keys add {path}") from None
    except OSError as error:
        raise ConfigError(f"the file of keys {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is no file of keys: {error}") from error
    if len({key.id for key in keys}) < len(keys):
        raise ConfigError(f"{path} is no file of keys: an id is there twice")
    return keys


def _key(entry: Any) -> Key:
    values = {name: entry[name] for name in ("id", "sha256", "role", "namespace", "created")}
    more = {name: entry.get(name) for name in ("user", "signs")}
    key = Key(**values, note=entry.get("note", ""), trains=entry.get("trains", False), **more)
    if not isinstance(key.trains, bool):
        raise ValueError(f"key {key.id!r}: trains is neither true nor false")
    if wrong := [name for name in ("id", "created", "note") if not isinstance(getattr(key, name), str)]:
        raise ValueError(f"key {key.id!r}: {wrong[0]} is no text")
    if key.user is not None:
        check_user(key.user)
    if key.signs is not None and (not isinstance(key.signs, str) or len(key.signs) < 32 or not key.signs.isascii()):
        raise ValueError(f"key {key.id!r}: signs is no secret of at least 32 characters")
    if key.role not in ROLES or (key.role == TENANT and key.namespace is None):
        raise ValueError(f"key {key.id!r}: role {key.role!r}, namespace {key.namespace!r}")
    if not isinstance(key.sha256, str) or len(bytes.fromhex(key.sha256)) != 32:
        raise ValueError(f"key {key.id!r}: sha256 is no SHA-256")
    if key.namespace is not None:
        check_namespace(key.namespace)
    return key


def add_key(
    path: str | Path,
    role: str,
    namespace: str | None,
    note: str = "",
    trains: bool = False,
    user: str | None = None,
    signs: bool = False,
) -> tuple[str, Key]:
    """Make a key and write it into a file, which is made where it is not there; (the key, what was kept)."""
    made = new_key(role, namespace, note, trains, user, signs)
    with _changing(Path(path)) as keys:
        keys.append(made[1])
    return made


def remove_key(path: str | Path, name: str) -> Key:
    """Take a key out of a file; a running service forgets it within about a second.

    Raises:
        ConfigError: there is no key of that id.

    """
    if not Path(path).is_file():
        read_keys(path)
    with _changing(Path(path)) as keys:
        found = next((key for key in keys if key.id == name), None)
        if found is None:
            close = nearest(name, [key.id for key in keys], 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{path} has no key {name!r}.{hint}")
        keys.remove(found)
    return found


@contextmanager
def _changing(path: Path) -> Iterator[list[Key]]:
    """The file's keys, written back whole; one at a time."""
    try:
        with open(path.with_name(f".{path.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = read_keys(path) if path.exists() else []
            yield keys
            _write(path, keys)
    except OSError as error:
        raise ConfigError(f"the file of keys {path} cannot be written: {error.strerror}") from error


def _write(path: Path, keys: Sequence[Key]) -> None:
    text = json.dumps({"format": 1, "keys": [asdict(key) for key in keys]}, indent=1, ensure_ascii=False)
    with replacing(path, shared=True, flushed=True) as fresh:
        fresh.touch(0o600, exist_ok=False)  # for its owner only
        fresh.write_text(f"{text}\n", encoding="utf-8")


# -- looking them up ---------------------------------------------------------------------------------


@final
class Keyring:
    """The keys that are valid now: of a file, which is looked at again when it changes, or fixed ones.

    A file that is being changed badly (no JSON, taken away) leaves the keys as they were; ``trouble`` says why.
    """

    def __init__(self, path: str | Path | None, fixed: Sequence[Key] = (), open_to: str | None = None) -> None:
        """open_to: the namespace of who brings none of the keys; None: nobody gets in without one."""
        self._path = None if path is None else Path(path)
        self._lock = threading.Lock()
        self._fixed = tuple(fixed)
        self.open_to = None if open_to is None else Key("", "", TENANT, open_to, "", trains=True, user=OWNER)
        self.trouble: str | None = None
        self._looked = time.monotonic()
        self._stamp = self._of_file()
        self._by_digest = self._index(read_keys(self._path) if self._path else [])

    def _index(self, keys: Sequence[Key]) -> dict[str, Key]:
        return {key.sha256: key for key in (*self._fixed, *keys)}

    def _of_file(self) -> tuple[int, int, int] | None:
        if self._path is None:
            return None
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size

    def find(self, key: str | None) -> Key | None:
        """Whom a key stands for; None: nobody."""
        self._look()
        if key is None:
            return self.open_to
        # By its hash, of which who tries keys controls nothing, so how far the comparison gets tells nothing.
        return self._by_digest.get(digest(key)) or self.open_to  # clients of OpenAI's always bring some key

    def _look(self) -> None:
        if self._path is None or time.monotonic() - self._looked < LOOK or not self._lock.acquire(blocking=False):
            return
        try:
            self._looked = time.monotonic()
            stamp = self._of_file()
            if stamp == self._stamp:
                self.trouble = None  # it may have been away, and is back as it was
                return
            try:
                self._by_digest = self._index(read_keys(self._path))
            except ConfigError as error:
                self.trouble = str(error)
            else:
                self._stamp, self.trouble = stamp, None
        finally:
            self._lock.release()


def fixed_keys() -> tuple[str, tuple[Key, ...]]:
    """A manager's key for a service without a file of keys: (the key, what is kept of it)."""
    key, kept = new_key(MANAGER, None, "made for this run")
    return key, (kept,)
