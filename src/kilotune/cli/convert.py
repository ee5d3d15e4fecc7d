"""``kilotune convert``: an adapter in another form."""

from __future__ import annotations

import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, final

import typer

from .._ui.sizes import readable_bytes
from ..errors import ConfigError
from ._output import Json, console, print_json, quiet_transformers, rows_table
from ._paths import check_adapter

if TYPE_CHECKING:
    from ..adapter_files.reading import AdapterFile
    from ..convert import Conversion

__all__ = ["convert"]

SHOWN = 24


@final
class Form(StrEnum):
    """What an adapter can be converted to."""

    peft = "peft"
    kilotune = "kilotune"
    lora = "lora"


def convert(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder, or a hub id.", metavar="ADAPTER")],
    out: Annotated[Path, typer.Argument(help="The folder to write.", metavar="OUT")],
    to: Annotated[
        Form,
        typer.Option(
            "--to",
            help="peft: VeRA with its frozen matrices in the file. kilotune: VeRA without them, where a seed gives "
            "them back bit for bit. lora: a LoRA of the same rank, exactly, or of a smaller one (--rank).",
        ),
    ],
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", help="Only --to lora: approximate with this rank; prints the errors.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base: config.json or its folder, built-in name or hub id; only its shapes are read. Default: "
            "the hub id that the adapter names. A LoRA that only changes its form needs none."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The base's revision, where it is a hub id.")] = None,
    adapter_revision: Annotated[str | None, typer.Option(help="The revision of ADAPTER, where it is a hub id.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write into OUT even when it holds something.")] = False,
    as_json: Json = False,
) -> None:
    """Convert an adapter: PEFT's form to ours and back, VeRA to an exact LoRA or to one of a smaller rank."""
    if rank is not None and to is not Form.lora:
        raise ConfigError(f"--rank is for --to lora; --to {to.value} keeps the rank")
    check_adapter(adapter, base, revision, shapes=True)
    quiet_transformers()
    from ..adapter_files.stands_on import StandsOn, with_mark
    from ..convert import rewrite
    from ..methods import VeraConfig
    from ._adapter import check_out, open_adapter

    check_out(out, [adapter], force)
    file = open_adapter(adapter, adapter_revision)
    if to is not Form.lora and not isinstance(file.config, VeraConfig) and base is None:
        if revision is not None:
            raise ConfigError("--revision is of --base, which is not given (and not needed here)")
        result = rewrite(file)
    else:
        result = _with_base(file, to, rank, base, revision)
    config, tensors, header = result.state  # what it stands on, it goes on to stand on
    result = replace(result, state=(config, tensors, with_mark(header, StandsOn.of_header(file.metadata))))
    result.save(out)
    written = {path.name: path.stat().st_size for path in sorted(out.iterdir()) if path.is_file()}
    if as_json:
        worst = result.worst
        print_json(
            {
                "adapter": adapter,
                "out": str(out),
                "to": to.value,
                "what": result.what,
                "errors": dict(result.errors),
                "worst": None if worst is None else {"layer": worst[0], "error": worst[1]},
                "files": written,
            }
        )
    else:
        _show(result, out, written)


def _with_base(file: AdapterFile, to: Form, rank: int | None, base: str | None, revision: str | None) -> Conversion:
    from ..convert import hollow, to_kilotune, to_lora, to_peft
    from ..model.peft_model import PeftModel
    from ._adapter import apart, base_of, fitting_base

    found = fitting_base(file, *base_of(file, base, revision))
    with apart():  # what it stands on stays what it is
        model = PeftModel.from_pretrained(hollow(found.model), file)
    if to is Form.lora:
        return to_lora(model, rank=rank, progressbar=sys.stderr.isatty())
    return to_peft(model) if to is Form.peft else to_kilotune(model)


def _show(result: Conversion, out: Path, files: dict[str, int]) -> None:
    screen = console()
    screen.print(result.what, markup=False)
    if result.errors:
        worst = sorted(result.errors.items(), key=lambda item: -item[1])
        rows = [(name, f"{error:.4f}") for name, error in worst[:SHOWN]]
        screen.print(rows_table("Relative error of each layer's change, worst first", ("|error| / |change|",), rows))
        if len(worst) > SHOWN:
            screen.print(f"... and {len(worst) - SHOWN} more, at most {worst[SHOWN][1]:.4f} (--json has them all)")
        mean = sum(result.errors.values()) / len(worst)
        screen.print(f"worst {worst[0][1]:.4f} ({worst[0][0]}), mean {mean:.4f}", markup=False)
    sizes = ", ".join(f"{name} {readable_bytes(size)}" for name, size in files.items())
    screen.print(f"wrote {out}: {sizes}", markup=False)
