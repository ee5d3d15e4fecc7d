"""PEFT's source package, fetched by pip when it is needed, and unpacked into a cache beside the environment.

The cache holds PEFT's tests (a package ``tests``), its sources (read for names, never imported), the small packages
that its tests import beside ours, and what is made for them: tiny models. It is complete or not there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
LISTS = ROOT / "tests" / "peft_own"
PINS = LISTS / "requirements.txt"
MODELS = Path(__file__).with_name("models.py")
CACHE = Path(sys.prefix) / "share" / "peft_own"
INI = """[pytest]
addopts = --strict-markers --disable-warnings -p no:cacheprovider -p no:schemathesis -p no:anyio -p no:hypothesispytest
markers =
    single_gpu_tests: of PEFT
    multi_gpu_tests: of PEFT
    regression: of PEFT
    bitsandbytes: of PEFT
    skipf: a slip of the pen of PEFT's
"""


class Source(NamedTuple):
    """Where things are in the cache."""

    home: Path

    @property
    def tests(self) -> Path:
        """PEFT's tests."""
        return self.home / "tests"

    @property
    def package(self) -> Path:
        """PEFT's sources; not on any path."""
        return self.home / "sources" / "peft"

    @property
    def packages(self) -> Path:
        """What its tests import that our environment does not have."""
        return self.home / "packages"

    @property
    def models(self) -> Path:
        """Tiny models in the place of those of the hub: what HF_HOME says."""
        return self.home / f"models-{digest_of(MODELS)}"


class FetchError(Exception):
    """pip could not fetch or install; the text is for the user."""


def digest_of(*paths: Path) -> str:
    """What a part of the cache depends on."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def pins() -> tuple[str, list[str]]:
    """(the pin of PEFT, the pins of what its tests import beside it)."""
    lines = [line.split("#")[0].strip() for line in PINS.read_text(encoding="utf-8").splitlines()]
    names = [line for line in lines if line]
    return next(name for name in names if name.startswith("peft==")), [n for n in names if not n.startswith("peft==")]


def pip(*arguments: str) -> None:
    """Run pip of this environment."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise FetchError(f"pip {' '.join(arguments)} failed:\n{done.stderr.strip()}")


def unpack(archive: Path, home: Path) -> None:
    """Of a source package, ``tests/`` and ``src/``."""
    with tarfile.open(archive) as tar:
        tar.extractall(home / "whole", filter="data")
    (top,) = (home / "whole").iterdir()
    (top / "tests").rename(home / "tests")
    (top / "src").rename(home / "sources")
    shutil.rmtree(home / "whole")
    (home / "tests" / "__init__.py").touch()  # its tests import each other from a package, whose file the archive lacks
    (home / "pytest.ini").write_text(INI, encoding="utf-8")


def make_models(source: Source) -> None:
    """Make the stand-ins for the hub's models, with PEFT itself, in processes of their own."""
    with tempfile.TemporaryDirectory(dir=source.home) as name:
        made = Path(name) / "made"
        env = {
            **os.environ,
            "HF_HOME": str(made),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": f"{ROOT / 'scripts'}:{source.packages}",
        }
        for step in ("models", "adapters", "pipelines"):
            command = [sys.executable, "-m", "peft_own.models", step, str(made)]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode:
                raise FetchError(f"no stand-ins for the hub's models:\n{done.stderr[-2000:]}")
        if not source.models.exists():
            made.rename(source.models)


def fetch(cache: Path = CACHE) -> Source:
    """The cache, made where it is not there; for these pins, so another PEFT has another folder."""
    home = cache / digest_of(PINS, Path(__file__))
    if not home.exists():
        peft, others = pins()
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as name:
            made = Path(name) / "made"
            made.mkdir()
            pip("download", peft, "--no-binary", "peft", "--no-deps", "--no-build-isolation", "--dest", name)
            unpack(next(Path(name).glob("peft-*.tar.gz")), made)
            pip("install", "--no-deps", "--target", str(made / "packages"), *others)
            if not home.exists():
                made.rename(home)
    source = Source(home)
    if not source.models.exists():
        make_models(source)
    return source
