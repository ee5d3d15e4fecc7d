"""``kilotune generate``: what a model with an adapter writes after a prompt."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from ..train.finished.sampling_options import Sampling
from ._options import (
    Adapter,
    AdapterRevision,
    Alone,
    Base,
    Device,
    Dtype,
    MaxTokens,
    On,
    Plain,
    Quantization,
    Revision,
    Seed,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
)
from ._output import Json, print_json, warn
from ._paths import check_adapter
from ._weights import Weights

if TYPE_CHECKING:
    from ..train.finished.text_generation import Answer, Chat
    from ._writing import Opened

__all__ = ["generate"]


def generate(
    adapter: Adapter,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt. Default: all of standard input.", metavar="PROMPT")
    ] = None,
    base: Base = None,
    on: On = None,
    system: System = None,
    plain: Plain = None,
    max_tokens: MaxTokens = Sampling.max_tokens,
    temperature: Temperature = Sampling.temperature,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    base_alone: Alone = False,
    dtype: Dtype = "auto",
    quantization: Quantization = "none",
    device: Device = "auto",
    revision: Revision = None,
    adapter_revision: AdapterRevision = None,
    as_json: Json = False,
) -> None:
    """Let a model with an adapter go on from a prompt; the text appears as it is written."""
    sampling = Sampling(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=tuple(stop or ())
    )
    weights = Weights(dtype, quantization, device)
    check_adapter(adapter, base, revision, whole=True, on=on)
    text = prompt if prompt is not None else _piped()
    from ._writing import alone, open_writer, show, silence

    opened = open_writer(adapter, adapter_revision, base, revision, weights, sampling, on)
    chat = opened.chat(system, plain)
    with alone(opened, base_alone):
        answer = chat.ask(text, None if as_json else show)
    if as_json:
        print_json(_document(opened, chat, text, answer, base_alone))
    else:
        print(flush=True)
    if (why := silence(answer, chat)) is not None:
        warn(why)
    if answer.reason == "interrupted":
        raise KeyboardInterrupt


def _piped() -> str:
    """Standard input, without the line break at its end.

    Raises:
        ConfigError: it is a keyboard, so nothing would happen.

    """
    if sys.stdin.isatty():
        raise ConfigError("no prompt: give one after the adapter, or pipe it in; kilotune chat is for talking")
    return sys.stdin.read().removesuffix("\n")


def _document(opened: Opened, chat: Chat, prompt: str, answer: Answer, base_alone: bool) -> dict[str, Any]:
    return {
        "adapter": None if base_alone else opened.adapter,
        "on": opened.on,
        "base": opened.base,
        "prompt": prompt,
        "template": not chat.plain,
        "text": answer.text,
        "reason": answer.reason,
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "seconds": answer.seconds,
        "tokens_per_second": answer.tokens / answer.seconds,
        "sampling": opened.writer.sampling.to_dict(),
    }
