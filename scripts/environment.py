"""Set up ``.venv`` for one extra of kilotune, once; the Makefile calls it before anything else.

    python scripts/environment.py demo|dev|docs [--explicit]

It ends at once when the set-up is complete and nothing that it depends on changed. The stamp that says so is
written last, so an interrupted set-up is simply taken up again by the next run. ``--explicit`` says that the
user chose this Python, so a ``.venv`` of another version is an error and not a convenience.

This file runs before any version check, so it keeps to what Python 3.7 can read.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LOWEST, HIGHEST = (3, 11), (3, 13)
ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
# An extra that is contained in another one needs no set-up of its own once that is there.
CONTAINED_IN = {"demo": ("demo", "dev"), "dev": ("dev",), "docs": ("docs",)}


class SetupError(Exception):
    """A set-up that cannot go on; the text is for the user."""


def dotted(version: tuple[int, ...]) -> str:
    """``(3, 11)`` as ``3.11``."""
    return ".".join(map(str, version))


def supported(version: tuple[int, ...]) -> bool:
    """Whether kilotune runs on this Python."""
    return LOWEST <= version[:2] <= HIGHEST


def venv_python(venv: Path) -> Path:
    """The interpreter inside ``venv``."""
    return venv / "bin" / "python"


def venv_version(venv: Path) -> tuple[int, ...] | None:
    """The Python version of ``venv``, or None when it does not run or has no pip."""
    code = "import sys, pip; print(*sys.version_info[:2])"
    try:
        done = subprocess.run([str(venv_python(venv)), "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    major, minor = done.stdout.split()
    return int(major), int(minor)


def check_existing(venv: Path, explicit: bool) -> bool:
    """Whether ``venv`` is there and usable; a broken one is removed, a foreign one is an error."""
    if not venv.exists():
        return False
    version = venv_version(venv)
    if version is None:
        if not (venv / "pyvenv.cfg").exists() and any(venv.iterdir()):
            raise SetupError(f"{venv.name} is not a virtual environment: move it away, then run make again")
        print(f"{venv.name} is incomplete or its Python is gone: building it anew", flush=True)
        shutil.rmtree(venv)
        return False
    if not supported(version):
        raise SetupError(
            f"{venv.name} is of Python {dotted(version)}, kilotune needs {dotted(LOWEST)} to {dotted(HIGHEST)}: "
            f"remove {venv.name}, then run make again"
        )
    if explicit and version != sys.version_info[:2]:
        raise SetupError(
            f"{venv.name} is of Python {dotted(version)}, PYTHON is {dotted(sys.version_info[:2])}: "
            f"remove {venv.name}, or leave PYTHON out"
        )
    return True


def create(venv: Path) -> None:
    """Make ``venv`` with the running Python."""
    version = sys.version_info[:2]
    if not supported(version):
        raise SetupError(
            f"kilotune needs Python {dotted(LOWEST)} to {dotted(HIGHEST)}, {sys.executable} is {dotted(version)}: "
            f"name another one, as in `make demo PYTHON=python{dotted(LOWEST)}`"
        )
    print(f"creating {venv.name} with Python {dotted(version)}", flush=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    except subprocess.CalledProcessError:
        shutil.rmtree(venv, ignore_errors=True)
        raise SetupError("python -m venv failed (its message is above); Debian and Ubuntu need python3-venv") from None


def fingerprint(root: Path, version: tuple[int, ...]) -> str:
    """What a finished set-up depends on: the requirements, the Python version, and where the tree lies."""
    digest = hashlib.sha256(f"{root} {version}".encode())
    project, _, _ = (root / "pyproject.toml").read_text(encoding="utf-8").partition("\n[tool.")
    digest.update(project.encode())  # a linter's settings change no installation
    digest.update((root / "constraints.txt").read_bytes())
    return digest.hexdigest()


def stamp(venv: Path, extra: str) -> Path:
    """The file that says that ``extra`` is installed."""
    return venv / f"kilotune-{extra}.stamp"


def is_ready(root: Path, venv: Path, extra: str, wanted: str) -> bool:
    """Whether ``extra`` was installed from files that are still the same."""
    stamps = [stamp(venv, name) for name in CONTAINED_IN[extra]]
    return any(path.exists() and path.read_text() == wanted for path in stamps)


def install(root: Path, venv: Path, extra: str) -> None:
    """Install kilotune, editable, with ``extra`` from the tested set of versions."""
    command = [str(venv_python(venv)), "-m", "pip", "install", "--disable-pip-version-check"]
    if any(venv.glob("lib/*/site-packages/torch/version.py")):
        print(f"bringing kilotune[{extra}] up to date", flush=True)
        command.append("--quiet")  # nothing large is left to wait for
    else:
        print(f"installing kilotune[{extra}]; this takes minutes, most of it PyTorch", flush=True)
    command += ["--constraint", str(root / "constraints.txt"), "--editable", f"{root}[{extra}]"]
    done = subprocess.run(command, cwd=str(root))
    if done.returncode:
        raise SetupError("pip failed (its message is above); once that is mended, run make again: it goes on from here")


@contextmanager
def lock(root: Path) -> Iterator[None]:
    """Hold off a second set-up of this tree until this one ended."""
    import fcntl

    with open(root / "pyproject.toml") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("another set-up is running: waiting for it", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def usable(venv: Path, explicit: bool) -> tuple[int, ...]:
    """Make ``venv`` where it is not there; the version of its Python."""
    if not check_existing(venv, explicit):
        create(venv)
    version = venv_version(venv)
    if version is None:
        raise SetupError(f"{venv.name} was made but does not run: remove it, then run make again")
    return version


def write_stamp(path: Path, wanted: str) -> None:
    """Say that a set-up is complete; whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(wanted)
    os.replace(temporary, path)


def prepare(root: Path, venv: Path, extra: str, explicit: bool) -> None:
    """Bring ``venv`` to where ``extra`` can be used."""
    wanted = fingerprint(root, usable(venv, explicit))
    if not is_ready(root, venv, extra, wanted):
        install(root, venv, extra)
        write_stamp(stamp(venv, extra), wanted)


def run(work: Callable[[], None]) -> int:
    """Do ``work``, which no other set-up of this tree does meanwhile; returns the exit code."""
    try:
        with lock(ROOT):
            work()
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run make again: it goes on from here", file=sys.stderr)
        return 130
    return 0


def main(arguments: list[str]) -> int:
    """Run from the command line; returns the exit code."""
    names = [word for word in arguments if word != "--explicit"]
    if len(names) != 1 or names[0] not in CONTAINED_IN:
        print(f"usage: environment.py {'|'.join(CONTAINED_IN)} [--explicit]", file=sys.stderr)
        return 2
    return run(lambda: prepare(ROOT, VENV, names[0], "--explicit" in arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
