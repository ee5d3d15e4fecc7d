"""How like one text is to another, from 0 to 1: the metrics of OpenAI's text_similarity graders.

Each takes (text, reference) of at most :data:`LONGEST` characters, and then at most some tenths of a second. The
longest common subsequence is found for 64 places of a text at once (Hyyrö 2004, "Bit-parallel LCS-length computation
revisited"), so that no pair of texts takes a table of all pairs of places.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

__all__ = ["LONGEST", "METRICS"]

LONGEST = 2**15  # characters
WORD = re.compile(r"[^\W_]+")
ORDER = 4  # of BLEU

# mteval-v13a's tokens (NIST): punctuation stands alone, but for points and commas within numbers.
SYMBOL = re.compile(r"([{-~\[-` -&(-+:-@/])")
BEHIND = re.compile(r"([^0-9])([.,])")
BEFORE = re.compile(r"([.,])([^0-9])")
DASH = re.compile(r"([0-9])(-)")


def fuzzy_match(text: str, reference: str) -> float:
    """Twice the longest common subsequence of characters, of both lengths: rapidfuzz's ``fuzz.ratio / 100``."""
    return _share(_common(text, reference), len(text), len(reference), empty=1.0)


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L (Lin 2004), F1 of the longest common subsequence of words, over the whole texts.

    Words are letters and digits, in small letters and not stemmed, as the package rouge-score has them in English.
    """
    own, its = _words(text), _words(reference)
    return _share(_common(own, its), len(own), len(its))


def _rouge(n: int) -> Callable[[str, str], float]:
    def rouge_n(text: str, reference: str) -> float:
        """ROUGE-N, F1 of the n-grams that both have, as often as both have them."""
        own, its = _grams(_words(text), n), _grams(_words(reference), n)
        return _share((own & its).total(), own.total(), its.total())

    return rouge_n


def bleu(text: str, reference: str) -> float:
    """BLEU of one sentence (Papineni et al. 2002): sacrebleu's ``sentence_bleu(...).score / 100``.

    Tokens are mteval-v13a's, precisions of zero are smoothed exponentially, and n-grams that a text is too short for do
    not count.
    """
    own, its = _tokens(text), _tokens(reference)
    logs, smooth, any_common = [], 1.0, False
    for n in range(1, ORDER + 1):
        grams = _grams(own, n)
        if not (total := grams.total()):
            break
        common = (grams & _grams(its, n)).total()
        any_common = any_common or common > 0
        if not common:
            smooth *= 2
        logs.append(math.log((common or 1 / smooth) / total))
    if not any_common:
        return 0.0
    short = 1.0 if len(own) >= len(its) else math.exp(1 - len(its) / len(own))
    return short * math.exp(math.fsum(logs) / len(logs))


METRICS: dict[str, Callable[[str, str], float]] = {
    "fuzzy_match": fuzzy_match,
    "bleu": bleu,
    **{f"rouge_{n}": _rouge(n) for n in range(1, 6)},
    "rouge_l": rouge_l,
}


def _share(common: int, own: int, its: int, empty: float = 0.0) -> float:
    """F1 of what is common; empty: of two that have nothing."""
    return 2 * common / (own + its) if own + its else empty


def _common(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """How long the longest common subsequence is."""
    places: dict[Hashable, int] = {}
    for i, item in enumerate(one):
        places[item] = places.get(item, 0) | 1 << i
    whole = left = (1 << len(one)) - 1
    for item in other:
        here = left & places.get(item, 0)
        left = ((left + here) | (left - here)) & whole
    return len(one) - left.bit_count()


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _grams(items: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(items[i:] for i in range(n))))


def _tokens(text: str) -> list[str]:
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for name, character in (("quot", '"'), ("amp", "&"), ("lt", "<"), ("gt", ">")):
        text = text.replace(f"&{name};", character)
    text = SYMBOL.sub(r" \1 ", f" {text} ")
    return DASH.sub(r"\1 \2 ", BEFORE.sub(r" \1 \2", BEHIND.sub(r"\1 \2 ", text))).split()
