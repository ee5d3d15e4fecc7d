"""Install PostgreSQL where its tests are to run and it is not there; ``make test`` calls it.

    python scripts/postgresql.py

On Debian and its kin, as root, the package ``postgresql`` is installed. Anywhere else nothing is done but to say that
the tests of the store in PostgreSQL are skipped. The tests start a server of their own; none is left running by this.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = Path("/usr/lib/postgresql")  # where Debian puts what is not on the path


def installed(packages: Path = PACKAGES) -> bool:
    """Whether the programs that the tests need are there."""
    return shutil.which("initdb") is not None or any(packages.glob("*/bin/initdb"))


def install(package: str) -> bool:
    """Install a package of Debian's; False where that is not possible."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", package]):
        if subprocess.run(["apt-get", *words], env=environment, stdout=subprocess.DEVNULL).returncode:
            return False
    return True


def main() -> int:
    """Returns the exit code: 1 where it could not be installed though everything for that is there."""
    if installed():
        return 0
    if shutil.which("apt-get") is None or os.getuid() != 0:
        print("PostgreSQL is not installed: the tests of the store in PostgreSQL are skipped", flush=True)
        return 0
    print("installing PostgreSQL, for the tests of the store in it", flush=True)
    if install("postgresql") and installed():
        return 0
    print("error: apt-get could not install the package postgresql (its message is above)", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
