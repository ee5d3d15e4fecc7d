"""Grammars of strangers, compiled and followed in processes of their own: the program that grammars.py runs.

::

    the first process     has the vocabulary; forks for each grammar
      a grammar's         has compiled it, in bounded time and memory; forks for each answer
        an answer's       is told each token, and says which ones may come next

Each is one thread, so forks are safe, and what a compiled grammar needs is in memory once. Whatever happens in one of
them, an endless loop or a stack that overflows, ends that one alone. Each ends when the other side of its socket is
closed. It imports nothing of kilotune. Frames: four bytes of length, then that much.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
import time
from typing import Any, final

MEMORY = 192 * 2**20  # bytes that a grammar may take beside what it was forked with
COMPILING = 1.0  # seconds of a processor
MASKING = 0.5
LENGTH = struct.Struct("=I")
TOKEN = struct.Struct("=I")
TOOK = struct.Struct("=d")  # seconds of a processor, before a mask
FREE = '\n%llguidance {"no_forcing": true}\n'
"""Any tokens that spell what has to come may be chosen, and not only those that the tokenizer would make of it."""
READY = b"ready"
OPEN, OVER, FAULT = b"\0", b"\1", b"\2"  # how an answer's grammar stands: it goes on, only an end can come, it failed


@final
class Ended(Exception):
    """Nobody is at the other side."""


def read(wire: socket.socket, count: int) -> bytes:
    """So many bytes."""
    parts = []
    while count:
        part = wire.recv(min(count, 2**20))
        if not part:
            raise Ended
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def read_frame(wire: socket.socket) -> bytes:
    """The next frame."""
    return read(wire, LENGTH.unpack(read(wire, LENGTH.size))[0])


def send_frame(wire: socket.socket, data: bytes) -> None:
    """One frame."""
    wire.sendall(LENGTH.pack(len(data)) + data)


def next_child(wire: socket.socket) -> socket.socket:
    """Wait for sockets and fork for each of them; returns in the child, with its own.

    Raises:
        Ended: in the parent, when there will be no more.

    """
    while True:
        data, fds, _, _ = socket.recv_fds(wire, 1, 1)
        if not data:
            raise Ended
        own = socket.socket(fileno=fds[0])
        if os.fork() == 0:
            wire.close()
            return own
        own.close()


def bound_memory() -> None:
    """Take no memory without end."""
    import resource  # not on Windows

    try:
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # on Linux only it can be told how much that is
        return
    for what, most in ((resource.RLIMIT_AS, now + MEMORY), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(what, (most, most))


def bound_time(seconds: float) -> None:
    """End the process after so many seconds of its processor, also within a call; 0: never."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


# -- compiling ---------------------------------------------------------------------------------------


def compiled(asked: dict[str, Any], tokenizer: Any, limits: Any) -> tuple[Any, dict[str, Any]]:
    """(the matcher or None, what is wrong)."""
    from llguidance import LLMatcher

    schemas = [(asked["place"], asked["text"])] if asked["kind"] == "json" else asked["schemas"]
    for place, text in schemas:
        if (wrong := schema_fault(place, text)) is not None:
            return None, wrong
    try:
        lark = as_lark(asked)
    except ValueError as error:
        return None, {"fault": str(error)}
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(lark + FREE), log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
        if not matcher.is_error():
            return matcher, {}
        return None, {"fault": f"nothing fits it, or it cannot be found out what does ({matcher.stop_reason()})"}
    return None, {"fault": first_told(matcher.get_error()), **unserved(matcher.get_error(), schemas)}


def as_lark(asked: dict[str, Any]) -> str:
    """A grammar in llguidance's form of Lark.

    Raises:
        ValueError: its own form is wrong.

    """
    from llguidance import LLMatcher, grammar_from
    from llguidance.gbnf_to_lark import any_to_lark

    kind, text = asked["kind"], asked["text"]
    if kind == "json":
        schema = json.loads(text)
        if isinstance(schema, dict):
            more = {"lenient": True} if asked["lenient"] else {}
            schema["x-guidance"] = {**asked["space"], **schema.get("x-guidance", {}), **more}
        return f"start: %json {json.dumps(schema)}"
    if kind == "regex":
        made: str = json.loads(LLMatcher.grammar_from_regex(text))["grammars"][0]["lark_grammar"]
        return made
    if kind == "choice":
        choices: str = grammar_from("choice", text)
        return choices
    try:
        own: str = any_to_lark(text)
    except Exception as error:
        raise ValueError(f"no grammar: {error}") from error
    return own


def first_told(error: str) -> str:
    """What an error says, without the grammar that it shows."""
    lines = [line.strip() for line in error.splitlines()]
    said = next((line for line in lines if line.startswith("error: ")), lines[0] if lines else "")
    return f"{lines[0]} {said.removeprefix('error: ')}"[:500] if said != lines[0] else said[:500]


