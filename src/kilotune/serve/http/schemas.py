"""What requests may say, as OpenAI's API has it. An option that is not served is refused, never passed over.

What asks for nothing is taken: null for any option, and the values of options.py. A list stops at its first wrong
element: an error for each of a million would keep everybody waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, final

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from ...train.data.rendering import Ending
from ..engine.interface import Grammar
from .bodies import Body
from .options import ASKING, MESSAGE
from .structured import FormBody
from .tool_bodies import CallBody, ToolBody, ToolsBody

__all__ = [
    "MAX_LOGPROBS",
    "AliasesBody",
    "Body",
    "ChatBody",
    "ClassifyBody",
    "CompletionBody",
    "DetokenizeBody",
    "EmbeddingBody",
    "GenerationBody",
    "Message",
    "NamesBody",
    "SamplingBody",
    "Text",
    "TokenizeBody",
    "told_messages",
]

Text = Annotated[str, Field(max_length=4_000_000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenName = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Model = Annotated[str, Field(min_length=1, max_length=400, description="The base, NAME, NAME/VERSION or NAME/ALIAS.")]
Which = Annotated[int, Field(ge=1, lt=2**31)] | Annotated[str, Field(min_length=1, max_length=100)] | None
MAX_LOGPROBS = 20


@final
class StreamOptions(Body):
    """usage: a last event with the counts."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None


