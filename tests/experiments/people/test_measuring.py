"""Losses in mixed batches are those of each row alone with its adapters active; answers are those of a model alone."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kilotune import LoraConfig, VeraConfig, get_peft_model
from kilotune.errors import AdapterError
from kilotune.experiments.people import measuring
from kilotune.experiments.people.answers_only import AnswersOnly
from kilotune.experiments.people.bases import Base, Letters
from kilotune.experiments.people.measuring import BASE, answered, chains_of, differing, measured
from kilotune.experiments.people.training import SHARED, Encoded
from kilotune.experiments.people.voices import Pair
from kilotune.model.peft_model import PeftModel

PEOPLE = ("ann", "bob", "cy")


@pytest.fixture
def base() -> Base:
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    special = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **special, num_attention_heads=4))
    return Base("tiny", "tiny", "MIT", model.eval().requires_grad_(False), Letters())


@pytest.fixture
def model(base: Base) -> PeftModel:
    """The base with a shared LoRA and personal VeRAs of ann and bob, none of which is zero."""
    made = get_peft_model(base.model, LoraConfig(r=2, target_modules="all-linear"), SHARED)
    for name in PEOPLE[:2]:
        made.add_adapter(name, VeraConfig(r=8, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name or "vera_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made.eval()


def rows_of(base: Base) -> dict[str, Encoded]:
    def of(name: str) -> list[dict[str, list[int]]]:
        return [base.speech.row(Pair(f"{name} asks {'x' * n}", f"answer {n}"), "=", " ") for n in range(4)]

    return {name: Encoded([], [], of(name)) for name in PEOPLE}


def alone(model: PeftModel, chain: tuple[str, ...], rows: list[dict[str, list[int]]]) -> float:
    """By transformers' own loss, a row at a time."""
    model.set_adapter(list(chain), inference_mode=True)
    total, count = 0.0, 0
    for row in rows:
        tokens = sum(label != -100 for label in row["labels"])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        total, count = total + float(loss) * tokens, count + tokens
    return total / count


def test_who_has_no_adapter_runs_as_the_shared_one() -> None:
    assert chains_of(PEOPLE, PEOPLE[:2]) == {
        BASE: (),
        SHARED: (SHARED,),
        "ann": (SHARED, "ann"),
        "bob": (SHARED, "bob"),
        "cy": (SHARED,),
    }


def test_everybody_under_everybody(base: Base, model: PeftModel) -> None:
    rows, chains = rows_of(base), chains_of(PEOPLE, PEOPLE[:2])
    ticks: list[float] = []
    with AnswersOnly(base) as answers:
        found = measured(model, rows, chains, answers, ticks.append)
        apart = differing(model, rows, chains, answers, found)
        wrong = {**found, "cy": dict.fromkeys(PEOPLE, 0.0)}
        assert differing(model, rows, chains, answers, wrong) > 1
    assert apart < 1e-5
    assert ticks[-1] == 1.0
    assert list(found) == [BASE, SHARED, *PEOPLE]
    for name, chain in chains.items():
        for owner, own in rows.items():
            assert found[name][owner] == pytest.approx(alone(model, chain, own.test), abs=1e-5), (name, owner)
    assert len({round(found[name]["ann"], 4) for name in (BASE, SHARED, "ann", "bob")}) == 4
    assert found["cy"] == pytest.approx(found[SHARED], abs=1e-5)


def test_a_wrong_chain_is_an_error(base: Base, model: PeftModel) -> None:
    with AnswersOnly(base) as answers, pytest.raises(AdapterError, match="dan"):
        measured(model, rows_of(base), {"dan": (SHARED, "dan")}, answers, lambda _: None)


def test_answers_are_those_of_each_alone(base: Base, model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    chains = chains_of(PEOPLE, PEOPLE[:2])
    prompts = [base.speech.prompt(text, "=") for text in ("what", "and what else")]
    found = answered(model, base.speech, prompts, chains, 6)
    for name, chain in chains.items():
        model.set_adapter(list(chain), inference_mode=True)
        for text, prompt in zip(found.texts[name], prompts):
            ids = torch.tensor([prompt])
            with torch.no_grad():
                one = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
                )
            new = measuring._until(one[0, len(prompt) :].tolist(), base.speech.end)
            assert text == base.speech.text(new).strip()
    assert 0 < found.tokens <= 6 * 10
    assert found.seconds > 0
