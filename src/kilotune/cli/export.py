"""``kilotune export``: an adapter in a form that other tools take: a merged model, a LoRA, or a LoRA in GGUF."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

import typer

from .._ui.sizes import readable_bytes
from ..errors import CheckpointError, ConfigError, check_one_of
from ..known_names import DTYPE_NAMES
from . import merge
from ._options import On
from ._output import Json, console, print_json, quiet_transformers, warn
from ._paths import check_adapter

if TYPE_CHECKING:
    from ..adapter_files.reading import AdapterFile
    from ..model.peft_model import PeftModel

__all__ = ["export"]

SUFFIX = ".gguf"


@final
class Form(StrEnum):
    """What an adapter can be exported to."""

    merged = "merged"
    lora = "lora"
    gguf = "gguf"


def export(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder, or a hub id.", metavar="ADAPTER")],
    to: Annotated[
        Form,
        typer.Option(
            "--to",
            help="merged: a model folder that needs no kilotune, as kilotune merge makes it. lora: a LoRA folder for "
            "PEFT, vLLM and others. gguf: a LoRA file for llama.cpp.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder to write; --to gguf: the file, which ends in .gguf.")
    ],
    base: Annotated[
        str | None,
        typer.Option(
            help="The base's folder or hub id; lora and gguf read only its config.json. Default: the hub id that the "
            "adapter names."
        ),
    ] = None,
    on: On = None,
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", help="lora, gguf: approximate with this rank; tells the errors.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"merged, gguf: the dtype of the weights: {', '.join(DTYPE_NAMES)}. Default: as they are stored; "
            "gguf: float32."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The base's revision, where it is a hub id.")] = None,
    adapter_revision: Annotated[str | None, typer.Option(help="The revision of ADAPTER, where it is a hub id.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT when it is there.")] = False,
    as_json: Json = False,
) -> None:
    """Export an adapter for other tools: a merged model, a LoRA folder, or a LoRA in GGUF for llama.cpp."""
    _check_options(to, rank, dtype)
    if to is Form.merged:
        merge.merge(
            adapter,
            out,
            base=base,
            on=on,
            dtype=dtype,
            revision=revision,
            adapter_revision=adapter_revision,
            force=force,
            as_json=as_json,
        )
        return
    check_adapter(adapter, base, revision, shapes=True)
    quiet_transformers()
    from ..convert import hollow
    from ..model.peft_model import PeftModel
    from ._adapter import apart, base_of, fitting_base, open_adapter, open_below

    _check_place(out, to, [adapter, *([base] if base else []), *([on] if on else [])], force)
    file = open_adapter(adapter, adapter_revision)
    below = open_below(file, on)
    source, revision = base_of(file, base, revision)
    with apart():
        model = PeftModel.from_pretrained(hollow(fitting_base(file, source, revision).model), file)
    if below is not None:
        model = _summed(model, below)
    write = _lora if to is Form.lora else _gguf
    document: dict[str, Any] = {
        "adapter": adapter,
        "on": on,
        "base": source,
        "out": str(out),
        "to": to.value,
        "method": file.method.name,
    }
    document.update(write(model, file, out, rank, dtype))
    for note in document["warnings"]:
        warn(note)
    if as_json:
        print_json(document)
    else:
        _show(document)


def _summed(model: PeftModel, below: AdapterFile) -> PeftModel:
    """A model of the same base with one LoRA in it, which is a stack."""
    from ..model.peft_model import PeftModel
    from ..train.finished.stack_export import summed
    from ._adapter import PERSONAL, SHARED, put_below

    put_below(model, below)
    whole = summed(model, {"the shared adapter": SHARED, "the personal one": PERSONAL})
    return PeftModel.from_pretrained(model.unload(), whole)


def _check_options(to: Form, rank: int | None, dtype: str | None) -> None:
    if rank is not None and to is Form.merged:
        raise ConfigError("--rank: is for --to lora and --to gguf; a merged model has no rank")
    if dtype is not None and to is Form.lora:
        raise ConfigError("--dtype: is for --to merged and --to gguf; a LoRA folder holds float32")
    if dtype is not None:
        check_one_of("--dtype", dtype, DTYPE_NAMES)


def _check_place(out: Path, to: Form, sources: list[str], force: bool) -> None:
    if to is Form.lora:
        from ._adapter import check_out

        check_out(out, sources, force)
        return
    if out.suffix != SUFFIX:
        raise ConfigError(f"--out {out}: --to gguf writes one file, whose name ends in {SUFFIX}, such as {out}{SUFFIX}")
    if out.is_dir():
        raise CheckpointError(f"the output {out} is a folder; expected a file, or nothing")
    if out.exists() and not force:
        raise CheckpointError(f"the output {out} is there; take another name, or give --force")


def _lora(model: PeftModel, file: AdapterFile, out: Path, rank: int | None, dtype: str | None) -> dict[str, Any]:
    from ..train.finished.lora_export import export_lora

    made = export_lora(model, rank=rank)
    made.conversion.save(out)
    config, tensors, _ = made.conversion.state
    return {
        "rank": made.rank,
        "alpha": config["lora_alpha"],
        "layers": sum(".lora_A" in key or ".lora_embedding_A" in key for key in tensors),
        "errors": dict(made.conversion.errors),
        "files": {path.name: path.stat().st_size for path in sorted(out.iterdir()) if path.is_file()},
        "warnings": list(made.notes),
    }


def _gguf(model: PeftModel, file: AdapterFile, out: Path, rank: int | None, dtype: str | None) -> dict[str, Any]:
    from ..plan import DTYPES
    from ..train.finished.gguf_lora import gguf_lora, write_gguf

    made = gguf_lora(model, rank=rank)
    write_gguf(made, out, dtype=DTYPES[dtype or "float32"], name=file.folder.resolve().name)
    return {
        "architecture": made.architecture,
        "rank": made.rank,
        "alpha": made.alpha,
        "layers": len(made.tensors) // 2,
        "dtype": dtype or "float32",
        "errors": dict(made.errors),
        "files": {out.name: out.stat().st_size},
        "warnings": [],
    }


def _show(document: dict[str, Any]) -> None:
    out = console()
    what = "a LoRA" if document["to"] == Form.lora else f"a LoRA for llama.cpp's {document['architecture']}"
    size = readable_bytes(sum(document["files"].values()))
    out.print(
        f"{document['method']} adapter {document['adapter']} as {what}: rank {document['rank']}, alpha "
        f"{document['alpha']:g}, {document['layers']} layers",
        markup=False,
    )
    if document["errors"]:
        name, error = max(document["errors"].items(), key=lambda item: item[1])
        out.print(f"approximated; the worst layer's relative error is {error:.4f} ({name})", markup=False)
    out.print(f"wrote {document['out']} ({size})", markup=False)
