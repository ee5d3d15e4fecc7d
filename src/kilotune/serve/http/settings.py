"""What the service is told when it starts: frozen, checked when built; each field's text is its option's help."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, ClassVar, final

from ...fleet.store.names import check_namespace, check_which
from ...train.settings.fields import Section, flag, number, one_of, or_none, setting, size, text

__all__ = ["EngineSettings", "ServeSettings"]

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:]+\])(?::[0-9]{1,5})?")


def _version(name: str, value: Any) -> list[str]:
    try:
        check_which(value)
    except ValueError as error:
        return [f"{name}: {error}"]
    return []


def _namespace(name: str, value: Any) -> list[str]:
    try:
        check_namespace(value)
    except ValueError as error:
        return [f"{name}: {error}"]
    return []


def _origins(name: str, value: Any) -> list[str]:
    """Origins as browsers write them (the Fetch standard), or ``*``."""
    listed = (value,) if isinstance(value, str) else value
    if not isinstance(listed, tuple) or not all(isinstance(one, str) for one in listed):
        return [f"{name}: expected a list of origins, got {value!r}"]
    told = "expected an origin such as https://app.example.com, in small letters and without a path, or '*'"
    return [f"{name}: {told}, got {one!r}" for one in listed if one != "*" and not ORIGIN.fullmatch(one)]


def _folders(name: str, value: Any) -> list[str]:
    if not isinstance(value, tuple) or not all(isinstance(one, str) for one in value):
        return [f"{name}: expected a list of folders, got {value!r}"]
    return [f"{name}: expected a folder that is there, got {one!r}" for one in value if not os.path.isdir(one)]


@final
@dataclass(frozen=True, kw_only=True)
class ServeSettings(Section):
    """How the service listens, whom it lets in, and what it allows each request."""

    SECTION: ClassVar[str] = "serve"

    host: str = setting("127.0.0.1", text, "The address to listen on; another than this machine's own needs --keys.")
    port: int = setting(8000, number(0, 65535, whole=True), "The port; 0 takes a free one, which is then told.")
    name: str | None = setting(
        None, or_none(text), "What requests call the base alone as their model; null: the last part of its path."
    )
    keys: str | None = setting(
        None,
        or_none(text),
        "The file of API keys, made by `kilotune keys add`; null: nobody needs one, on this machine only, and all "
        "adapters are those of one namespace.",
    )
    namespace: str = setting("default", _namespace, "Whose adapters, where there are no keys.")
    version: str | None = setting(
        None, _version, "Which version is meant where a request names none: an alias such as live; null: the newest."
    )
    tool_format: str = setting(
        "auto",
        one_of("auto", "hermes", "llama3_json"),
        "In which form the base writes calls of tools: hermes (<tool_call>) or llama3_json; auto: as its chat template "
        "says.",
    )
    max_requests: int = setting(
        1024, number(1, whole=True), "Answers that may run or wait at once; what comes on top gets 429."
    )
    max_requests_per_tenant: int = setting(128, number(1, whole=True), "The same for each namespace.")
    max_puts: int = setting(
        64, number(1, whole=True), "Adapters that may be put or wait for that at once; what comes on top gets 429."
    )
    max_puts_per_tenant: int = setting(16, number(1, whole=True), "The same for each namespace.")
    max_choices: int = setting(64, number(1, whole=True), "Answers (prompts times n) that one request may ask for.")
    max_inputs: int = setting(256, number(1, whole=True), "Texts that one request may have embedded or classified.")
    max_tokens: int = setting(4096, number(1, whole=True), "The most new tokens that an answer may ask for.")
    max_prompt: int | None = setting(
        None, or_none(number(1, whole=True)), "The most tokens of a prompt; null: as many as the model takes."
    )
    max_body: int = setting(2 * 2**20, number(1, whole=True), "The most bytes of a request, adapters apart.")
    max_adapter: int = setting(256 * 2**20, number(1, whole=True), "The most bytes of an adapter that is put.")
    max_file: int = setting(64 * 2**20, number(1, whole=True), "The most bytes of a file of training data.")
    max_seconds: float = setting(600.0, number(0, above=True), "The longest that a request may take.")
    body_seconds: float = setting(30.0, number(0, above=True), "How long a request's body may take to arrive.")
    write_seconds: float = setting(
        60.0, number(0, above=True), "A client that takes nothing of its answer for so long is dropped."
    )
    notice_seconds: float = setting(
        0.0,
        number(0),
        "How long requests are still taken once the service is told to end, with /ready at 503 already, so that a "
        "balancer sees it.",
    )
    drain_seconds: float = setting(
        30.0, number(0), "How long running requests may go on once the service is told to end."
    )
    metrics_tenants: int = setting(
        100, number(0, whole=True), "So many namespaces are named in the metrics; the rest together are 'other'."
    )
    metrics_adapters: int = setting(
        100,
        number(0, whole=True),
        "So many adapters are named in the metrics, the first that are asked; each namespace's rest is 'other'.",
    )
    slow_request: float | None = setting(
        None,
        or_none(number(0)),
        "A request that takes so many seconds has a line in the log with its waits and tokens; null: none has.",
    )
    cors_origin: tuple[str, ...] = setting(
        (),
        _origins,
        "Pages of this origin may ask from a browser: https://app.example.com, or '*' for all, which needs keys.",
    )
    adapter_folder: tuple[str, ...] = setting(
        (),
        _folders,
        "Adapters in this folder, at any depth, may be loaded by /v1/load_lora_adapter, with a manager's key.",
    )
    own_chat_templates: bool = setting(
        False, flag, "Chat templates that adapters bring are used where they are not the base's; else they are refused."
    )
    learn: bool = setting(
        False,
        flag,
        "Take files of training data and fine-tuning jobs, by OpenAI's API: models are trained while others are "
        "answered. Keys need --trains for it; the store has to be in a database.",
    )
    learn_method: str = setting("vera", text, "With --learn: the method of models that begin with the base.")
    learn_rank: int | None = setting(
        None, or_none(number(1, whole=True)), "With --learn: their rank; null: 256 of VeRA's, else the method's own."
    )
    learn_share: float = setting(
        0.25,
        number(0, above=True),
        "With --learn: how much of a core training has while something is answered; it has all that is idle else.",
    )
    learn_pass_tokens: int = setting(
        512,
        number(1, whole=True),
        "With --learn: tokens of one pass of training, the longest that an answer waits for it.",
    )
    learn_threads: int = setting(
        1,
        number(1, whole=True),
        "With --learn: threads of a pass of training; answers take the other cores meanwhile, and always one fewer for "
        "each above 1.",
    )
    learn_feedback_method: str = setting(
        "lora", text, "With --learn: the method of models that learn from feedback, and begin with what is beneath."
    )
    learn_feedback_rank: int | None = setting(
        None, or_none(number(1, whole=True)), "With --learn: their rank; null: 8 of LoRA's, 256 of VeRA's."
    )
    learn_last_blocks: int | None = setting(
        None,
        or_none(number(0, whole=True)),
        "With --learn: models that learn from feedback adapt so many of the last blocks; 0: all; null: a quarter.",
    )
    learn_kl: float = setting(
        0.5,
        number(0, above=True),
        "With --learn: what has learned from feedback goes live only if its KL divergence from what is live is at most "
        "this, in nats a token, on texts that are never learned.",
    )
    learn_jobs: int = setting(16, number(1, whole=True), "With --learn: jobs of a namespace that are not done yet.")
    learn_tokens_a_day: int = setting(
        50_000_000, number(1, whole=True), "With --learn: tokens that a namespace may have trained in a day."
    )
    learn_memory: int = setting(
        2**32,
        size(1),
        "With --learn: how much memory models of a namespace's jobs take that are trained at once; others wait, and a "
        "larger one is refused.",
    )
    learn_file_bytes: int = setting(2**30, size(0), "With --learn: how much the files of a namespace may take.")
    learn_answer_bytes: int = setting(
        256 * 2**20,
        size(0),
        "With --learn: how much the answers of a namespace take that are kept for feedback; then the oldest go. "
        "Feedback itself may take as much.",
    )
    telemetry: bool = setting(False, flag, "A span of OpenTelemetry for each request; its own variables say where to.")

    @classmethod
    def together(cls, values: Mapping[str, Any]) -> list[str]:
        faults = []
        if values["keys"] is None and not is_local(values["host"]):
            faults.append(
                f"{cls.key('host')}: {values['host']!r} can be reached from other machines, so give --keys; "
                "kilotune keys add makes them"
            )
        if values["keys"] is not None and values["namespace"] != "default":
            faults.append(f"{cls.key('namespace')}: each key has its own, so it goes without --keys only")
        if values["keys"] is None and "*" in values["cors_origin"]:
            faults.append(f"{cls.key('cors_origin')}: with '*' any web page could ask, so name origins, or give --keys")
        if not values["learn"]:
            usual = cls.defaults()
            told = [key for key in values if key.startswith("learn_") and values[key] != usual[key]]
            faults += [f"{cls.key(key)}: has no effect without --learn" for key in told]
        for total in ("max_requests", "max_puts"):
            if values[f"{total}_per_tenant"] > values[total]:
                faults.append(
                    f"{cls.key(f'{total}_per_tenant')}: {values[f'{total}_per_tenant']} is more than {cls.key(total)}, "
                    f"{values[total]}"
                )
        return faults


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


@final
@dataclass(frozen=True, kw_only=True)
class EngineSettings(Section):
    """How the base and its adapters are held and run."""

    SECTION: ClassVar[str] = "engine"

    task: str = setting(
        "auto",
        one_of("auto", "generate", "embed", "classify"),
        "What the base is for: generate, embed or classify; auto: as its config says.",
    )
    dtype: str = setting(
        "auto",
        one_of("auto", "float32", "bfloat16", "float16"),
        "In what the base's weights are held. auto: as they were saved, and on a CPU whose products of that dtype are "
        "slow in float32, where memory allows.",
    )
    device: str = setting("auto", one_of("auto", "cpu", "cuda"), "Where it runs. auto: on a GPU if there is one.")
    revision: str | None = setting(None, or_none(text), "The base's revision, where it is a hub id.")
    max_running: int = setting(64, number(1, whole=True), "How many answers are made at once; the rest waits.")
    batch_tokens: int = setting(
        512,
        number(1, whole=True),
        "Tokens of one step of the model; longer prompts, and those that share a step, take several.",
    )
    cache_tokens: int | None = setting(
        None,
        or_none(number(1, whole=True)),
        "For how many tokens keys and values are kept; null: 512 for each of max_running. One request has 3/4.",
    )
    slots: int = setting(256, number(1, whole=True), "How many adapters of one form the device holds at once.")
    forms: int = setting(
        4, number(1, whole=True), "How many forms of adapters (method, options, layers) there may be at once."
    )
    host_bytes: int = setting(2**30, size(0), "How much main memory adapters take that are not on the device.")
    max_norm: float = setting(1e4, number(0, above=True), "The largest norm that a tensor of an adapter may have.")
    max_rank: int = setting(4096, number(1, whole=True), "The largest rank that an adapter may have.")
    form_bytes: int = setting(
        4 * 2**30,
        size(1),
        "How much of the device the adapters of one form take at most; large ones get fewer slots.",
    )
    packing: str = setting(
        "float32", one_of("float32", "bfloat16", "int8"), "How the store keeps the numbers of adapters that are put."
    )
    store_seconds: float = setting(10.0, number(0, above=True), "How long a store that is busy is waited for.")
