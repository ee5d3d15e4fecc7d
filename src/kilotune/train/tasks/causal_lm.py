"""Causal language modelling: plain text, prompts with completions, chats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np
from torch import nn

from ...errors import ConfigError, gather
from .. import metrics
from ..data import columns, packing
from ..data.batches import IGNORED, PackedBatch, PaddedBatch
from ..data.prepared import Limits, Predictions, Prepared
from ..data.preview import masked
from ..data.processors import load_tokenizer
from ..data.rendering import ChatTemplate, Example, Rendered, render_pair, render_text, tokenize
from ..data.rows import Ragged, Rows
from ..data.splits import Part, load_splits, shown
from ..data.token_limits import check_vocabulary, longest, pad_token, refuse_unused, share
from ..data.turn_marks import ASSISTANT
from ._base import Task

if TYPE_CHECKING:
    from ..settings.sections import DataSettings

__all__ = ["CausalLm"]

SHOWN_PLACES = 20
MESSAGES, USER = "messages", "user"


@final
@dataclass(frozen=True)
class _Split:
    """A split's rows as tokens, cut to length; what was done to them is in ``notes``."""

    examples: list[Example]
    notes: list[str]

    @property
    def tokens(self) -> int:
        return sum(len(example.ids) for example in self.examples)

    @property
    def top(self) -> int:
        return max((max(example.ids) for example in self.examples), default=0)


@final
class CausalLm(Task):
    """The loss is on the answers: completions, or the assistant's messages; of plain text, on all of it.

    Prompts and completions of a model with a chat template are messages in it, unless the settings say ``plain``.
    """

    name: ClassVar[str] = "causal-lm"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    task_type: ClassVar[str | None] = "CAUSAL_LM"
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (("messages",), ("prompt", "completion"), ("text",))

    def load_processor(self, base: str, revision: str | None = None) -> Any:
        return load_tokenizer(base, revision)

    def prepare(self, data: DataSettings, processor: Any, limits: Limits, seed: int) -> Prepared:
        refuse_unused(data, self.name, ("packing", "loss_on", "max_length", "plain"))
        size, pad = longest(data, processor, limits), pad_token(processor, limits)
        parts = load_splits(data, self.roles, self.name, seed)
        first = shown(parts)
        form = _form(first, processor, data)
        rendered = _rendered(parts, processor, chats=form == MESSAGES)
        splits = {name: _tokens(part, rendered[name], processor, data, size) for name, part in parts.items()}
        check_vocabulary(max(split.top for split in splits.values()), processor, limits)
        rows = {name: _plain(split.examples) for name, split in splits.items()}
        notes = [note for split in splits.values() for note in split.notes]
        notes += _templated(first, rendered[first.name], form)
        notes += _ending(splits[first.name].examples, processor, chats=form == MESSAGES)
        if data.packing:
            rows["train"], note = _packed(splits["train"].examples, size)
            notes.append(note)
        return Prepared(
            train=rows["train"],
            validation=rows.get("validation"),
            test=rows.get("test"),
            collate=PackedBatch(pad) if data.packing else PaddedBatch({"input_ids": pad, "labels": IGNORED}),
            labels=None,
            metrics=_score,
            reduce_logits=partial(metrics.reduce_language, shift=True),
            best_metric="perplexity",
            greater_is_better=False,
            tokens=splits["train"].tokens,
            notes=tuple(notes),
            preview=_preview(first, splits[first.name].examples[0], processor),
            form=form,
        )

    def check_model(self, model: nn.Module, data: DataSettings) -> None:
        if data.packing:
            packing.refuse_leaks(model)


def _score(predictions: Predictions) -> dict[str, float]:
    return metrics.language(predictions.predictions)


# -- rows as text --------------------------------------------------------------------------------------


def _form(part: Part, processor: Any, data: DataSettings) -> str:
    """What the rows are made into: messages, prompt or text.

    Raises:
        ConfigError: plain text is asked for, and the rows are messages.

    """
    own = next(role for role in (MESSAGES, "prompt", "text") if role in part.columns)
    if data.plain and own == MESSAGES:
        raise ConfigError(
            f"data.plain: {part.name} holds messages, which only the chat template makes into text: set it false"
        )
    templated = own == "prompt" and not data.plain and getattr(processor, "chat_template", None)
    return MESSAGES if templated else own


