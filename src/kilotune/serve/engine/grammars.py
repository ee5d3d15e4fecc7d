"""What answers have to fit: grammars, compiled and followed by llguidance in processes of their own.

Grammars come from strangers. A schema may nest without end, a regular expression may explode, and what they take must
keep nobody else waiting: neither a processor's thread that holds Python's lock, nor memory, nor a crash. So there is a
process for each answer with a grammar (grammar_process.py says how they are forked). While the model computes the
logits of a token, it finds out which tokens may come; where it is not done by then, the step waits a little, and then
the answer sits out steps, and others go on. What others have waited counts (patience.py): an answer, or a tenant, that
has had its part is waited for no more. Not on Windows, which has no forks.

Tested with llguidance 1.9.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from io import FileIO
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from ...bounded import KEPT, ONE_THREAD
from ...errors import MissingExtraError, ResourceError, UnsupportedError
from .grammar_process import FAULT, LENGTH, OVER, READY, TOKEN, TOOK, read_frame, send_frame
from .interface import JSON_SPACE, Generation, Grammar, GrammarError
from .lanes import Lanes
from .patience import ANSWER, Patience, Tenants
from .vocabulary import token_bytes

__all__ = ["Grammars", "Guide", "wait_for"]

PROGRAM = Path(__file__).with_name("grammar_process.py")
PACKAGES = ("llguidance", "jsonschema_rs")
COMPILED = 16  # compiled grammars that are kept for later requests
LONGEST = 2**18  # bytes of a grammar
STARTING = 60.0  # seconds for the first process
COMPILING = 5.0  # seconds that compiling may take on a busy machine; of a processor's time it may take one
SAID = 4000  # bytes of what a process says that cannot start
GRACE = 0.02  # seconds that a step waits for what grammars allow; an answer whose grammar is not done sits out
LATE = 5.0  # seconds that an answer may sit out for its masks, all together
log = logging.getLogger("kilotune.serve")
SLOW = "the grammar takes too long or too much memory at this point of the answer; make it simpler"


@final
class Guide:
    """One answer's grammar: which tokens may come next. For the engine's thread.

    allowed: (vocabulary,) bool, or None while it is not known. over: nothing but an end can come. fault: why it cannot
    be followed any more.

    Args:
        wire: to its process.
        vocabulary: how many tokens the model has.
        ends: the tokens that the grammar calls ends.
        more: special tokens that end this answer, too.
        own: how long others wait for it.
        tenant: the same of all its tenant's answers together.

    """

    def __init__(
        self,
        wire: socket.socket,
        vocabulary: int,
        ends: Sequence[int],
        more: Sequence[int],
        own: Patience | None = None,
        tenant: Patience | None = None,
    ) -> None:
        self._ends, self._more = list(ends), list(more)
        self.allowed: Tensor | None = None
        self.over = False
        self.fault: str | None = None
        self.wire, self._vocabulary = wire, vocabulary
        self.held = AsyncExitStack()  # its place
        self._buffer = bytearray()
        self._own = own or Patience(ANSWER)
        self._patiences = [self._own] if tenant is None else [self._own, tenant]
        self._kept = 0.0  # seconds that others have waited for what comes next
        self._late = 0.0
        self._seen = time.monotonic()
        wire.setblocking(False)

    @property
    def known(self) -> bool:
        """Whether it is known what may come next, or that nothing can."""
        return self.allowed is not None or self.fault is not None

    def advance(self, token: int) -> None:
        """A token was chosen."""
        self.allowed = None
        try:
            self.wire.send(TOKEN.pack(token))
        except OSError:
            self.fault = SLOW

    def look(self) -> bool:
        """Take in what is there; whether it is known what may come next."""
        while not self.known:
            try:
                part = self.wire.recv(2**20)
            except BlockingIOError:
                return False
            except OSError:
                part = b""
            if not part:
                self.fault = SLOW
            self._buffer += part
            self._read()
        return True

    def awaited(self, strangers: bool) -> bool:
        """Whether a step may wait for it. strangers: other tenants wait with it."""
        return min(one.left for one in (self._patiences if strangers else [self._own])) >= GRACE

    def kept(self, seconds: float) -> None:
        """Others have waited so much longer for what comes next."""
        self._kept += seconds
        for one in self._patiences:
            one.spend(seconds)

    def sit_out(self) -> None:
        """The answer waits for it from now on."""
        self._seen = time.monotonic()

    def waited(self) -> bool:
        """Whether it needs to wait no more; the time counts."""
        now = time.monotonic()
        self._late, self._seen = self._late + now - self._seen, now
        if not self.look() and self._late > LATE:
            self.fault = SLOW
        return self.known

    async def aclose(self) -> None:
        """End its process; from the loop that asked for it."""
        self.wire.close()
        await self.held.aclose()

    def _read(self) -> None:
        if len(self._buffer) < LENGTH.size:
            return
        end = LENGTH.size + LENGTH.unpack(self._buffer[: LENGTH.size])[0]
        if len(self._buffer) < end:
            return
        kind, data = bytes(self._buffer[LENGTH.size : LENGTH.size + 1]), self._buffer[LENGTH.size + 1 : end]
        if kind == FAULT:
            self.fault = f"the grammar cannot be followed at this point of the answer ({data.decode()})"
        else:
            self._excuse(TOOK.unpack_from(data)[0])
            data = data[TOOK.size :]
            whole = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
            bits = whole[: self._vocabulary]
            if self._more and whole[self._ends].any():
                bits[self._more] = 1
            self.over = kind == OVER and not bits.any()
            self.allowed = torch.from_numpy(bits.astype(bool))
            if not self.over and not bits.any():
                self.fault = "none of the model's tokens fits the grammar at this point of the answer"
        del self._buffer[:end]

    def _excuse(self, took: float) -> None:
        """Of what others have waited, give back what was not its doing: that processors had other work."""
        for one in self._patiences:
            one.spend(-max(0.0, self._kept - took))
        self._kept = 0.0


def wait_for(
    guides: Sequence[Guide], others: bool, strangers: bool, clock: Callable[[], float] = time.monotonic
) -> None:
    """Wait until all of them know what may come next, so long at most as a step may wait, and others may for each.

    Args:
        guides: of those that have a token in this step.
        others: whether it has others than one of them.
        strangers: whether there are several tenants.
        clock: seconds.

    """
    if not guides:
        return
    now = clock()
    until = now + GRACE
    unknown = [guide for guide in guides if not guide.look() and (not others or guide.awaited(strangers))]
    while unknown and (left := until - now) > 0:
        poll = select.poll()
        for guide in unknown:
            with suppress(ValueError):  # closed this moment: the client went away
                poll.register(guide.wire, select.POLLIN)
        poll.poll(1000 * left)
        now, before = clock(), now
        for guide in unknown if others else ():
            guide.kept(now - before)
        unknown = [guide for guide in unknown if not guide.look()]


@final
class _Process:
    """A process that forks: its side of the socket is here."""

    def __init__(self, wire: socket.socket) -> None:
        self.wire = wire
        self._lock = threading.Lock()

    def fork(self) -> socket.socket:
        """The socket of a new process.

        Raises:
            OSError: it is gone.

        """
        mine, its = socket.socketpair()
        try:
            with its, self._lock:
                socket.send_fds(self.wire, [b"\0"], [its.fileno()])
        except OSError:
            mine.close()
            raise
        return mine


@final
class _Making:
    """A guide that is made in a thread for somebody who may leave meanwhile."""

    def __init__(self, make: Callable[[], Guide]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._left = False
        self._guide: Guide | None = None

    def run(self) -> Guide:
        """Make it."""
        guide = self._make()
        with self._lock:
            self._guide = guide
            if self._left:
                guide.wire.close()
        return guide

    def leave(self) -> None:
        """Nobody waits for it any more."""
        with self._lock:
            self._left = True
            if self._guide is not None:
                self._guide.wire.close()


@final
class Grammars:
    """The grammars of an engine's answers. For any thread, but where said.

    Args:
        tokenizer: of transformers.
        vocabulary: how many tokens the model has.
        ends: tokens that end an answer.
        running: answers that run at once.

    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: frozenset[int], running: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._ends = frozenset(end for end in ends if end < vocabulary)
        # Each answer has a process: so many answers may be in the house; and one compiles on a few processors. Places
        # are held as long as answers take, so that there is always to be one for a tenant who has none.
        self._places = Lanes("kilotune-guided", 2 * running, running)
        self._compiling = Lanes("kilotune-grammars", max(1, (os.cpu_count() or 1) // 4), 1)
        self._lock = threading.Lock()
        self._special: frozenset[int] = frozenset()
        self._tenants = Tenants()
        self._first: _Process | None = None
        self._made: subprocess.Popen[bytes] | None = None
        self._kept: OrderedDict[tuple[str, Grammar], _Process] = OrderedDict()

    async def guide(self, request: Generation) -> Guide | None:
        """What an answer is to be guided by, until it is closed; None where there is no grammar.

        Raises:
            GrammarError: it cannot be compiled. MissingExtraError: there is no llguidance. ResourceError: there can be
                no process, or it does not start. TimeoutError: the deadline came first.

        """
        tenant, grammar, deadline = request.tenant, request.sampling.grammar, request.deadline
        if grammar is None:
            return None
        stops = request.sampling.stop_token_ids
        check_grammar(grammar)
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        async with AsyncExitStack() as held:
            async with asyncio.timeout(left):
                await held.enter_async_context(self._places.lane(tenant))
                async with self._compiling.lane(tenant) as lane:
                    making = _Making(lambda: self._guide(tenant, grammar, stops))
                    try:
                        guide = await lane.run(making.run)
                    except OSError as error:
                        raise ResourceError(f"there is no process for the grammar: {error}; try again") from error
                    except BaseException:
                        making.leave()
                        raise
            guide.held = held.pop_all()
        return guide

    def close(self) -> None:
        """End all processes."""
        self._places.close()
        self._compiling.close()
        with self._lock:
            self._end()

    def _end(self) -> None:
        for process in self._kept.values():
            process.wire.close()
        self._kept.clear()
        if self._first is not None:
            self._first.wire.close()
            self._first = None
        if self._made is not None:
            self._made.kill()
            self._made.wait()
            self._made = None

    # -- in a thread that may wait -----------------------------------------------------------------

    def _guide(self, tenant: str, grammar: Grammar, stops: Sequence[int]) -> Guide:
        key = tenant, grammar
        with self._lock:
            kept = self._kept.pop(key, None)
        if kept is not None:
            try:
                wire = kept.fork()
            except OSError:  # it was ended, for its memory say
                kept.wire.close()
                kept = None
        if kept is None:
            kept = self._compiled(grammar)
            wire = kept.fork()
        with self._lock:
            if (other := self._kept.pop(key, None)) is not None:
                other.wire.close()
            self._kept[key] = kept
            while len(self._kept) > COMPILED:
                self._kept.popitem(last=False)[1].wire.close()
            patience = self._tenants.of(tenant)
        ends, more = sorted(self._ends) or [self._vocabulary], [stop for stop in stops if stop in self._special]
        return Guide(wire, self._vocabulary, ends, more, tenant=patience)

    def _compiled(self, grammar: Grammar) -> _Process:
        wire = self._forked()
        asked = {"kind": grammar.kind, "text": grammar.text, "lenient": grammar.lenient, "place": grammar.place}
        wire.settimeout(COMPILING)
        try:
            send_frame(wire, json.dumps({**asked, "schemas": grammar.schemas, "space": JSON_SPACE}).encode())
            wrong = json.loads(read_frame(wire))
        except Exception as error:  # it is gone, or does not come to an end
            wire.close()
            raise GrammarError("takes too much time or memory to compile; make it simpler", grammar.place) from error
        if wrong:
            wire.close()
            raise GrammarError(wrong["fault"], wrong.get("place", grammar.place))
        wire.settimeout(None)
        return _Process(wire)

    def _forked(self) -> socket.socket:
        """A process of the first one's, which is started where there is none, or no more."""
        with self._lock:
            if self._first is not None and self._made is not None and self._made.poll() is None:
                try:
                    return self._first.fork()
                except OSError:
                    pass
            self._end()
            self._start()
            assert self._first is not None
            return self._first.fork()

    def _start(self) -> None:
        folders = _folders()
        told = token_bytes(self._tokenizer, self._vocabulary)
        self._special, ends = frozenset(told.special), sorted(self._ends)
        # Where the model has no end, one beside its tokens tells that an answer may end.
        tokens = [*told.tokens, b""]
        for number, name in {**told.special, **({} if ends else {self._vocabulary: "<|end|>"})}.items():
            tokens[number] = name.encode()
        special = sorted({*told.special, *([] if ends else [self._vocabulary])})
        vocabulary = {
            "tokens": [token.hex() for token in tokens],
            "special": special,
            "ends": ends or [self._vocabulary],
        }
        mine, its = socket.socketpair()
        said, says = os.pipe()
        for end in (said, says):
            os.set_blocking(end, False)  # who says more than a pipe holds is not to wait for a reader
        with its, open(said, "rb", 0) as hears, open(says, "wb", 0) as speaks:
            self._made = subprocess.Popen(
                [sys.executable or "python", "-I", "-S", str(PROGRAM), json.dumps(folders), str(its.fileno())],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=speaks,
                env={**{key: os.environ[key] for key in KEPT if key in os.environ}, **ONE_THREAD},
                start_new_session=True,  # Ctrl-C is for the service, which ends them
            )
            its.close()
            self._first = _Process(mine)
            self._await_first(mine, json.dumps(vocabulary).encode(), hears)

    def _await_first(self, wire: socket.socket, vocabulary: bytes, hears: FileIO) -> None:
        """Until the first process is ready. hears: where it says what goes wrong there."""
        wire.settimeout(STARTING)
        try:
            send_frame(wire, vocabulary)
            told = read_frame(wire)
        except Exception as error:
            self._end()
            said = hears.read(2**20) or b""  # None: nothing, and a process has it open still
            why = said[-SAID:].decode(errors="replace").strip() or "it said nothing"
            log.error("grammars' first process did not start: %r; %s", error, why)
            raise ResourceError("grammars cannot be followed now, for a reason that the log has; try again") from error
        if told != READY:
            self._end()
            log.error("what is installed for grammars cannot be used: %s", told.decode(errors="replace"))
            raise MissingExtraError("llguidance", "serve", "a grammar (what is installed cannot be used)")
        wire.settimeout(None)


def check_grammar(grammar: Grammar) -> None:
    """Refuse what is too long.

    Raises:
        GrammarError: it is.

    """
    if (length := len(grammar.text.encode(errors="replace"))) > LONGEST:
        raise GrammarError(f"has {length} bytes; at most {LONGEST} are taken", grammar.place)


def _folders() -> list[str]:
    """Where what the processes import lies."""
    if getattr(os, "fork", None) is None:
        raise UnsupportedError("answers that fit a grammar need a system that forks processes, which this one does not")
    found = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise MissingExtraError(package, "serve", "a grammar (response_format, structured_outputs, tools)")
        found.append(str(Path(spec.origin).parent.parent))
    return list(dict.fromkeys(found))
