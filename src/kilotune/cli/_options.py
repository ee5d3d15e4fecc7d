"""The options that chat, generate and evaluate share."""

from __future__ import annotations

from typing import Annotated

import typer

from ..train.finished.sampling_options import Sampling
from ..train.settings.sections import ModelSettings, TrainingSettings

__all__ = [
    "Adapter",
    "AdapterRevision",
    "Alone",
    "Base",
    "Device",
    "Dtype",
    "MaxTokens",
    "On",
    "Plain",
    "Quantization",
    "Revision",
    "Seed",
    "Stop",
    "System",
    "Temperature",
    "TopK",
    "TopP",
]

Adapter = Annotated[
    str, typer.Argument(help="An adapter's folder or hub id, or a folder with a whole model.", metavar="ADAPTER")
]
Base = Annotated[
    str | None, typer.Option(help="The base's folder or hub id. Default: the hub id that the adapter names.")
]
Revision = Annotated[str | None, typer.Option(help="The base's revision, where it is a hub id.")]
AdapterRevision = Annotated[str | None, typer.Option(help="The revision of ADAPTER, where it is a hub id.")]
Alone = Annotated[bool, typer.Option("--base-alone", help="Switch the adapter off, to see what the base does.")]
On = Annotated[
    str | None,
    typer.Option(
        "--on", metavar="SHARED", help="The shared adapter that ADAPTER was trained on top of: a folder or hub id."
    ),
]
Dtype = Annotated[str, typer.Option(help=ModelSettings.help_of("dtype"))]
Quantization = Annotated[str, typer.Option(help=ModelSettings.help_of("quantization"))]
Device = Annotated[str, typer.Option(help=TrainingSettings.help_of("device"))]
System = Annotated[str | None, typer.Option(help="The system message of the chat template.")]
Plain = Annotated[
    bool | None,
    typer.Option(
        "--plain/--template",
        help="Give the model the prompt as it stands; or in the chat template, with what was said before it. Default: "
        "as it was trained, where its folder says that; else the template, where the tokenizer has one.",
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help=Sampling.help_of("max_tokens"))]
Temperature = Annotated[float, typer.Option("--temperature", "-t", help=Sampling.help_of("temperature"))]
TopP = Annotated[float | None, typer.Option(help=Sampling.help_of("top_p"))]
TopK = Annotated[int | None, typer.Option(help=Sampling.help_of("top_k"))]
Seed = Annotated[int | None, typer.Option(help=Sampling.help_of("seed"))]
Stop = Annotated[list[str] | None, typer.Option(help=Sampling.help_of("stop"))]