def _rendered(parts: Mapping[str, Part], processor: Any, chats: bool) -> dict[str, list[list[Rendered]]]:
    """Split -> the texts of each row: one, or several where a chat template asks for it."""
    faults: list[str] = []
    if chats:
        template = ChatTemplate(processor)
        found = {name: _chats(part, template, faults) for name, part in parts.items()}
    else:
        found = {name: _texts(part, faults) for name, part in parts.items()}
    if faults:
        raise ConfigError(gather("the data cannot be used:", faults))
    return found


def _texts(part: Part, faults: list[str]) -> list[list[Rendered]]:
    if "text" in part.columns:
        found = columns.texts(part.table, part.columns["text"], faults)
        return [[render_text(text)] for text in found if text is not None]
    return [[render_pair(*pair)] for pair in _pairs(part, faults) if pair is not None]


def _pairs(part: Part, faults: list[str]) -> list[tuple[str, str] | None]:
    prompts = columns.texts(part.table, part.columns["prompt"], faults)
    completions = columns.texts(part.table, part.columns["completion"], faults)
    return [None if a is None or b is None else (a, b) for a, b in zip(prompts, completions)]


def _chats(part: Part, template: ChatTemplate, faults: list[str]) -> list[list[Rendered]]:
    own = MESSAGES in part.columns
    chats: list[Any] = columns.chats(part.table, part.columns[MESSAGES], faults) if own else _as_chats(part, faults)
    otherwise = "" if own else "; data.plain: true takes prompts and completions as they stand"
    found = []
    for row, messages in enumerate(chats):
        if messages is None:
            continue
        try:
            found.append(template.render(messages))
        except ConfigError as error:
            faults.append(f"{part.table.places[row]}: {error}{otherwise}")
    return found


def _as_chats(part: Part, faults: list[str]) -> list[list[dict[str, str]] | None]:
    """Prompts as a user's messages, completions as the answers to them."""
    return [
        None if pair is None else [{"role": USER, "content": pair[0]}, {"role": ASSISTANT, "content": pair[1]}]
        for pair in _pairs(part, faults)
    ]


def _templated(part: Part, rendered: Sequence[Sequence[Rendered]], form: str) -> list[str]:
    """That prompts and completions are written in the chat template, and what is odd in that."""
    if MESSAGES in part.columns or form != MESSAGES:
        return []
    said = (
        "prompts and completions are messages in the model's chat template (data.plain: true takes them as they stand)"
    )
    answers = [row[-1].text[start:end] for row in rendered for start, end in row[-1].answers[-1:]]
    blank = sum(text[:1].isspace() for text in answers)
    if not blank:
        return [said]
    more = f"{share(blank, len(answers), f'completions of {part.name}')} begin with a blank, which is learned; in a "
    return [said, f"{more}template they need none"]


# -- text as tokens ------------------------------------------------------------------------------------


def _tokens(
    part: Part, rendered: Sequence[Sequence[Rendered]], processor: Any, data: DataSettings, size: int
) -> _Split:
    """The tokens of a split, cut to ``size``; rows with nothing to learn are left out."""
    if not rendered:
        return _Split([], [])
    flat = [item for row in rendered for item in row]
    if not any(item.answers for item in flat) and data.loss_on == "answer":
        raise ConfigError(f"data.{part.name}: no row has an answer to learn (a message of the role 'assistant')")
    found = tokenize(processor, flat, data.loss_on)
    whole = f"rows of {part.name}"
    notes = []
    if len(flat) > len(rendered):
        more = sum(len(row) > 1 for row in rendered)
        notes.append(
            f"{share(more, len(rendered), whole)}: the chat template writes earlier messages differently once later "
            f"ones follow, so each answer is an example of its own; {len(flat):,} in all"
        )
    notes += _marks_note(part, rendered, whole)
    if found.joined:
        notes.append(
            f"{share(found.joined, len(flat), whole)}: a token would reach across the edge of the answer, so the parts "
            "were tokenised by themselves; as a rule a completion begins with a blank and the prompt ends without one"
        )
    texts = "text" in part.columns
    cut = _pieces(found.examples, size) if texts and data.packing else (_cut(item, size) for item in found.examples)
    examples = list(cut)
    notes += _length_notes(found.examples, examples, size, whole, texts)
    kept = [example for example in examples if any(example.learn[1:])]  # nothing predicts the first token
    if len(kept) < len(examples):
        notes.append(f"{share(len(examples) - len(kept), len(examples), whole)} left out: nothing to learn in them")
    if not kept:
        raise ConfigError(f"data.{part.name}: no row has anything to learn. {' '.join(notes)}")
    return _Split(kept, notes)


