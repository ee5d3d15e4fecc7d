"""``kilotune doctor``: versions, devices, and what each optional package that is missing costs."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import typer

from .._ui.sizes import readable_bytes
from ..errors import first_line
from ._output import Json, console, print_json, rows_table

if TYPE_CHECKING:
    from ..train.running.memory import Machine

__all__ = ["doctor"]

FOR: Mapping[str, str] = {
    "accelerate": "kilotune train, compare",
    "bitsandbytes": "4-bit and int8 weights: model.quantization nf4, int8",
    "datasets": "data sets of the hub",
    "fastapi": "kilotune serve",
    "gguf": "models in GGUF files, kilotune export to llama.cpp",
    "httptools": "kilotune serve",
    "huggingface-hub": "models, adapters and data by hub id",
    "jinja2": "reports",
    "jsonschema-rs": "tools in kilotune serve, and answers that fit a JSON schema",
    "llguidance": "answers of a form in kilotune serve (response_format, guided_regex, tools that must be called)",
    "matplotlib": "reports and plots",
    "opentelemetry-exporter-otlp-proto-http": "serve.telemetry",
    "opentelemetry-sdk": "serve.telemetry",
    "pillow": "images",
    "prometheus-client": "the metrics of kilotune serve",
    "psycopg": "a store of adapters in PostgreSQL",
    "psycopg-pool": "a store of adapters in PostgreSQL, for several threads",
    "pyarrow": "Parquet files",
    "pyjwt": "for which of its users a backend asks kilotune serve",
    "python-multipart": "adapters that are put into kilotune serve",
    "pyyaml": "config files",
    "ray": "replicas of kilotune serve",
    "rich": "the command line, the progress bar",
    "sacrebleu": "the metrics of sequence to sequence",
    "scikit-learn": "kilotune experiment cnn, the metrics of classification",
    "scipy": "the metrics of regression",
    "tensorboard": "logging.tensorboard",
    "torchao": "weights in torchao's formats",
    "transformers": "models of transformers",
    "typer": "the command line",
    "uvicorn": "kilotune serve",
    "uvloop": "kilotune serve",
}
"""What goes missing with each package that an extra names."""
MODULES: Mapping[str, str] = {
    "opentelemetry-exporter-otlp-proto-http": "opentelemetry.exporter.otlp.proto.http",
    "opentelemetry-sdk": "opentelemetry.sdk",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "prometheus-client": "prometheus_client",
    "pyjwt": "jwt",
    "psycopg-pool": "psycopg_pool",
    "jsonschema-rs": "jsonschema_rs",
    "python-multipart": "python_multipart",
}
"""Packages whose module has another name."""
NOT_FOR_USERS = ("docs", "test", "dev", "all", "vllm")  # vLLM wants an environment of its own: docs/vllm.md
USUAL = "train"  # of extras that bring a package alike
REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])? *([^;]*)(?:;.*extra == ['\"]([^'\"]+)['\"])?")
FAILED = 1


@final
@dataclass(frozen=True)
class Package:
    """An optional package. state: ok, missing, broken (it cannot be imported), or outside (of the versions wanted)."""

    name: str
    extra: str
    purpose: str
    wanted: str
    version: str | None
    state: str
    trouble: str = ""


@final
@dataclass(frozen=True)
class Device:
    """Something to compute on. Bytes are 0 where the system does not tell."""

    name: str
    kind: str
    total: int
    free: int
    notes: str


def doctor(as_json: Json = False) -> None:
    """Show versions, devices and optional features, and what each missing one costs; 1 where something is broken."""
    from importlib import metadata

    import torch

    packages, devices = packages_here(), devices_here()
    problems, advice = _problems(packages), _advice(packages, devices)
    document = {
        "kilotune": metadata.version("kilotune"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "devices": [asdict(device) for device in devices],
        "packages": [asdict(package) for package in packages],
        "problems": problems,
        "advice": advice,
    }
    if as_json:
        print_json(document)
    else:
        _show(document, packages, devices)
    if problems:
        raise typer.Exit(FAILED)


# -- packages ------------------------------------------------------------------------------------------


def packages_here() -> list[Package]:
    """Every package that an extra for users names, by name."""
    from importlib import metadata

    return [_package(name, *found) for name, found in sorted(extras_of(metadata.requires("kilotune") or ()).items())]


def extras_of(requirements: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Package -> (versions, the extra to install it by), of what a distribution requires.

    Installed files say of each extra all that comes with it, what its inner extras bring too: ``ray`` has all of
    ``serve``. So an extra that holds another one with the package is not meant, and of the rest it is the usual one.
    """
    listed: dict[str, dict[str, str]] = {}
    for line in requirements:
        match = REQUIREMENT.match(line)
        if match is not None and match[3] is not None and match[3] not in NOT_FOR_USERS:
            name = re.sub(r"[-_.]+", "-", match[1]).lower()
            listed.setdefault(match[3], {})[name] = match[2].strip()
    found: dict[str, tuple[str, str]] = {}
    for name in {name for own in listed.values() for name in own} - {"kilotune"}:
        having = {extra: set(own) for extra, own in listed.items() if name in own}
        least = [extra for extra, own in having.items() if not any(other < own for other in having.values())]
        extra = USUAL if USUAL in least else min(least)
        found[name] = (listed[extra][name], extra)
    return found


