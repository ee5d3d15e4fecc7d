"""Install Chromium where the web page's tests are to run and it is not there; ``make test`` calls it.

    python scripts/chromium.py

On Debian and its kin, as root, the package ``chromium`` is installed. Anywhere else, or where that fails, nothing is
done but to say that the tests of the page are skipped.
"""

from __future__ import annotations

import os
import shutil
import sys

from postgresql import install

NAMES = ("chromium", "chromium-browser", "google-chrome")


def main() -> int:
    """Returns the exit code, which is always 0: all else is tested without a browser."""
    if any(map(shutil.which, NAMES)):
        return 0
    if shutil.which("apt-get") is not None and os.getuid() == 0:
        print("installing Chromium, for the tests of the web page", flush=True)
        if install("chromium"):
            return 0
    print("Chromium is not installed: the tests of the web page are skipped", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
