"""``kilotune inspect``: what is in an adapter folder, and whether it is what was written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._ui.sizes import readable_bytes
from ..adapter_files.names import WEIGHTS_NAME
from ..errors import CheckpointError, ConfigError
from ._output import Json, complain, console, print_json, quiet_transformers, rows_table
from ._paths import check_adapter

if TYPE_CHECKING:
    from ..adapter_files.reading import AdapterFile
    from ..plan import Base

__all__ = ["inspect"]

VERIFIED, ABSENT, MISMATCH = "verified", "not present", "MISMATCH"
NEEDS_BASE = "present, not verified: give --base"
IN_FILE = "none needed: the matrices are in the file"
SHOWN = 24
NO = 1


def inspect(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder, or a hub id.", metavar="ADAPTER")],
    base: Annotated[
        str | None,
        typer.Option(
            help="The base: config.json or its folder, built-in name or hub id. Its shapes are held against the "
            "adapter's, and the frozen matrices against their checksum; no weights are loaded."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The revision of --base, where it is a hub id.")] = None,
    adapter_revision: Annotated[str | None, typer.Option(help="The revision of ADAPTER, where it is a hub id.")] = None,
    every: Annotated[bool, typer.Option("--all", help=f"List every tensor, not {SHOWN} at most.")] = False,
    as_json: Json = False,
) -> None:
    """Show what is in an adapter folder, and verify its checksums. Exits with 1 where one does not match."""
    if revision is not None and base is None:
        raise ConfigError("--revision is of --base, which is not given")
    check_adapter(adapter, base, revision, shapes=True)
    quiet_transformers()
    from ._adapter import fitting_base, open_adapter

    try:
        file = open_adapter(adapter, adapter_revision)
    except CheckpointError:
        damage = _damage(adapter)
        if damage is None:
            raise
        _tell_damage(damage, as_json)
        raise typer.Exit(NO) from None
    fitting = None if base is None else fitting_base(file, base, revision)
    checked, wrong = _projections(file, fitting)
    document = _document(file, checked, base)
    if as_json:
        print_json(document)
    else:
        _show(document, every)
    if wrong:
        complain(wrong)
    if wrong or document["non_finite"]:
        raise typer.Exit(NO)


def _damage(adapter: str) -> dict[str, Any] | None:
    """The two checksums, where the only thing wrong with a local adapter's tensors is that they differ."""
    from safetensors import SafetensorError, safe_open

    from ..adapter_files.files import tensors_checksum

    path = Path(adapter) / WEIGHTS_NAME
    try:
        with safe_open(path, "pt") as opened:
            expected = (opened.metadata() or {}).get("kilotune_sha256")
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no dictionary
    except (SafetensorError, OSError):
        return None
    actual = tensors_checksum(tensors)
    if expected in (None, actual):
        return None
    return {"folder": adapter, "checksums": {"tensors": MISMATCH}, "expected": expected, "got": actual}


def _tell_damage(damage: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(damage)
    complain(
        f"{damage['folder']}: tensors: {MISMATCH}: expected SHA-256 {damage['expected']}, got {damage['got']}; the "
        "file was changed after it was written"
    )


def _projections(file: AdapterFile, base: Base | None) -> tuple[str, str | None]:
    """What is known of the frozen matrices, and what is wrong."""
    if file.checksum is None:
        return (IN_FILE if file.brought else ABSENT), None
    if base is None:
        return NEEDS_BASE, None
    from ..model.peft_model import PeftModel
    from ._adapter import apart

    try:
        with apart():
            PeftModel.from_pretrained(base.model, file)
    except CheckpointError as error:  # it fits, so only the matrices are left to be wrong
        return MISMATCH, f"projections: {MISMATCH}: {error}"
    return VERIFIED, None


def _document(file: AdapterFile, projections: str, base: str | None) -> dict[str, Any]:
    import torch

    from ..adapter_files.content import content_sha256
    from ..adapter_files.stands_on import StandsOn
    from ..methods import Kept

    config = file.config
    tensors = {**file.tensors, **file.extra}
    paths = sorted(path for path in file.folder.iterdir() if path.is_file())
    broken = [key for key, value in tensors.items() if not bool(torch.isfinite(value).all())]
    values = {**config.to_dict(), **config.ours()}
    numbers = Counter[Kept]()
    for key, said in file.said.items():  # what is none of the method's is trained: biases, modules saved whole
        numbers[said.kept or Kept.TRAINED] += file.files.tensors[key].numel()
    layers = {said.layer for said in file.said.values() if said.layer} or set(values.get("site_order") or ())
    mark = StandsOn.of_header(file.metadata)
    return {
        "folder": str(file.folder),
        "method": file.method.name,
        "rank": values.get("r"),
        "targets": values["target_modules"],
        "base": config.base_model_name_or_path,
        "written_for": "kilotune" if file.section else "PEFT and kilotune",
        "config": values,
        "layers": len(layers),
        "trained": numbers[Kept.TRAINED],
        "frozen": numbers[Kept.FROZEN],
        "stored_projections": numbers[Kept.BROUGHT],
        "tensor_bytes": sum(value.numel() * value.element_size() for value in tensors.values()),
        "files": {path.name: path.stat().st_size for path in paths},
        "checksums": {
            "tensors": VERIFIED if "kilotune_sha256" in file.metadata else ABSENT,
            "projections": projections,
        },
        "fits": base,
        "stands_on": None if mark is None else mark.to_dict(),
        "content_sha256": content_sha256(file),
        "non_finite": broken,
        "tensors": {
            key: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            for key, value in tensors.items()
        },
        "metadata": file.metadata,
    }


def _show(document: dict[str, Any], every: bool) -> None:
    out = console()
    targets = document["targets"]
    checks = document["checksums"]
    base = document["base"] or "not said"
    rows = [
        ("method", f"{document['method']}, rank {document['rank']}"),
        ("targets", targets if isinstance(targets, str) else ", ".join(targets)),
        ("base model", f"{base}; the adapter fits {document['fits']}" if document["fits"] else base),
        ("written for", document["written_for"]),
        ("adapted layers", f"{document['layers']:,}"),
        ("trained numbers", f"{document['trained']:,}"),
        ("frozen numbers of its own", f"{document['frozen']:,}"),
        ("stored projections", f"{document['stored_projections']:,}"),
        ("tensors", f"{len(document['tensors']):,}, {readable_bytes(document['tensor_bytes'])}"),
        ("files", ", ".join(f"{name} {readable_bytes(size)}" for name, size in document["files"].items())),
        ("checksum of the tensors", checks["tensors"]),
        ("checksum of the projections", checks["projections"]),
        ("not finite", ", ".join(document["non_finite"]) or "nothing"),
    ]
    if (on := document["stands_on"]) is not None:
        rows.insert(3, ("stands on", f"{on['name']}, contents {on['sha256'][:12]}..."))
    out.print(rows_table(document["folder"], ("",), rows, justify="left"))
    tensors = list(document["tensors"].items())
    shown = tensors if every else tensors[:SHOWN]
    listed = [(key, str(tuple(value["shape"])), value["dtype"]) for key, value in shown]
    out.print(rows_table("Tensors", ("shape", "dtype"), listed))
    if len(shown) < len(tensors):
        out.print(f"... and {len(tensors) - len(shown):,} more (--all lists them)")
