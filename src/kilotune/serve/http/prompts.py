"""From what a request says to token numbers, as a training has them, and from token numbers to their texts.

Short texts are read at once. Longer ones are read beside the loop, one at a time and tenants in turn, and the largest,
which take up to seconds, in a turn of their own: nobody's long texts keep another's shorter ones waiting. Small chats
have a turn of their own, too; others are rendered elsewhere (chat_templates.py).
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, final, get_args

from ...errors import ConfigError
from ...train.data.rendering import Ending, Rendered, tokenize
from ...train.data.turn_marks import split_tools
from ..engine.text_stream import TextStream
from ..engine.vocabulary import named_bytes, widest_token
from .chat_templates import ChatTemplates, OwnTemplate
from .http_errors import ApiError
from .own_files import OwnFiles

__all__ = ["Prompts"]

T = TypeVar("T")
SPACE = "\u2581"  # what begins a word in SentencePiece's vocabularies
LONG = 4000  # characters of a text that is not tokenised on the loop's own thread
TOOL_PARTS = 20_000  # of tools, whose characters are counted before they are rendered
LARGE = 65_536  # characters of one for which no shorter one waits
Turn = Literal["chats", "long", "large"]
HALF = "the text holds half of a surrogate pair, which is no character"
INCOMPLETE = "\ufffd"  # what a tokenizer makes of a part of a character


@final
class Prompts:
    """A tokenizer of the service's own. vocabulary: token numbers that the model has. own_templates: whether adapters'
    chat templates are served."""

    def __init__(self, tokenizer: Any, vocabulary: int, own_templates: bool = False) -> None:
        # Fast tokenizers do not like two users in one instant: one is for the loop's thread, one for long texts.
        self._tokenizer, self._beside = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
        _ids(self._beside, "a", False)  # from here on nothing of it is changed, and several threads may read it
        self.templates = ChatTemplates(self._beside)
        self.own = OwnFiles(self._beside, self.templates, own_templates)
        self._turn: dict[Turn, asyncio.Lock] = {turn: asyncio.Lock() for turn in get_args(Turn)}
        self._turns: weakref.WeakValueDictionary[tuple[Turn, str], asyncio.Lock] = weakref.WeakValueDictionary()
        self.vocabulary = vocabulary
        self.widest = widest_token(tokenizer)
        ends = 0 if tokenizer.eos_token_id is None else 1
        opening = tokenize(self._tokenizer, [Rendered("", ())], "all").examples[0].ids
        self._opening = tuple(opening[: len(opening) - ends])
        self._texts: dict[int, str] = {}

    @property
    def chats(self) -> bool:
        """Whether there is a template for conversations."""
        return not isinstance(self.templates.base, str)

    def close(self) -> None:
        """Let go of threads and processes."""
        self.templates.close()
        self.own.close()

    # -- to tokens -----------------------------------------------------------------------------------

    async def plain(
        self, given: str | Sequence[int], param: str, tenant: str, room: int | None = None
    ) -> tuple[int, ...]:
        """A text as it stands, after what begins every text of this tokenizer; or token numbers as they are.

        room: tokens that it can have at most. A text that is more whatever they are is not read.
        """
        if not isinstance(given, str):
            return self._checked(given, param)
        self._check_length(len(given), param, room)
        return self._checked((*self._opening, *await self._encode(given, False, tenant)), param)

    async def tokens(self, text: str, opening: bool, tenant: str) -> tuple[int, ...]:
        """A text's tokens, which may be none; opening: with what begins every text of this tokenizer."""
        return (*(self._opening if opening else ()), *await self._encode(text, False, tenant))

    async def whole(self, given: str | Sequence[int], param: str, tenant: str) -> tuple[int, ...]:
        """A text for an encoder, between the tokens that its tokenizer puts around it."""
        return self._checked(given if not isinstance(given, str) else await self._encode(given, True, tenant), param)

    async def chat(
        self,
        messages: Sequence[dict[str, Any]],
        tenant: str,
        ending: Ending = "asked",
        param: str = "messages",
        own: OwnTemplate | None = None,
        room: int | None = None,
    ) -> tuple[int, ...]:
        """A conversation in the model's template, up to where the answer begins, or as ``ending`` says.

        param: what requests call the messages. own: instead of the base's template, the adapter's. room: as in
        :meth:`plain`.

        Tokens that mark turns are words where a message holds them, so no message becomes another turn.

        Raises:
            ApiError: there is no template, or it refuses these messages; a text cannot be told from a mark of a turn.

        """
        # A template may leave out some of what an assistant said, and blanks around texts, but nothing else as a rule.
        said = [(one.get("content") or "").strip() for one in messages if one.get("role") != "assistant"]
        self._check_length(sum(map(len, said)) + _written(split_tools(messages)[1] or ()), param, room)
        try:
            chats = self.templates.here(messages, own)
            if chats is None:
                rendered = await self.templates.render(messages, tenant, ending, own)
            else:
                rendered = await self._in_turn("chats", tenant, partial(chats.prompt, messages, ending))
        except ConfigError as error:
            raise ApiError(400, str(error), param=param) from error
        except UnicodeEncodeError:
            raise ApiError(400, HALF, param=param) from None
        text = rendered.text
        self._check_length(len(text), param, room)
        if (speller := rendered.speller) is not None:
            return self._checked((await self._in_turn(_turn(text), tenant, lambda: speller.ids([text])))[0], param)
        return self._checked(await self._encode(text, False, tenant), param)

    async def _encode(self, text: str, special: bool, tenant: str) -> Sequence[int]:
        if len(text) <= LONG:
            return _ids(self._tokenizer, text, special)
        return await self._in_turn(_turn(text), tenant, lambda: _ids(self._beside, text, special))

    def _check_length(self, characters: int, param: str, room: int | None) -> None:
        """Refuse what has too many tokens, whatever they are, before it is worked on."""
        if room is None or self.widest is None or characters <= room * self.widest:
            return
        told = f"this model takes {room} tokens at most; the prompt has {characters} characters, which are more tokens"
        raise ApiError(400, told, param=param, code="context_length_exceeded")

    async def _in_turn(self, turn: Turn, tenant: str, call: Callable[[], T]) -> T:
        """Run a call beside the loop. One of each tenant waits for its turn, so that they go round."""
        own = self._turns.setdefault((turn, tenant), asyncio.Lock())
        async with own, self._turn[turn]:
            work = asyncio.ensure_future(asyncio.to_thread(call))
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait([work])  # the thread has the tokenizer still
                raise

    def _checked(self, ids: Sequence[int], param: str) -> tuple[int, ...]:
        if not ids:
            raise ApiError(
                400, f"{param}: is empty, and this model begins no text with a token of its own", param=param
            )
        if (top := max(ids)) >= self.vocabulary:
            raise ApiError(400, f"{param}: token {top}; the model has {self.vocabulary}", param=param)
        return tuple(ids)

    # -- to texts ------------------------------------------------------------------------------------

    def token(self, number: int) -> str:
        """The text of one token, as log-probabilities name it; with a space that a decoder drops at a beginning."""
        if (text := self._texts.get(number)) is None:
            text = self.text([number])
            if (self.names([number])[0] or "").replace(SPACE, " ") == f" {text}":
                text = f" {text}"
            self._texts[number] = text
        return text

    def special(self, name: str) -> int | None:
        """The special token of this name, which is left out of texts."""
        number: int | None = self._tokenizer.get_added_vocab().get(name)
        return number if number is not None and self._tokenizer.added_tokens_decoder[number].special else None

    def names(self, ids: Sequence[int]) -> list[str | None]:
        """What the vocabulary calls tokens; None: it has no such token."""
        found: list[str | None] = self._tokenizer.convert_ids_to_tokens(list(ids))
        return found

    async def decoded(self, ids: Sequence[int], param: str, tenant: str) -> str:
        """The text of tokens that a request names."""
        if not ids:
            return ""
        checked = self._checked(ids, param)
        if len(checked) <= LONG:
            return self.text(checked)
        return await self._in_turn(_turn(checked), tenant, lambda: _text(self._beside, checked))

    async def offsets(self, ids: Sequence[int], plain: bool, tenant: str) -> list[int]:
        """Where each token begins in the text of a prompt. plain: it was a text, without what begins them all."""
        opening = len(self._opening) if plain else 0
        own = ids[opening:]
        if len(own) <= LONG // 4:
            found = _offsets(self._tokenizer, own)
        else:
            found = await self._in_turn(_turn(own), tenant, lambda: _offsets(self._beside, own))
        return [*[0] * opening, *found]

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        return _text(self._tokenizer, ids)

    def begins(self, given: str | Sequence[int], most: int) -> str:
        """The text of a prompt; of token numbers, of the first ones that there are."""
        if isinstance(given, str):
            return given
        return self.text([number for number in given[:most] if 0 <= number < self.vocabulary])

    def bytes_of(self, number: int) -> list[int] | None:
        """The UTF-8 of one token, also where it is a part of a character; None where the vocabulary does not say it."""
        text = self.token(number)
        return named_bytes(self.names([number])[0]) if INCOMPLETE in text else [*text.encode()]


def _written(tools: Sequence[Any]) -> int:
    """Characters that a template writes of tools at least: it has them as JSON. Of very many parts, the first ones."""
    left, characters = list(tools), 0
    for _ in range(TOOL_PARTS):
        if not left:
            break
        one = left.pop()
        if isinstance(one, str):
            characters += len(one)
        elif isinstance(one, Mapping):
            characters += sum(map(len, one))
            left.extend(one.values())
        elif isinstance(one, (list, tuple)):
            left.extend(one)
    return characters


def _turn(given: Sequence[Any]) -> Turn:
    """Of a text, or of tokens."""
    return "long" if len(given) <= LARGE else "large"


def _ids(tokenizer: Any, text: str, special: bool) -> Sequence[int]:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, HALF) from None
    found = tokenizer(
        text, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return [*map(int, found["input_ids"])]


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _offsets(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """A token that is no whole character begins where the character does."""
    stream = TextStream(tokenizer, (), (), special=True)
    lengths = [len(stream.push(number)[0]) for number in ids]
    return [0, *itertools.accumulate(lengths)][: len(ids)]
