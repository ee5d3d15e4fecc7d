"""Errors as OpenAI's clients expect them: ``{"error": {"message", "type", "param", "code"}}`` and a status."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, final

from ...errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    KilotuneError,
    MissingExtraError,
    ResourceError,
    StoreError,
    StoreFullError,
    StoreLimitError,
    TargetError,
    UnsupportedError,
)
from ...fleet.store.documents import QuotaError
from ..engine.interface import EngineError, GrammarError

__all__ = ["ApiError", "body_of", "of_library", "of_parsing", "of_validation"]

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CODES = {
    401: "invalid_api_key",
    403: "not_allowed",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    500: "internal_error",
    501: "not_installed",
    503: "unavailable",
    504: "deadline_exceeded",
    507: "disk_full",
}
SHOWN = 10  # faults of one request that its error names


@final
class ApiError(Exception):
    """What a request is answered with instead of what it asked for.

    retry_after: seconds, rounded up to whole ones in the header. headers: more of them.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or CODES.get(status)
        more = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
        challenge = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        self.headers = {**challenge, **more, **(headers or {})}

    @property
    def kind(self) -> str:
        """OpenAI's ``type``."""
        return TYPES.get(self.status) or ("invalid_request_error" if self.status < 500 else "server_error")

    def document(self) -> dict[str, Any]:
        """The body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def body_of(error: ApiError) -> bytes:
    """The body as bytes; what a request brought may hold surrogates, which are escaped."""
    return json.dumps(error.document(), ensure_ascii=True).encode()


def of_library(error: KilotuneError, param: str | None = None) -> ApiError:
    """The status of one of the library's own errors, whose messages are for the tenant as they stand."""
    if isinstance(error, StoreFullError):
        return ApiError(507, "the store's disk is full; nothing was changed")
    if isinstance(error, StoreLimitError):
        return ApiError(409, f"the store of adapters {error.told}", param=param)
    if isinstance(error, QuotaError):
        return ApiError(429, str(error), param=param, code="quota_exceeded")
    if isinstance(error, EngineError):
        return ApiError(503, "the engine takes no requests; try again", retry_after=1)
    if isinstance(error, StoreError):
        told = f"the store of adapters {error.told}; try again"
        return ApiError(503, told, code="store_unavailable", retry_after=1)
    if isinstance(error, AdapterError):
        return ApiError(404, str(error), param=param, code="model_not_found" if param == "model" else None)
    if isinstance(error, CheckpointError):
        return ApiError(422, str(error), param=param, code="invalid_adapter")
    if isinstance(error, (ConfigError, TargetError, UnsupportedError)):
        return ApiError(400, str(error), param=error.place if isinstance(error, GrammarError) else param)
    if isinstance(error, ResourceError):
        return ApiError(503, str(error), retry_after=1)
    return ApiError(501 if isinstance(error, MissingExtraError) else 500, str(error))


def of_parsing(error: BaseException) -> ApiError:
    """Of a body that could not be taken apart at all."""
    if isinstance(error, UnicodeDecodeError):
        told = f"it is not in UTF-8, at byte {error.start}"
    elif isinstance(error, RecursionError):
        told = "it is nested too deeply"
    elif isinstance(error, OSError):
        return ApiError(507, f"the body cannot be kept: {error.strerror}")
    elif "digits" in str(error):
        told = "a number in it has too many digits"
    else:
        told = str(error)
    return ApiError(400, f"the body cannot be read: {told}", code="invalid_json")


def of_validation(faults: Sequence[Mapping[str, Any]], known: Sequence[str] = ()) -> ApiError:
    """One error for all that is wrong with a body, its path or its query; ``faults`` are pydantic's."""
    worst: dict[str, Mapping[str, Any]] = {}
    for fault in faults:
        if fault["type"] == "json_invalid":
            at = fault["loc"][-1]
            return ApiError(400, f"the body is no JSON: {fault['ctx']['error']} at character {at}", code="invalid_json")
        place = _place(fault["loc"], fault["type"] == "extra_forbidden")
        if "option" in fault.get("ctx", ()):  # a check of several options together, that is of one of them
            place = f"{place}.{fault['ctx']['option']}".lstrip(".")
        # Of a value that may be of several types, what is said of the type that it has is what helps.
        if place not in worst or worst[place]["type"].endswith("_type"):
            worst[place] = fault
    for place in [place for place in worst if any(inner.startswith((f"{place}[", f"{place}.")) for inner in worst)]:
        if worst[place]["type"].endswith(
            "_type"
        ):  # of a type that it has not; what is wrong inside is of the one it has
            del worst[place]
    lines = [_line(place, fault, known) for place, fault in worst.items()]
    more = len(lines) - SHOWN
    message = "; ".join(lines[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
    return ApiError(400, message, param=next(iter(worst)) or _param(message), code="invalid_value")


def _param(message: str) -> str | None:
    """``best_of`` of "best_of: only ...", which a check of several options together says."""
    name, colon, _ = message.partition(":")
    return name if colon and name.isidentifier() else None


def _place(loc: Sequence[Any], whole: bool = False) -> str:
    """``messages[0].content`` of ("body", "messages", 0, "UserMessage", "content"). whole: the last part is a name."""
    text = ""
    for at, part in enumerate(loc[1:], 2):
        if isinstance(part, int):
            text += f"[{part}]"
        elif (whole and at == len(loc)) or not _is_branch(str(part)):
            text += f".{part}" if text else str(part)
    return text


def _is_branch(part: str) -> bool:
    """Whether a part of pydantic's path names a branch of a union, and nothing in the request."""
    return (
        "[" in part
        or "(" in part
        or part in ("str", "int", "list", "constrained-str", "constrained-int")
        or part[:1].isupper()
    )


def _line(place: str, fault: Mapping[str, Any], known: Sequence[str]) -> str:
    from ...errors import did_you_mean

    if fault["type"] == "extra_forbidden":
        return f"{place}: there is no such option.{did_you_mean(place.rsplit('.', 1)[-1], known)}"
    if fault["type"] == "missing":
        return f"{place or 'the body'}: is missing"
    if fault["type"] == "value_error" and not place:  # a check of several options together, which names them
        return str(fault["ctx"]["error"])
    if fault["type"] in ("not_served", "lacking"):
        return f"{place}: {fault['msg']}"
    given = fault.get("input")
    told = f", got {given!r:.80}" if isinstance(given, (str, int, float, bool)) or given is None else ""
    return f"{place or 'the body'}: {fault['msg'][:1].lower()}{fault['msg'][1:]}{told}"
