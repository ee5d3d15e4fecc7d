"""Set up ``.venv-clients``, in which clients of the service are tested: LangChain, litellm, lm-evaluation-harness.

    python scripts/clients_environment.py

They ask for sixty packages more, so they are no part of ``.venv``. This environment lies over that one: what is in
``.venv`` is found there, and only what is imported beside it is installed, some 20 packages and 300 MB. Like
``environment.py`` it ends at once when all is there, and goes on where it was cut off.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
from pathlib import Path

import environment

ROOT = environment.ROOT
VENV = ROOT / ".venv-clients"
PINS = ROOT / "tests" / "serve_clients" / "requirements.txt"
STAMP = VENV / "kilotune-clients.stamp"
BELOW = "import site; site.addsitedir({place!r})\n"


def wanted(version: tuple[int, ...]) -> str:
    """What a finished set-up depends on."""
    digest = hashlib.sha256(f"{ROOT} {version} {sysconfig.get_path('purelib')}".encode())
    for path in (PINS, Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def install(version: tuple[int, ...]) -> None:
    """The packages, over those of the environment that runs this."""
    print("installing clients for the tests of the service", flush=True)
    packages = VENV / "lib" / f"python{environment.dotted(version)}" / "site-packages"
    (packages / "kilotune-below.pth").write_text(BELOW.format(place=sysconfig.get_path("purelib")))
    command = [str(environment.venv_python(VENV)), "-m", "pip", "install", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-compile", "--quiet", "--requirement", str(PINS)]
    if subprocess.run(command, cwd=str(ROOT)).returncode:
        raise environment.SetupError("pip failed (its message is above); once that is mended, run make again")


def prepare() -> None:
    """Bring it to where clients can be tested."""
    version = environment.usable(VENV, explicit=True)
    text = wanted(version)
    if not (STAMP.exists() and STAMP.read_text() == text):
        install(version)
        environment.write_stamp(STAMP, text)


if __name__ == "__main__":
    sys.exit(environment.run(prepare))
