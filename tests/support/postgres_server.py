"""A PostgreSQL server of our own for the tests: in a temporary folder, on loopback, with a password.

The server refuses to run as root, so there it runs as the user ``postgres`` (of Debian's package) or ``nobody``.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

USER, DATABASE = "kilotune", "postgres"


def binaries() -> Path | None:
    """The folder of initdb and postgres, where PostgreSQL is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    there = shutil.which("initdb")
    return None if there is None else Path(there).resolve().parent


def _account() -> dict[str, Any]:
    """How to start a process as somebody who is not root."""
    if os.getuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise RuntimeError("root needs a user postgres or nobody to run PostgreSQL as")


class Server:
    """url: of the database, password included."""

    def __init__(self, home: Path, programs: Path) -> None:
        self.home, self.programs, self.password = home, programs, secrets.token_hex(8)
        self.account = _account()
        self.port = _free_port()
        self.process: subprocess.Popen[bytes] | None = None
        if self.account:
            os.chown(home, self.account["user"], self.account["group"])
        secret = home / "password"
        secret.write_text(self.password)
        if self.account:
            os.chown(secret, self.account["user"], self.account["group"])
        words = ["-D", str(home / "data"), "-U", USER, "-A", "scram-sha-256", "--pwfile", str(secret), "-E", "UTF8"]
        self._run([str(programs / "initdb"), *words, "--locale=C.UTF-8", "--no-sync"])

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False, **self.account)
        if done.returncode:
            raise RuntimeError(f"{command[0]}: {done.stdout}{done.stderr}")

    @property
    def url(self) -> str:
        return self.url_of(DATABASE)

    def url_of(self, database: str) -> str:
        return f"postgresql://{USER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def new_place(self) -> str:
        """The URL of an empty place for a store: a schema of its own, which costs less than a database."""
        import psycopg

        name = f"test_{secrets.token_hex(6)}"
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f'CREATE SCHEMA "{name}"'.encode())
        return f"{self.url}?options=-csearch_path%3D{name}"

    def start(self) -> None:
        import psycopg

        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "fsync": "off",  # the machine does not go down in the tests; only processes are killed
            "max_connections": 60,
            "shared_buffers": "32MB",
        }
        words = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        log = (self.home / "log").open("ab")
        self.process = subprocess.Popen(
            [str(self.programs / "postgres"), "-D", str(self.home / "data"), *words],
            cwd="/",
            stdout=log,
            stderr=log,
            **self.account,
        )
        log.close()
        end = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.url, connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                if self.process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError((self.home / "log").read_text(errors="replace")) from None
                time.sleep(0.05)

    def stop(self, how: int = signal.SIGINT) -> None:
        """SIGINT: at once, in order. SIGQUIT: as a crash, all sessions cut off and nothing put away."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(60)
            self.process = None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running() -> Iterator[Server]:
    """A server, which is gone with all its data at the end."""
    programs = binaries()
    assert programs is not None
    home = Path(tempfile.mkdtemp(prefix="kilotune-postgres-"))
    try:
        server = Server(home, programs)
        server.start()
        try:
            yield server
        finally:
            server.stop(signal.SIGQUIT)  # its data goes with it
    finally:
        shutil.rmtree(home, ignore_errors=True)
