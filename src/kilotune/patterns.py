"""Regular expressions that a configuration brings, matched as Python's ``re`` matches them, but not without end.

``re`` takes exponential time for a pattern like ``(a+)+b``, cannot be told to stop, and lets no other thread run
meanwhile; and an adapter's configuration may come from anybody. So a pattern is looked at first::

    few ways to fit a name     matched here: a match takes milliseconds at most
    any other                  matched in a process of its own, all names at once, which is ended when time is up

Both are ``re`` itself, so what matches is what matches in PEFT, look-arounds and references to groups included. What a
thread matches within :func:`matching` takes so many seconds together, and for each pattern one process at most.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, final

__all__ = ["LIMIT", "UPLOAD", "PatternError", "counted", "fault", "found", "matching", "members", "plain"]

LIMIT = 10.0  # seconds of matching, where nobody says how many: a caller's own configuration
UPLOAD = 1.0  # of one that somebody else brings to a server
FEW = 250_000  # ways: some milliseconds
OFTEN = 16  # times that something is repeated which can be gone through in several ways
LONGEST = 20_000  # characters of a pattern that is looked at; a list of a model's names, made a pattern, is shorter
SHOWN = 200  # characters of a pattern in an error
FUNCTION = Path(__file__).with_name("pattern_process.py")
# What makes tables as large as Unicode: letters beyond ASCII, and the flag that ignores case.
WIDE = re.compile(r"[^\x00-\x7f]|\\[xuUN]|\(\?[a-zA-Z]*i[a-zA-Z]*[-:)]")

PLAIN = re.compile(r"(?:[A-Za-z0-9_.-]|\\[.-])+")  # a name, its dots escaped or not
LETTERS = re.compile(r"\\.|.")

Found = tuple[str | None] | None  # of a name: None where it does not match, else the text of the pattern's last group
_thread = threading.local()


@final
class PatternError(ValueError):
    """A pattern that takes too long, or that cannot be matched."""


@contextmanager
def matching(seconds: float | None = None, names: Callable[[], Iterable[str]] = tuple) -> Iterator[None]:
    """What this thread matches in the context takes so long at most, all together; inside another one, its time counts.

    Args:
        seconds: of matching, whatever else takes its time; None: ``LIMIT``.
        names: gives what patterns are about to be held against; one that needs a process sees all of them at once.

    """
    outer: _Matching | None = getattr(_thread, "now", None)
    mine = outer or _Matching(LIMIT if seconds is None else seconds)
    before, mine.names = mine.names, mine.names if names is tuple else names
    _thread.now = mine
    try:
        yield
    finally:
        mine.names, _thread.now = before, outer


def found(how: str, pattern: str, name: str) -> Found:
    """What ``re.fullmatch`` or ``re.match`` finds.

    Raises:
        PatternError: see there.

    """
    return _now().found(how, pattern, name)


def fault(pattern: str) -> str | None:
    """None, or why it is no regular expression.

    Raises:
        PatternError: it takes too long to see.

    """
    return _now().fault(pattern)


@contextmanager
def counted(pattern: str) -> Iterator[None]:
    """What else belongs to matching counts, too; ``pattern`` is what an error names."""
    now = _now()
    left, began = now.left, time.perf_counter()
    yield
    now.left = min(now.left, left - (time.perf_counter() - began))  # what was matched here has counted already
    now.check(pattern)


@lru_cache(maxsize=4096)
def plain(pattern: str) -> tuple[str, ...] | None:
    """The characters of a pattern that is a name, where ``.`` is any one. None: it is another pattern.

    Adapters may have thousands of these (a rank for each layer), and to compile them would take seconds.
    """
    return tuple(LETTERS.findall(pattern)) if PLAIN.fullmatch(pattern) else None


def members(names: Sequence[Any]) -> frozenset[Any]:
    """A list of names (or numbers) as a set, made once within :func:`matching` however often it is asked for."""
    return _now().set_of(names)


# -- one thread's matching -------------------------------------------------------------------------


def _now() -> _Matching:
    there: _Matching | None = getattr(_thread, "now", None)
    return there or _Matching(LIMIT)


@final
class _Matching:
    """The time that is left, and what was found out."""

    def __init__(self, seconds: float) -> None:
        self.seconds = self.left = seconds
        self.names: Callable[[], Iterable[str]] = tuple
        self._looks: dict[str, Ways] = {}
        self._here: dict[tuple[str, str], Callable[[str], re.Match[str] | None]] = {}
        self._elsewhere: dict[tuple[str, str], dict[str, Found]] = {}
        self._faults: dict[str, str | None] = {}
        self._sets: dict[int, tuple[Sequence[Any], frozenset[Any]]] = {}

    def set_of(self, names: Sequence[Any]) -> frozenset[Any]:
        kept = self._sets.get(id(names))
        if kept is None:  # the names are kept too, so that no other ones get their id
            kept = self._sets[id(names)] = names, frozenset(names)
        return kept[1]

    def check(self, pattern: str) -> None:
        if self.left < 0:
            raise self._too_long(pattern)

    def found(self, how: str, pattern: str, name: str) -> Found:
        self.check(pattern)
        began = time.perf_counter()
        if (look := self._looks.get(pattern)) is None:
            look = self._looks[pattern] = looked_at(pattern)
        if at_most(look, len(name)) <= FEW:
            made = self._method(how, pattern)(name)
            self._spend(pattern, began)
            return None if made is None else (made.group(made.re.groups),)
        known = self._elsewhere.setdefault((how, pattern), {})
        if name not in known:
            asked = [other for other in dict.fromkeys((*self.names(), name)) if other not in known]
            answer = self._ask(how, pattern, asked)
            if "fault" in answer:
                raise _unfit(pattern, answer["fault"])
            texts: Mapping[str, str | None] = answer["found"]
            known.update({other: (texts[str(i)],) if str(i) in texts else None for i, other in enumerate(asked)})
        return known[name]

    def _method(self, how: str, pattern: str) -> Callable[[str], re.Match[str] | None]:
        if (made := self._here.get((how, pattern))) is None:
            try:
                made = self._here[how, pattern] = getattr(re.compile(pattern), how)
            except (re.error, OverflowError, RecursionError) as error:
                raise _unfit(pattern, error) from error
        return made

    def fault(self, pattern: str) -> str | None:
        self.check(pattern)
        if plain(pattern) is not None:
            return None
        if pattern not in self._faults:
            began = time.perf_counter()
            if _is_small(pattern):
                self._faults[pattern] = _fault_here(pattern)
                self._spend(pattern, began)
            else:
                self._faults[pattern] = self._ask("compile", pattern, []).get("fault")
        return self._faults[pattern]

    def _spend(self, pattern: str, began: float) -> None:
        self.left -= time.perf_counter() - began
        self.check(pattern)

    def _ask(self, how: str, pattern: str, names: list[str]) -> dict[str, Any]:
        """Ask a process of its own, which is gone when this returns."""
        from .bounded import Bounded, BoundedError, Bounds  # most patterns do without

        began = time.perf_counter()
        try:
            with Bounded(FUNCTION, "answer", Bounds(max(self.left, 0.0))) as process:
                answer: dict[str, Any] = process.call({"how": how, "pattern": pattern, "names": names})
        except BoundedError as error:
            if error.why == "time":
                self.left = -1.0
                raise self._too_long(pattern) from None
            self._spend(pattern, began)
            raise _unfit(pattern, error) from None
        self._spend(pattern, began)
        return answer

    def _too_long(self, pattern: str) -> PatternError:
        return PatternError(
            f"{pattern[:SHOWN]!r} takes too long: what a configuration has may take {self.seconds:g} s to match, all "
            "together. Repeats inside repeats, as in (a+)+, are what takes long; write it without, or list the names"
        )


def _unfit(pattern: str, why: object) -> PatternError:
    return PatternError(f"{pattern[:SHOWN]!r} cannot be matched: {why}")


def _fault_here(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return None


# -- how long a pattern may take -------------------------------------------------------------------

Ways = tuple[float, int]  # (c, k): at most c * (n + 1) ** k ways to go through a text of n characters
MANY: Ways = (math.inf, 0)


def at_most(ways: Ways, length: int) -> float:
    """In how many ways, at most, ``re`` tries to fit a pattern to a name of so many characters."""
    try:
        return ways[0] * float(length + 1) ** ways[1]
    except OverflowError:
        return math.inf


def _is_small(pattern: str) -> bool:
    """Whether it compiles in no time."""
    return len(pattern) <= LONGEST and WIDE.search(pattern) is None


@lru_cache(maxsize=256)
def looked_at(pattern: str) -> Ways:
    """The ways to go through a text with a pattern; infinitely many where that is not known."""
    if not _is_small(pattern):
        return MANY
    try:
        # Not public; as it is in Python 3.11 to 3.13. Where it is not, every pattern has a process.
        return _through(getattr(re, "_parser").parse(pattern))  # noqa: B009
    except (re.error, OverflowError, RecursionError):
        return MANY if _fault_here(pattern) is None else (1.0, 0)  # no pattern: told where it is compiled
    except (AttributeError, LookupError, TypeError, ValueError):
        return MANY


def _through(items: Iterable[Any]) -> Ways:
    """Through one after the other: each way of one with each of the next."""
    c, k = 1.0, 0
    for item in items:
        more = _through_one(*item)
        c, k = c * more[0], k + more[1]
    return c, k


def _through_one(kind: Any, what: Any) -> Ways:
    name = repr(kind)
    if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT", "GROUPREF", "FAILURE"):
        return 1.0, 0
    if name == "BRANCH":
        return _either([_through(branch) for branch in what[1]])
    if name == "SUBPATTERN":
        return _through(what[-1])
    if name in ("ASSERT", "ASSERT_NOT"):
        return _through(what[1])
    if name == "ATOMIC_GROUP":
        return _through(what)
    if name == "GROUPREF_EXISTS":
        return _either([_through(part or ()) for part in what[1:]])
    if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        return _repeated(*what)
    raise LookupError(name)  # of a later Python


def _either(options: list[Ways]) -> Ways:
    return sum(c for c, _ in options), max(k for _, k in options)


def _repeated(low: int, high: int, item: Any) -> Ways:
    c, k = _through(item)
    if (c, k) == (1.0, 0):  # one way each time: as many ways as there are counts
        return (1.0, 1) if high > LONGEST else (high - low + 1.0, 0)
    if high > OFTEN:
        raise LookupError("a repeat of what can be gone through in several ways")
    return sum(c**count for count in range(low, high + 1)), k * high
