"""Graders: what OpenAI says of them, held to independent computations; strangers' ones in bounded time."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu import sentence_bleu

from kilotune.errors import ConfigError
from kilotune.serve.learning.formulas import Formula
from kilotune.serve.learning.graders import read_grader
from kilotune.serve.learning.similarity import LONGEST, METRICS

WORDS = st.lists(st.sampled_from(["the", "cat", "Cat", "sat.", "on", "a-b", "3,5", "x&amp;y", "mat"]), max_size=12)
TEXTS = WORDS.map(" ".join)


def check(operation: str, **more: Any) -> dict[str, Any]:
    texts = {"input": "{{ sample.output_text }}", "reference": "{{ item.answer }}"}
    return {"type": "string_check", "name": "check", "operation": operation, **texts, **more}


def like(metric: str, **more: Any) -> dict[str, Any]:
    return {**check("eq"), "type": "text_similarity", "name": "like", "evaluation_metric": metric, **more}


def without(given: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key not in keys}


def similarity(metric: str) -> dict[str, Any]:
    return without(like(metric), "operation")


def multi(formula: str, **graders: Any) -> dict[str, Any]:
    own = graders or {"a": check("eq"), "b": similarity("fuzzy_match")}
    return {"type": "multi", "name": "both", "graders": own, "calculate_output": formula}


# -- texts and their metrics -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "text", "reference", "reward"),
    [
        ("eq", "a cat", "a cat", 1), ("eq", "A cat", "a cat", 0), ("ne", "A cat", "a cat", 1),
        ("like", "this is a cat", "a cat", 1), ("like", "a cat", "this is a cat", 0), ("like", "A CAT", "cat", 0),
        ("ilike", "A CAT", "cat", 1), ("ilike", "A dog", "cat", 0),
    ],
)  # fmt: skip
def test_texts_are_checked(operation: str, text: str, reference: str, reward: float) -> None:
    assert read_grader(check(operation)).grade({"answer": reference}, text).reward == reward


def table(one: Any, other: Any) -> int:
    """The longest common subsequence by the table of all pairs."""
    rows = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, x in enumerate(one):
        for j, y in enumerate(other):
            rows[i + 1][j + 1] = rows[i][j] + 1 if x == y else max(rows[i][j + 1], rows[i + 1][j])
    return rows[-1][-1]


@given(st.text("abcd ", max_size=90), st.text("abcd ", max_size=90))
@settings(max_examples=60)
def test_a_fuzzy_match_is_what_the_table_says(one: str, other: str) -> None:
    whole = len(one) + len(other)
    assert METRICS["fuzzy_match"](one, other) == pytest.approx(2 * table(one, other) / whole if whole else 1.0)


def test_published_values() -> None:
    # rapidfuzz's README: fuzz.ratio("this is a test", "this is a test!") is 96.55.
    assert METRICS["fuzzy_match"]("this is a test", "this is a test!") == pytest.approx(0.9655, abs=1e-4)
    # Lin 2004, section 3.1: "police killed the gunman", "police kill the gunman", "the gunman kill police".
    assert METRICS["rouge_l"]("police kill the gunman", "police killed the gunman") == pytest.approx(3 / 4)
    assert METRICS["rouge_l"]("the gunman kill police", "police killed the gunman") == pytest.approx(2 / 4)
    assert METRICS["rouge_2"]("police kill the gunman", "police killed the gunman") == pytest.approx(1 / 3)
    assert METRICS["rouge_2"]("the gunman kill police", "police killed the gunman") == pytest.approx(1 / 3)


@given(TEXTS, TEXTS)
@settings(max_examples=80)
def test_bleu_is_sacrebleus(one: str, other: str) -> None:
    assert METRICS["bleu"](one, other) == pytest.approx(sentence_bleu(one, [other]).score / 100, abs=1e-9)


@given(TEXTS, TEXTS, st.integers(1, 5))
def test_rouge_counts_each_n_gram_once_for_each_time_that_both_have_it(one: str, other: str, n: int) -> None:
    def grams(text: str) -> list[str]:
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]

    own, its = grams(one), grams(other)
    left, common = list(its), 0
    for gram in own:
        if gram in left:
            left.remove(gram)
            common += 1
    precision, recall = common / max(1, len(own)), common / max(1, len(its))
    f1 = 0.0 if not common else 2 * precision * recall / (precision + recall)
    assert METRICS[f"rouge_{n}"](one, other) == pytest.approx(f1)


@pytest.mark.parametrize("metric", METRICS)
def test_the_longest_texts_take_no_table(metric: str) -> None:
    one, other = ("ab " * LONGEST)[:LONGEST], ("b ac" * LONGEST)[:LONGEST]
    began = time.process_time()
    METRICS[metric](one, other)
    assert time.process_time() - began < 2, "of a table of a billion places: minutes"
    graded = read_grader(similarity(metric)).grade({"answer": one}, "x" * (LONGEST + 1))
    assert (graded.reward, graded.fault) == (0.0, "other_error")


# -- templates --------------------------------------------------------------------------------------------


def filled(template: str, item: dict[str, Any], text: str = "x") -> Any:
    return read_grader(check("eq", input=template, reference="WANTED")).grade(item, text)


def test_templates_take_parts_of_rows_and_of_answers() -> None:
    item = {"a": {"b": [1, {"c": "yes"}]}, "n": 2.5, "t": True, "o": {"k": "\u00e9"}}

    def same(template: str, wanted: str, text: str = "x") -> bool:
        return read_grader(check("eq", input=template, reference=wanted)).grade(item, text).reward == 1

    assert same("{{ item.a.b[1].c }}, {{item.n}} {{ item.t }}", "yes, 2.5 true")
    assert same("{{ item.o }}", '{"k": "\u00e9"}')
    assert same("<{{ sample.output_json.answer[0] }}>", "<7>", '{"answer": [7]}')
    assert same("{{ sample.output_text }}{{ sample.output_text }}", "xx")
    assert same("no variables, and no }} either", "no variables, and no }} either")
    assert same("{{ sample.output_text }}", "{{ item.n }}", "{{ item.n }}") is False, "what is filled in is no template"


@pytest.mark.parametrize(
    ("template", "text", "fault"),
    [
        ("{{ item.nothing }}", "x", "invalid_variable_error"),
        ("{{ item.a.b[7] }}", "x", "invalid_variable_error"),
        ("{{ item.s.length }}", "x", "invalid_variable_error"),
        ("{{ sample.output_json.a }}", "no JSON", "sample_parse_error"),
        ("{{ sample.output_json.a }}", "{}", "sample_parse_error"),
        ("{{ sample.output_json.a }}", "[" * 100_000, "sample_parse_error"),
        ("{{ item.long }}" * 1000, "x", "other_error"),
    ],
)
def test_what_cannot_be_filled_in_is_no_reward_and_said(template: str, text: str, fault: str) -> None:
    graded = filled(template, {"a": {"b": [1]}, "s": "text", "long": "x" * 100_000}, text)
    assert (graded.reward, graded.fault) == (0.0, fault)
    assert graded.told


def test_what_a_row_lacks_is_known_before_anything_is_sampled() -> None:
    grader = read_grader(multi("a + b"))
    assert grader.lacks({"answer": "x"}) is None
    assert grader.lacks({"other": "x"}) == "{{ item.answer }}: there is no such thing"


# -- formulas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("(a + b) / 2", 1.75), ("a ^ 2 + b", 3.5), ("-a ^ 2", -1.0), ("2 * -b", -5.0), ("max(a, b, 7) - min(a)", 6.0),
        ("abs(-b) + floor(b) + ceil(b)", 7.5), ("exp(a) - exp(1) + sqrt(b * 4 / 10) + log(a)", 1.0), ("1e1", 10.0),
        ("2 ^ 3 ^ 0", 2.0), ("8 / 4 / 2", 1.0), ("7 - 3 - 2", 2.0), ("2 ^ -a", 0.5), (".5 + 1. - +a", 0.5),
    ],
)  # fmt: skip
def test_formulas(formula: str, value: float) -> None:
    names = {"a": 1.0, "b": 2.5}
    assert Formula(formula, names, "here")(names) == pytest.approx(value)


@pytest.mark.parametrize(
    "formula",
    [
        "", "a +", "c", "__import__('os')", "a.real", "a[0]", "[a]", "a if b else a", "a < b", "not a", "lambda: a",
        "f(a)", "a ** 2", "(a", "a)", "min(a", "min(a,)", "a b", "2 a", "+", "a^",
        "min()", "sqrt(a, b)", "min(*a)", "max(a, key=b)", "'a'", "True", "1j", "9" * 400, "1e999",
        "a // b",
        "(" * 240 + "a" + ")" * 240, "-" * 499 + "a", "a % b", "a; b", "a := 1", "a" * 501, "\0", "a\nb", "f'{a}'",
    ],
)  # fmt: skip
def test_nothing_else_is_a_formula(formula: str) -> None:
    with pytest.raises(ConfigError, match="^here: "):
        Formula(formula, {"a": 1.0, "b": 2.0}, "here")


@pytest.mark.parametrize(
    "formula", ["a / 0", "log(0)", "sqrt(-1)", "(-8) ^ 0.5", "10 ^ 400", "9 ^ 9 ^ 9 ^ 9", "exp(1e9)"]
)
def test_a_formula_that_comes_to_no_number_is_no_reward(formula: str) -> None:
    graded = read_grader(multi(formula)).grade({"answer": "x"}, "x")
    assert (graded.reward, graded.fault) == (0.0, "other_error")
    assert "calculate_output" in (graded.told or "")


def test_several_are_one_reward() -> None:
    graded = read_grader(multi("0.5 * a + 0.5 * b")).grade({"answer": "abcd"}, "abc")
    assert graded.scores["a"] == 0
    assert graded.scores["b"] == pytest.approx(6 / 7)
    assert graded.reward == pytest.approx(3 / 7)
    alone = {**multi("check"), "graders": check("eq")}  # as OpenAI's clients have its type
    assert read_grader(alone).grade({"answer": "x"}, "x").reward == 1


# -- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ([], "grader: expected an object"),
        ({**check("eq"), "type": "score_model"}, "'score_model' graders are not served, for such a one asks a model"),
        ({**check("eq"), "type": "label_model"}, "'label_model' graders are not served"),
        ({**check("eq"), "type": "python"}, "'python' graders are not served, for such a one runs a program"),
        ({**check("eq"), "type": "string-check"}, "Did you mean 'string_check'?"),
        (check("equals"), "grader.operation: 'equals' is not served; there are eq, ne, like, ilike"),
        (similarity("cosine"), "grader.evaluation_metric: 'cosine' is not served; there are fuzzy_match, bleu"),
        (similarity("rouge_6"), "'rouge_6' is not served"),
        (similarity("meteor"), "'meteor' is not served"),
        (check("eq", pass_threshold=1), "grader.pass_threshold: there is no such option"),
        (without(check("eq"), "reference"), "grader.reference: is missing"),
        (check("eq", input=["a"]), "grader.input: expected a text, got list"),
        (check("eq", input="{{ item.a"), "'{{' without its '}}'"),
        (check("eq", input="{{ row.a }}"), "expected item. and a field of the row"),
        (check("eq", input="{{ sample.output_tools }}"), "sample.output_tools is not served"),
        (check("eq", input="{{ sample.output_text.a }}"), "without parts"),
        (check("eq", input="x" * 20_001), "at most 20000 are taken"),
        (check("eq", input="a\ud800"), "grader.input: half of a surrogate pair"),
        (check("eq", name="\udfff"), "grader.name: half of a surrogate pair"),
        (multi("a + c"), "there is no grader 'c'"),
        (multi("a", min=check("eq")), "grader.graders: 'min' cannot be in a formula"),
        (multi("a", **{"a-b": check("eq")}), "'a-b' cannot be in a formula"),
        (multi("a", a=multi("a")), "grader.graders.a.type: expected one of string_check, text_similarity"),
        (multi("a", a={**check("eq"), "type": "python"}), "grader.graders.a.type: 'python' graders are not served"),
        (multi("a0", **{f"a{i}": check("eq") for i in range(17)}), "1 to 16 graders"),
        ({**multi("a"), "graders": []}, "1 to 16 graders"),
        ({**multi("a"), "calculate_output": 1}, "expected a formula, got int"),
    ],
)  # fmt: skip
def test_what_is_no_grader_is_refused_with_its_place(wrong: Any, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_grader(wrong)
    assert told in str(error.value)
