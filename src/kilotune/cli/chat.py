"""``kilotune chat``: talk to a model with an adapter."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, KilotuneError, did_you_mean
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
from ._output import Json, complain, print_json, warn
from ._paths import check_adapter
from ._weights import Weights

if TYPE_CHECKING:
    from ..train.finished.text_generation import Answer, Chat
    from ._writing import Opened

__all__ = ["chat"]

RESET, EXIT, HELP = "/reset", "/exit", "/help"
COMMANDS = {RESET: "forget what was said", EXIT: "end (so does Ctrl-D)", HELP: "this list"}
MORE = "\\"
ASK, GO_ON = "> ", "... "


def chat(
    adapter: Adapter,
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
    """Talk to a model with an adapter, a line a message (one that ends in a backslash goes on in the next line).

    /reset forgets what was said, /exit ends, Ctrl-C stops an answer. Messages can be piped in, a line each.
    """
    sampling = Sampling(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=tuple(stop or ())
    )
    weights = Weights(dtype, quantization, device)
    check_adapter(adapter, base, revision, whole=True, on=on)
    from ._writing import alone, open_writer

    opened = open_writer(adapter, adapter_revision, base, revision, weights, sampling, on)
    talk = opened.chat(system, plain)
    keyboard = sys.stdin.isatty() and not as_json
    if keyboard:
        _greet(opened, talk, base_alone)
    with alone(opened, base_alone):
        turns = _talk(talk, keyboard, as_json)
    if as_json:
        print_json(_document(opened, talk, turns, base_alone))


def _greet(opened: Opened, talk: Chat, base_alone: bool) -> None:
    who = f"{opened.base}, without the adapter" if base_alone else f"{opened.adapter} on {opened.base}"
    how = "each message is a prompt of its own, as it stands" if talk.plain else "in the model's chat template"
    print(f"{who}; {how}. {EXIT} ends, {RESET} forgets, Ctrl-C stops an answer.", file=sys.stderr)


def _talk(talk: Chat, keyboard: bool, silent: bool) -> list[dict[str, Any]]:
    """Until the messages end; what each answer took. At a keyboard an error ends the message, else the chat."""
    from ._writing import show, silence

    turns = []
    for text in _messages(input if keyboard else _line):
        if text.startswith("/"):
            if _command(text, talk, keyboard):
                break
            continue
        try:
            answer = talk.ask(text, None if silent else show)
        except KilotuneError as error:
            if not keyboard:
                raise
            complain(str(error))
            continue
        if not silent:
            print(flush=True)
        if (why := silence(answer, talk)) is not None:
            warn(why)
        if answer.left_out:
            warn(f"the first {answer.left_out} messages were left out: the model takes {talk.writer.window} tokens")
        if answer.reason == "interrupted" and not keyboard:
            raise KeyboardInterrupt
        turns.append(_turn(text, answer))
    return turns


def _messages(read: Callable[[str], str]) -> Iterator[str]:
    """Messages, their lines joined, without blanks around them and without empty ones."""
    while True:
        lines = []
        try:
            lines.append(read(ASK))
            while lines[-1].endswith(MORE):
                lines[-1] = lines[-1].removesuffix(MORE)
                lines.append(read(GO_ON))
        except EOFError:
            if not any(lines):
                return
        if text := "\n".join(lines).strip():
            yield text


def _line(prompt: str) -> str:
    """The next line of standard input that is no keyboard; nothing is shown."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _command(text: str, talk: Chat, keyboard: bool) -> bool:
    """Do what a line with a slash says; whether the chat is over.

    Raises:
        ConfigError: there is no such command, and nobody is there to type another.

    """
    if text == RESET:
        talk.reset()
    elif text == HELP:
        print("\n".join(f"{name}  {does}" for name, does in COMMANDS.items()), file=sys.stderr)
    elif text != EXIT:
        fault = f"there is no command {text!r}.{did_you_mean(text, COMMANDS)} Commands: {', '.join(COMMANDS)}"
        if not keyboard:
            raise ConfigError(fault)
        complain(fault)
    return text == EXIT


def _turn(text: str, answer: Answer) -> dict[str, Any]:
    return {
        "prompt": text,
        "text": answer.text,
        "reason": answer.reason,
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "left_out": answer.left_out,
        "seconds": answer.seconds,
    }


def _document(opened: Opened, talk: Chat, turns: list[dict[str, Any]], base_alone: bool) -> dict[str, Any]:
    return {
        "adapter": None if base_alone else opened.adapter,
        "on": opened.on,
        "base": opened.base,
        "template": not talk.plain,
        "turns": turns,
        "messages": talk.messages,
        "sampling": opened.writer.sampling.to_dict(),
    }