class SamplingBody(Body):
    """What all that asks for a text has in common.

    Not OpenAI's: top_k, min_p, repetition_penalty, ignore_eos, stop_token_ids and timeout.
    """

    model: Model
    stream: bool | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    user: str | None = Field(None, max_length=512, description="Whom of yours it is for; noted in the log.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="As in transformers; 1: none.")
    logit_bias: Annotated[dict[TokenName, Bias], Field(max_length=1024)] | None = None
    min_p: float | None = Field(None, ge=0, le=1, description="Draw from tokens of this part of the best one's chance.")
    top_k: int | None = Field(
        None, ge=-1, lt=2**31, description="Draw from so many of the likeliest tokens only; 0 or -1: from all."
    )
    ignore_eos: bool | None = Field(None, description="Go on behind the model's end token.")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    timeout: float | None = Field(None, gt=0, le=86400, description="Seconds; then it ends with an error.")

    @property
    def stops(self) -> tuple[str, ...]:
        """``stop`` as texts."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def grammar(self) -> Grammar | None:
        """What the answer has to fit; None: any text will do."""
        return None

    @property
    def choices(self) -> int:
        """How many answers are wanted."""
        return 1

    @property
    def scored(self) -> int | None:
        """How many likeliest tokens are wanted with each token of the prompt; None: no log-probabilities of these."""
        return None


class GenerationBody(FormBody, SamplingBody):
    """What completions and chats have in common. Not OpenAI's: prompt_logprobs."""

    neutral = ASKING
    n: int | None = Field(None, ge=1, le=128)
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Log-probabilities of the prompt, with so many likeliest tokens."
    )

    @model_validator(mode="after")
    def _streaming(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream: true")
        if self.ignore_eos and self.grammar is not None:
            raise ValueError("ignore_eos: not with a form that the answer has, for that says where it ends")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs: not with stream: true; a stream has them by echo and logprobs")
        return self

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def scored(self) -> int | None:
        return self.prompt_logprobs


@final
class CompletionBody(GenerationBody):
    """``/v1/completions``."""

    prompt: Text | Tokens | Texts | Annotated[list[Tokens], Field(min_length=1, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=0, lt=2**31, description="0 only with echo.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=128)
    add_special_tokens: bool | None = Field(None, description="Only true: a prompt begins as all texts do.")

    @model_validator(mode="after")
    def _served(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != self.choices:
            raise ValueError("best_of: only the same as n is served")
        if self.add_special_tokens is False:
            raise ValueError("add_special_tokens: not served; taken is true or null, or a prompt of token numbers")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 only with echo: true; else the answer has at least 1")
        return self

    @property
    def echoed(self) -> int | None:
        """The same as ``logprobs`` of the prompt that comes back."""
        return self.logprobs if self.echo else None

    @property
    def scored(self) -> int | None:
        wanted = [count for count in (self.echoed, self.prompt_logprobs) if count is not None]
        return max(wanted, default=None)

    @property
    def prompts(self) -> list[str | list[int]]:
        """``prompt`` as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        whole: list[Any] = self.prompt
        return [whole] if isinstance(whole[0], int) else whole


@final
class Part(Body):
    """A part of a message."""

    kinds = ("text",)
    type: Literal["text"]
    text: Text


@final
class Message(Body):
    """A message of a chat."""

    neutral = MESSAGE
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=1024, fail_fast=True)] | None = Field(
        None, description="May be null in an assistant's message only."
    )
    name: str | None = Field(None, max_length=64)
    tool_calls: Annotated[list[CallBody], Field(max_length=128)] | None = None
    tool_call_id: str | None = Field(None, max_length=200, description="Of a tool's message: the call it answers.")

    @model_validator(mode="after")
    def _says(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("lacking", "is missing", {"option": "content"})
        if (self.role == "tool") != (self.tool_call_id is not None):
            told = "is missing" if self.role == "tool" else "only in a tool's message"
            raise PydanticCustomError("lacking", "{told}", {"option": "tool_call_id", "told": told})
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("lacking", "only in an assistant's message", {"option": "tool_calls"})
        return self

    def told(self) -> dict[str, Any]:
        """As a chat template takes it."""
        made: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.name is not None:
            made["name"] = self.name
        if self.tool_calls:
            made["tool_calls"] = [call.told() for call in self.tool_calls]
        if self.tool_call_id is not None:
            made["tool_call_id"] = self.tool_call_id
        return made

    @property
    def text(self) -> str:
        """The content as one text."""
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


def told_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as a chat template takes them."""
    return [message.told() for message in messages]


def _ending(asks: bool | None, goes_on: bool | None) -> Ending:
    """Of add_generation_prompt and continue_final_message."""
    if goes_on and asks:
        raise ValueError("continue_final_message: not together with add_generation_prompt: true")
    return "continued" if goes_on else "closed" if asks is False else "asked"


@final
class ChatBody(ToolsBody, GenerationBody):
    """``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = Field(
        None, description="Whether the template begins an answer; by default so."
    )
    continue_final_message: bool | None = Field(None, description="Go on with the last message instead.")

    @model_validator(mode="after")
    def _together(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs: true")
        _ending(self.add_generation_prompt, self.continue_final_message)
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens: the old name of max_completion_tokens; give one of them")
        return self

    @property
    def ending(self) -> Ending:
        """How the prompt is to end."""
        return _ending(self.add_generation_prompt, self.continue_final_message)

    @property
    def limit(self) -> int | None:
        """The most new tokens, where the request says so."""
        return self.max_completion_tokens or self.max_tokens


@final
class TokenizeBody(Body):
    """``/tokenize``: a prompt or messages."""

    model: Model | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)] | None = None
    tools: Annotated[list[ToolBody], Field(max_length=128)] | None = Field(None, description="Of messages.")
    add_special_tokens: bool | None = Field(
        None, description="Of a prompt: with what begins a text, as completions do."
    )
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either a prompt or messages")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("add_special_tokens: of messages it is not served; the chat template writes them itself")
        if self.prompt is not None and self.tools:
            raise ValueError("tools: only with messages")
        if self.prompt is not None and (self.continue_final_message or self.add_generation_prompt is not None):
            raise ValueError("add_generation_prompt: only with messages, and so is continue_final_message")
        _ = self.ending
        return self

    @property
    def ending(self) -> Ending:
        """How the chat is to end."""
        return _ending(self.add_generation_prompt, self.continue_final_message)


@final
class DetokenizeBody(Body):
    """``/detokenize``."""

    model: Model | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class InputBody(Body):
    """Texts to be encoded."""

    model: Model
    input: Text | Tokens | Texts | Annotated[list[Tokens], Field(min_length=1, fail_fast=True)]
    user: str | None = Field(None, max_length=512)

    @property
    def inputs(self) -> list[str | list[int]]:
        """``input`` as a list."""
        if isinstance(self.input, str):
            return [self.input]
        whole: list[Any] = self.input
        return [whole] if isinstance(whole[0], int) else whole


@final
class EmbeddingBody(InputBody):
    """``/v1/embeddings``."""

    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, lt=2**31)


@final
class ClassifyBody(InputBody):
    """``/v1/classify``."""


# -- management --------------------------------------------------------------------------------------


@final
class AliasesBody(Body):
    """Which version an alias is to name, by adapter; null: the newest."""

    versions: Annotated[dict[str, Which], Field(min_length=1, max_length=10_000)]


@final
class NamesBody(Body):
    """Adapters whose alias is to name what it named before."""

    names: Annotated[list[str], Field(min_length=1, max_length=10_000)]