def _marks_note(part: Part, rendered: Sequence[Sequence[Rendered]], whole: str) -> list[str]:
    """Which rows hold the template's own tokens as words."""
    rows = [(i, [mark for item in row for mark in item.held]) for i, row in enumerate(rendered)]
    rows = [(i, marks) for i, marks in rows if marks]
    if not rows:
        return []
    marks = ", ".join(map(repr, dict.fromkeys(mark for _, held in rows for mark in held)))
    places = ", ".join(part.table.places[i] for i, _ in rows[:SHOWN_PLACES])
    more = f" and {len(rows) - SHOWN_PLACES:,} more" if len(rows) > SHOWN_PLACES else ""
    what = f"a message holds {marks}, with which the chat template marks turns"
    return [f"{share(len(rows), len(rendered), whole)}: {what}; there they are words, and no turns: {places}{more}"]


def _cut(example: Example, size: int) -> Example:
    return example if len(example.ids) <= size else Example(example.ids[:size], example.learn[:size])


def _pieces(examples: Sequence[Example], size: int) -> Iterator[Example]:
    """Long plain texts in pieces of ``size``: nothing is lost, and a sequence is filled anyway."""
    for example in examples:
        for start in range(0, len(example.ids), size):
            yield Example(example.ids[start : start + size], example.learn[start : start + size])


def _length_notes(before: Sequence[Example], after: Sequence[Example], size: int, whole: str, texts: bool) -> list[str]:
    long = sum(len(example.ids) > size for example in before)
    if not long:
        return []
    what = f"{share(long, len(before), whole)} longer than {size:,} tokens"
    if len(after) != len(before):
        return [f"{what}: cut into pieces, {len(after):,} in all"]
    lost = sum(len(example.ids) for example in before) - sum(len(example.ids) for example in after)
    answers = sum(any(b.learn) and not all_learned(b, a) for b, a in zip(before, after))
    within = "" if texts else f", {answers:,} of them within the answer"
    more = "; data.packing would keep all of it, in pieces" if texts else ""
    top = max(len(example.ids) for example in before)
    return [f"{what}: cut there{within}; {lost:,} tokens are lost (the longest row has {top:,}){more}"]


def all_learned(before: Example, after: Example) -> bool:
    """Whether cutting a row took nothing of what is learned."""
    return sum(before.learn) == sum(after.learn)


def _ending(examples: Sequence[Example], processor: Any, chats: bool) -> list[str]:
    """A warning where answers end with no token that says so: such a model never stops talking."""
    ends = {processor.eos_token_id, *processor.all_special_ids, *processor.get_added_vocab().values()} - {None}
    if not chats:
        if processor.eos_token_id is None:
            return ["the tokenizer has no end-of-text token, so the model does not learn where a text ends"]
        return []
    last = [example.ids[max(i for i, learned in enumerate(example.learn) if learned)] for example in examples[:100]]
    if ends.isdisjoint(last):
        return ["the chat template ends an answer with no special token, so the model does not learn where to stop"]
    return []


# -- tokens as rows ------------------------------------------------------------------------------------


def _targets(example: Example) -> np.ndarray[Any, Any]:
    """The tokens as labels; the first is predicted by nothing, or in a packed sequence by the row before."""
    labels = np.where(example.learn, example.ids, IGNORED)
    labels[:1] = IGNORED
    return labels


def _plain(examples: Sequence[Example]) -> Rows:
    ids = Ragged((example.ids for example in examples), np.int32)
    return Rows({"input_ids": ids, "labels": Ragged(map(_targets, examples), np.int32)})


def _packed(examples: Sequence[Example], size: int) -> tuple[Rows, str]:
    bins = packing.pack([len(example.ids) for example in examples], size)
    held = [[examples[i] for i in rows] for rows in bins]
    ids = Ragged(([token for example in row for token in example.ids] for row in held), np.int32)
    labels = Ragged((np.concatenate([_targets(example) for example in row]) for row in held), np.int32)
    positions = Ragged((np.concatenate([np.arange(len(e.ids)) for e in row]) for row in held), np.int32)
    filled = len(ids.flat) / max(1, len(bins) * size)
    note = f"{len(examples):,} rows of train are packed into {len(bins):,} sequences of up to {size:,} tokens"
    return Rows(
        {"input_ids": ids, "labels": labels, "position_ids": positions}
    ), f"{note} ({100 * filled:.0f} % filled)"


def _preview(part: Part, example: Example, processor: Any) -> str:
    learned = [False, *example.learn[1:]]
    head = f"{part.table.places[0]}: {len(example.ids):,} tokens, {sum(learned):,} in the loss (learn >)"
    return f"{head}\n{masked(processor, example.ids, learned)}"