def schema_fault(place: str, text: str) -> dict[str, Any] | None:
    """What makes it no JSON schema, and where."""
    import jsonschema_rs

    try:
        schema = json.loads(text)
    except ValueError as error:
        return {"fault": f"no JSON: {error}", "place": place}
    if isinstance(schema, dict):  # schemas that name another draft are read as the newest: it takes what they have
        schema = {key: value for key, value in schema.items() if key != "$schema"}
    try:
        jsonschema_rs.meta.validate(schema)
    except jsonschema_rs.ValidationError as error:
        at = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.instance_path)
        return {"fault": f"no JSON schema: {error.message[:300]}", "place": place + at}
    return None


def unserved(told: str, schemas: Any) -> dict[str, Any]:
    """Where the keyword, or the reference, stands that an error names."""
    name = told.partition('"')[2].partition('"')[0] if "Unimplemented keys" in told else ""
    for place, text in schemas:
        if (at := found_at(json.loads(text), name, told)) is not None:
            return {"place": place + at}
    return {}


def found_at(value: Any, name: str, told: str) -> str | None:
    """The path of a keyword of this name, or of a keyword whose text the error has."""
    if isinstance(value, dict):
        for key, inner in value.items():
            named = key == name if name else key in ("$ref", "pattern", "format") and isinstance(inner, str)
            if named and (name or inner in told):
                return f".{key}"
            if (at := found_at(inner, name, told)) is not None:
                return f".{key}{at}"
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            if (at := found_at(inner, name, told)) is not None:
                return f"[{i}]{at}"
    return None


def serve_grammar(wire: socket.socket, tokenizer: Any, limits: Any) -> None:
    """Compile a grammar, say what came of it, and fork for its answers."""
    asked = json.loads(read_frame(wire))
    bound_memory()
    bound_time(COMPILING)
    try:
        matcher, wrong = compiled(asked, tokenizer, limits)
    except RecursionError:
        matcher, wrong = None, {"fault": "it is nested too deeply"}
    except MemoryError:
        matcher, wrong = None, {"fault": "it takes too much memory"}
    except Exception as error:  # of a text that is no text, say
        matcher, wrong = None, {"fault": f"{type(error).__name__}: {error}"[:500]}
    bound_time(0)
    send_frame(wire, json.dumps(wrong).encode())
    if matcher is not None:
        follow(next_child(wire), matcher)


# -- an answer ---------------------------------------------------------------------------------------


def follow(wire: socket.socket, matcher: Any) -> None:
    """Say which tokens may come next and what it took to find out, be told which one came, and so on."""
    began = time.process_time()
    while True:
        bound_time(MASKING)
        mask = matcher.compute_bitmask()
        over = matcher.is_stopped()
        bound_time(0)
        if matcher.is_error():
            send_frame(wire, FAULT + matcher.stop_reason().encode())
            return
        began, before = time.process_time(), began
        send_frame(wire, (OVER if over else OPEN) + TOOK.pack(began - before) + mask)
        token = TOKEN.unpack(read(wire, TOKEN.size))[0]
        bound_time(MASKING)
        if not matcher.consume_token(token):
            send_frame(wire, FAULT + matcher.stop_reason().encode())
            return


# -- the first process -------------------------------------------------------------------------------


@final
class Vocabulary:
    """As llguidance takes it."""

    bos_token_id = None

    def __init__(self, told: dict[str, Any]) -> None:
        self.tokens = [bytes.fromhex(token) for token in told["tokens"]]
        self.special_token_ids, self.eos_token_id = told["special"], told["ends"][0]

    def __call__(self, text: Any) -> list[int]:
        """What a text's own tokens would be: not asked for, as nothing is generated without the model."""
        return []


def main(packages: list[str], fd: int) -> None:
    """packages: folders to import from; fd: the socket."""
    sys.path.extend(packages)
    wire = socket.socket(fileno=fd)
    told = json.loads(read_frame(wire))
    try:
        import jsonschema_rs  # noqa: F401  -- once, and not in each process
        import llguidance.gbnf_to_lark  # noqa: F401
        from llguidance import LLTokenizer, TokenizerWrapper
        from llguidance._lib import LLParserLimits
    except ImportError as error:
        send_frame(wire, f"{type(error).__name__}: {error}".encode())
        return
    tokenizer = LLTokenizer(TokenizerWrapper(Vocabulary(told)), eos_token=told["ends"])
    limits = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that end
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what failed until now is for the log
    send_frame(wire, READY)
    serve_grammar(next_child(wire), tokenizer, limits)


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]), int(sys.argv[2]))
    except (Ended, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # at once: to tidy up would copy memory that is shared
