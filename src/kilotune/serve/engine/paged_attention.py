"""transformers' continuous batching, driven step by step: paged attention, and who each token of a step belongs to.

This is the one file that touches its internals (``transformers.generation.continuous_batching``); tested with
transformers 5.23. What is used of them: ``init_continuous_batching``, the manager's ``_create_batch_processor``, the
processor's ``prepare_next_batch``, ``_generation_step`` and ``update_batch``, the scheduler's waiting and cancelled
requests and how it goes through them (:func:`_shared_steps`), the cache's ``search_prefix_match`` and
``mark_complete_blocks``, the inputs' ``get_model_kwargs``, and the model runner's ``_sample``.

Why not its own thread: its loop ends all requests when one step fails, samples with one generator for all, and shares
prefixes between whoever sends the same tokens. Here the engine's thread calls :meth:`PagedBatch.step`.

Why not its own order: its prompts are read one after the other, so that a short one waits for all long ones before it.

Its default sizes take 14 to 45 seconds at the first call even for a tiny model on a CPU: it takes 60 % of the memory,
most of it for an attention mask of 8,192 x (all tokens of the cache + 8,192) numbers, and writes the lowest number into
each of them (a profile shows 99 % of the time in ``fill_``). Here both sizes are given, and it takes milliseconds.

On a CPU its attention multiplies every query with the keys of all requests and masks most of them: work that grows with
the square of the requests, and a masked value that is not a number still spoils the others (0 times NaN). There
:func:`attend` reads each request's own keys.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError, MissingExtraError, UnsupportedError
from ...layers.adapted import AdaptedLayer
from ...layers.saved_module import SavedModule
from .prompt_scores import PromptScores

__all__ = ["PageSizes", "PagedBatch", "Part"]


class Part(NamedTuple):
    """One request's tokens in a step. id: the request. tokens: how many. last: whether it gets a new token.

    cached: how many tokens of the request were in the cache already when the step began.
    """

    id: str
    tokens: int
    last: bool
    cached: int


@final
@dataclass(frozen=True, kw_only=True)
class PageSizes:
    """How much a batch may take.

    requests: at once. batch_tokens: in one step. cache_tokens: kept for all requests together. page: tokens of a page
    of the cache, of which a request takes whole ones; only whole pages are shared between equal prefixes.
    """

    requests: int
    batch_tokens: int
    cache_tokens: int
    page: int


@final
class PagedBatch:
    """Requests that run together, and one step of all of them. For one thread.

    Args:
        model: a causal language model of transformers.
        sizes: how much it may take.
        owner: (request's id) -> whose cache this is. Prefixes are shared between equal owners and no others.
        around: (the parts of a step) -> a context in which its forward runs.
        share: (tokens still to be read of each prompt, by the request's id; how many the step has room for) -> how many
            of them each is to have in this step, at least one in all. What generates has its token before.
        choose: (ids, logits (n, vocabulary) float32) -> the next token of each, (n,) int64.
        scoring: (request's id) -> what takes the logits of its prompt's tokens, of which none is then taken from the
            cache; None: nothing does, or has all.

    """

    def __init__(
        self,
        model: Any,
        sizes: PageSizes,
        owner: Callable[[str], bytes],
        around: Callable[[list[Part]], AbstractContextManager[None]],
        share: Callable[[dict[str, int], int], dict[str, int]],
        choose: Callable[[list[str], Tensor], Tensor],
        scoring: Callable[[str], PromptScores | None] = lambda request: None,
    ) -> None:
        self._model, self._owner, self._around, self._choose, self._scoring = model, owner, around, choose, scoring
        self._secret = os.urandom(32)
        self._salts: dict[str, list[int]] = {}
        self._parts: list[Part] = []
        self._taking: list[tuple[Part, PromptScores]] = []
        self._manager: Any = _manager(model, sizes)
        self._before: str = model.config._attn_implementation
        self._own = _attends(model)
        if self._own:
            model.set_attn_implementation(_registered())
        self._processor: Any = self._manager._create_batch_processor()
        cache = self._processor.cache
        self.page: int = next(iter(cache.cache_allocators.values())).tokens_per_page
        self.capacity: int = min(ca.num_blocks * ca.tokens_per_page for ca in cache.cache_allocators.values())
        self._processor.model_runner._sample = self._sample
        _wider(self._processor.inputs_and_outputs, self._wanted)
        _shared_steps(self._processor.scheduler, share)
        cache.search_prefix_match = _salted_search(cache, self._salted, scoring)
        cache.mark_complete_blocks = _salted_marks(cache, self._salted)

    def add(self, request: str, tokens: Sequence[int]) -> None:
        """Let a request wait for room; it goes on until it is cancelled."""
        from transformers.generation.continuous_batching.requests import RequestState

        state = RequestState(request_id=request, initial_tokens=list(tokens), max_new_tokens=None)
        self._processor.scheduler.add_waiting_request(state)

    def cancel(self, request: str) -> None:
        """End a request; its part of the cache is free at the next step."""
        self._processor.scheduler.set_request_cancellation(request)
        self._salts.pop(request, None)

    def step(self) -> list[Part]:
        """Run one step of all requests that there is room for; the parts that ran, in the order of their tokens.

        Raises:
            Whatever the forward, ``around`` or ``choose`` raises; :meth:`clear` then.

        """
        processor = self._processor
        # It takes in no more after the cache was full, until a request ends by itself; ours never do.
        processor.scheduler.block_new_requests = False
        if not processor.prepare_next_batch():
            if not processor.scheduler.has_pending_requests():
                return []
            processor.scheduler.block_new_requests = False
            if not processor.prepare_next_batch():
                raise RuntimeError("none of the requests finds room in the cache")
        # A head that adapters change must see all tokens of the route, not only those that get a new one (None: as is).
        head = self._model.get_output_embeddings()
        adapted = isinstance(head, (AdaptedLayer, SavedModule))
        processor.model_runner._model_supports_logits_to_keep = False if adapted else None
        inputs = processor.inputs_and_outputs
        self._parts = [
            Part(f.state.request_id, f.query_length, f.has_new_token, f.state.position_offset - f.query_length)
            for f in inputs.requests_in_batch
        ]
        padding = inputs.num_q_tokens - sum(part.tokens for part in self._parts)
        parts = [*self._parts, Part("", padding, False, 0)] if padding else self._parts
        if self._own:
            processor.cache.kilotune_spans = spans_of(self._parts, inputs)
        with self._around(parts):
            processor._generation_step(self._model)
        processor.update_batch()
        return self._parts

    def clear(self) -> None:
        """Forget all requests, and all that is cached."""
        processor = self._processor
        processor.offloading_manager.free_all_waiting_cpu_caches()
        processor.scheduler.reset()
        processor.inputs_and_outputs.reset()
        processor.cache.reset()
        self._salts.clear()

    def close(self) -> None:
        """Free the cache, and leave the model as it was."""
        if self._own:
            self._model.set_attn_implementation(self._before)
        self._processor = None
        self._manager.destroy()
        self._manager = None

    @property
    def used(self) -> float:
        """The share of the cache in use, or kept for prefixes; 0 once it is closed, as other threads may ask."""
        processor = self._processor
        return 0.0 if processor is None else 1.0 - float(processor.cache.compute_free_capacity())

    def _wanted(self) -> list[int]:
        """The tokens of the step whose logits are wanted beside those with which new ones are chosen."""
        taking = {part.id: one for part in self._parts if (one := self._scoring(part.id)) is not None}
        self._taking = []
        found: list[int] = []
        at = 0
        for part in self._parts if taking else ():
            if part.id in taking:
                self._taking.append((part, taking[part.id]))
                found.extend(range(at, at + part.tokens))
            at += part.tokens
        return found

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        """In place of the runner's own.

        scores: (1, requests of the step + what is wanted beside, vocabulary), those with a new token first.
        """
        at = len(self._parts)
        for part, taking in self._taking:
            taking.take(part.cached, scores[0, at : at + part.tokens])
            at += part.tokens
        ids = [part.id for part in self._parts if part.last]
        if ids:
            output_ids[0, : len(ids)].copy_(self._choose(ids, scores[0, : len(ids)]))

    def _salted(self, request: str, tokens: list[int]) -> list[int]:
        """``tokens`` as they are looked up by: the first page is mixed with a secret of the owner's.

        The hash of each page holds those before it, so no page of one owner is ever found for another. The secret is
        drawn anew in each process: nobody can work out tokens whose hashes are equal.
        """
        salt = self._salts.get(request)
        if salt is None:
            key = hashlib.blake2b(self._owner(request), key=self._secret).digest()
            stream = hashlib.shake_256(key).digest(4 * self.page)
            salt = [int.from_bytes(stream[i : i + 4], "little") & 0x7FFFFFFF for i in range(0, 4 * self.page, 4)]
            self._salts[request] = salt
        return [token ^ mask for token, mask in zip(tokens, salt, strict=False)] + tokens[self.page :]


def _manager(model: Any, sizes: PageSizes) -> Any:
    try:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig
    except ImportError as error:
        raise MissingExtraError("transformers", "serve", "serving") from error
    if sizes.cache_tokens < sizes.page:
        raise ConfigError(f"cache_tokens: expected at least one page ({sizes.page} tokens), got {sizes.cache_tokens}")
    if getattr(type(model), "init_continuous_batching", None) is None:
        raise UnsupportedError(
            f"{type(model).__name__} has no continuous batching; serve a causal language model of transformers >= 5.23"
        )
    on_cpu = model.device.type == "cpu"
    config = ContinuousBatchingConfig(
        page_size=sizes.page,
        num_blocks=max(1, sizes.cache_tokens // sizes.page),
        max_batch_tokens=sizes.batch_tokens,
        max_requests_per_batch=sizes.requests,
        max_blocks_per_request=0 if on_cpu else None,
        use_cuda_graph=False,  # routes differ from step to step
        use_async_batching=False,
        scheduler_type="fifo",
    )
    with torch.no_grad():
        return model.init_continuous_batching(GenerationConfig(do_sample=False, eos_token_id=-1), config)


def _shared_steps(scheduler: Any, share: Callable[[dict[str, int], int], dict[str, int]]) -> None:
    """Make a scheduler give each prompt as many tokens of a step as ``share`` says.

    By itself it lets the first prompt have all of them, and begins none while the cache is fuller than it likes to have
    it: how full it becomes is for the engine to say, which knows what it lets in.
    """
    process, look, begin = scheduler._process_candidates, scheduler._infer_request_tokens, scheduler._schedule_request
    free_up = scheduler._try_to_meet_safety_margin
    looked: set[str] = set()
    given: dict[str, int] = {}

    def candidates(states: Sequence[Any], budget: int, cache_budget: int, begun: set[str]) -> Any:
        for state in states:  # what of a new prompt is in the cache has not to be read
            if state.status.name == "PENDING" and state.request_id not in looked:
                look(state, begun)
        looked.clear()
        looked.update(state.request_id for state in states)
        unread = {state.request_id: len(state.remaining_prefill_tokens) for state in states if not _generates(state)}
        given.clear()
        given.update(share(unread, budget - len(states) + len(unread)) if unread else {})
        chosen = [state for state in states if _generates(state) or given.get(state.request_id)]
        return process(chosen, budget, cache_budget, begun)

    def tokens(state: Any, begun: set[str]) -> list[int]:
        found: list[int] = look(state, begun)
        return found if _generates(state) else found[: given[state.request_id]]

    def schedule(state: Any, own: list[int], budget: int, begun: set[str]) -> None:
        if _generates(state):
            begin(state, own, budget, begun)
        else:
            begin(state, state.remaining_prefill_tokens, min(budget, len(own)), begun)

    def room() -> bool:
        free_up()
        return True

    scheduler._process_candidates, scheduler._infer_request_tokens = candidates, tokens
    scheduler._schedule_request, scheduler._try_to_meet_safety_margin = schedule, room


def _generates(state: Any) -> bool:
    """Whether a request's prompt has been read."""
    return bool(state.status.name == "DECODING")


def _wider(inputs: Any, wanted: Callable[[], list[int]]) -> None:
    """Have the model's head run on more tokens than those after which one is chosen."""
    own = inputs.get_model_kwargs

    def kwargs(use_padding: bool = False) -> Any:
        made = own(use_padding)
        if more := wanted():
            own_ones = made["logits_indices"]  # joined here: the model runs on a stream that waits for no other one
            places = [*own_ones.tolist(), *more]
            made["logits_indices"] = torch.tensor(places, dtype=own_ones.dtype, device=own_ones.device)
        return made

    inputs.get_model_kwargs = kwargs


def _salted_search(
    cache: Any, salted: Callable[[str, list[int]], list[int]], scoring: Callable[[str], PromptScores | None]
) -> Callable[[str, list[int]], int]:
    own = cache.search_prefix_match

    def search(request_id: str, prompt_ids: list[int]) -> int:
        if scoring(request_id) is not None:
            return 0
        found: int = own(request_id, salted(request_id, prompt_ids))
        return found

    return search


def _salted_marks(cache: Any, salted: Callable[[str, list[int]], list[int]]) -> Callable[[Any, dict[str, int]], None]:
    def mark(state: Any, complete_blocks: dict[str, int]) -> None:
        if not cache.allow_block_sharing or not complete_blocks:
            return
        tokens = salted(state.request_id, state.initial_tokens + state.generated_tokens)
        for name, count in complete_blocks.items():
            cache.cache_allocators[name].mark_complete_blocks(state.request_id, tokens, count)

    return mark


# -- attention on a CPU ------------------------------------------------------------------------------


class Group(NamedTuple):
    """Requests with one new token each, whose keys are about as many. rows: where they stand among the tokens, (R,).

    places: (R, keys) of each request's keys in the cache; where it has fewer, its first one again. mask: (R, 1, 1,
    keys), True where they are its own; None where all are.
    """

    rows: Tensor
    places: Tensor
    mask: Tensor | None


class Span(NamedTuple):
    """A request with several new tokens, from ``begin`` to ``end``. places: of its keys in the cache; None: the new."""

    begin: int
    end: int
    places: Tensor | None


def spans_of(parts: Sequence[Part], inputs: Any) -> tuple[list[Group], list[Span]]:
    """Who of a step reads what, from its parts and the cache's places of the step's keys."""
    reads = inputs.max_kv_read > 0
    where = inputs.read_index_storage[0]
    groups: dict[int, list[tuple[int, Tensor]]] = {}
    spans = []
    row = at = 0
    for part in parts:
        length = part.cached + part.tokens
        places = where[at : at + length] if reads else None
        if part.tokens == 1 and places is not None:
            groups.setdefault(length.bit_length(), []).append((row, places))
        else:
            spans.append(Span(row, row + part.tokens, None if places is None else places.clone()))
        row, at = row + part.tokens, at + length
    return [_group(own) for own in groups.values()], spans


def _group(own: Sequence[tuple[int, Tensor]]) -> Group:
    rows = torch.tensor([row for row, _ in own])
    lengths = torch.tensor([places.shape[0] for _, places in own])
    most = int(lengths.max())
    index = torch.stack([torch.cat([p, p[:1].expand(most - p.shape[0])]) for _, p in own])  # (R, most)
    mask = None
    if int(lengths.min()) < most:
        mask = (torch.arange(most) < lengths.unsqueeze(1)).view(len(own), 1, 1, most)
    return Group(rows, index, mask)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a step, each request over its own keys.

    query (1, heads, tokens, features) -> (1, tokens, heads, features)

    Raises:
        UnsupportedError: the model wants more of attention than this (soft caps, sinks, biases of positions).

    """
    if any(kwargs.get(word) is not None for word in ("softcap", "s_aux", "position_bias")):
        raise UnsupportedError(
            f"{type(module).__name__}: attention with soft caps, sinks or biases is not served on a CPU"
        )
    cache = kwargs["cache"]
    allocator = cache.layer_to_allocator[module.layer_idx]
    keys, values = allocator._kv_token_views[module.layer_idx]  # (places, key heads, features)
    new_k, new_v = key[0].transpose(0, 1), value[0].transpose(0, 1)  # (tokens, key heads, features)
    write = kwargs["write_index"][allocator.index]
    keys.index_copy_(0, write, new_k)
    values.index_copy_(0, write, new_v)
    heads, shared = query.shape[1], key.shape[1]
    own = query[0].transpose(0, 1)  # (tokens, heads, features)
    out = torch.empty(own.shape[0], heads, value.shape[-1], dtype=query.dtype)
    groups, spans = cache.kilotune_spans
    for group in groups:
        count, most = group.places.shape
        flat = group.places.view(-1)
        k, v = (t.index_select(0, flat).view(count, most, shared, -1).transpose(1, 2) for t in (keys, values))
        q = own.index_select(0, group.rows).view(count, shared, heads // shared, -1)
        got = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask, scale=scaling)
        out.index_copy_(0, group.rows, got.reshape(count, heads, -1))
    for begin, end, places in spans:
        k, v = (
            (new[begin:end] if places is None else kept.index_select(0, places)).transpose(0, 1).unsqueeze(0)
            for new, kept in ((new_k, keys), (new_v, values))
        )
        out[begin:end] = _causal(query[:, :, begin:end], k, v, scaling)
    return out.unsqueeze(0), None


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """One request: (1, heads, new, features) over (1, key heads, all, features), as (new, heads, features)."""
    if (times := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    new, count = query.shape[2], key.shape[2]
    mask = None if new == count else torch.ones(new, count, dtype=torch.bool).tril(count - new)
    got = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, is_causal=mask is None)
    return got[0].transpose(0, 1)


def _attends(model: Any) -> bool:
    """Whether :func:`attend` is what the model's attention computes: full attention of every layer, on a CPU."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    special = getattr(config, "attn_logit_softcapping", None) or config.model_type in ("gpt_oss",)
    sdpa = model.config._attn_implementation == "sdpa"
    return model.device.type == "cpu" and sdpa and kinds == {"full_attention"} and not window and not special


def _registered() -> str:
    from transformers import AttentionInterface

    AttentionInterface.register("kilotune_paged", attend)
    return "kilotune_paged"