def _package(name: str, wanted: str, extra: str) -> Package:
    from importlib import metadata

    purpose = FOR.get(name, "")
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Package(name, extra, purpose, wanted, None, "missing")
    try:
        with _silence():
            importlib.import_module(MODULES.get(name, name.replace("-", "_")))
    except Exception as error:  # whatever a broken package does
        return Package(name, extra, purpose, wanted, version, "broken", f"{type(error).__name__}: {first_line(error)}")
    if not _within(version, wanted):
        return Package(name, extra, purpose, wanted, version, "outside", f"tested with {wanted}")
    return Package(name, extra, purpose, wanted, version, "ok")


def _within(version: str, wanted: str) -> bool:
    """Whether a version is one of those wanted; yes where nobody can tell."""
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True
    return not wanted or SpecifierSet(wanted).contains(version, prereleases=True)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What packages say while they are imported is not for here."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    nowhere = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# -- devices -------------------------------------------------------------------------------------------


def devices_here() -> list[Device]:
    """The CPU first."""
    import torch

    from ..train.running.memory import machine_of

    machine = machine_of(torch.device("cpu"))
    notes = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    found = [_device(machine, "cpu", notes)]
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(number)
            bfloat16 = "bfloat16" if major >= 8 else "no bfloat16"
            device = torch.device("cuda", number)
            found.append(_device(machine_of(device), "cuda", f"capability {major}.{minor}, {bfloat16}"))
    if torch.backends.mps.is_available():
        found.append(Device("Apple GPU", "mps", 0, 0, "kilotune train does not use it"))
    return found


def _device(machine: Machine, kind: str, notes: str) -> Device:
    return Device(machine.name, kind, machine.total, machine.free, notes)


# -- what is wrong, and what would help ----------------------------------------------------------------


def _problems(packages: list[Package]) -> list[str]:
    found = [
        f"{p.name} {p.version} cannot be imported ({p.trouble}); so these do not work: {p.purpose}"
        for p in packages
        if p.state == "broken"
    ]
    found += [
        f"{p.name} {p.version} is not one of the versions that kilotune is made for ({p.wanted}): pip install "
        f"'kilotune[{p.extra}]'"
        for p in packages
        if p.state == "outside"
    ]
    return found


def _advice(packages: list[Package], devices: list[Device]) -> list[str]:
    import torch

    missing: dict[str, list[str]] = {}
    for package in packages:
        if package.state == "missing":
            missing.setdefault(package.extra, []).append(f"{package.name} ({package.purpose})")
    found = [f"pip install 'kilotune[{extra}]' for {', '.join(names)}" for extra, names in missing.items()]
    if not any(device.kind == "cuda" for device in devices) and _has_nvidia():
        build = "a build without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        found.append(
            f"there is an NVIDIA GPU, and torch ({build}) does not see it: see https://pytorch.org/get-started"
        )
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        found.append("torch.compile needs a C++ compiler, and there is none")
    free = shutil.disk_usage(".").free
    if free < 1_000_000_000:
        found.append(f"only {readable_bytes(free)} are free on this disk")
    return found


def _has_nvidia() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _show(document: Mapping[str, Any], packages: list[Package], devices: list[Device]) -> None:
    out = console()
    cuda = f"CUDA {document['cuda']}" if document["cuda"] else "no CUDA"
    versions = f"kilotune {document['kilotune']}, Python {document['python']}, torch {document['torch']} ({cuda})"
    out.print(f"{versions}, {document['platform']}", markup=False)
    rows = [
        (d.name, readable_bytes(d.total) if d.total else "?", readable_bytes(d.free) if d.total else "?", d.notes)
        for d in devices
    ]
    out.print(rows_table("Devices", ["memory", "free", ""], rows, justify="left"))
    told = [(p.name, p.version or "-", p.state, p.extra, p.purpose) for p in packages]
    out.print(rows_table("Optional packages", ["version", "", "extra", "without it there is no"], told, justify="left"))
    for line in document["problems"]:
        out.print(f"Problem: {line}", markup=False)
    for line in document["advice"]:
        out.print(f"To have more: {line}", markup=False)
    if not document["problems"]:
        out.print("Nothing is broken.")
