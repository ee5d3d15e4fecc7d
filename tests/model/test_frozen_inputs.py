"""The frozen blocks run once a row: the same numbers as without, for causal models and encoders."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kilotune import LoraConfig, PeftModel, VeraConfig, get_config, get_peft_model
from kilotune.errors import ConfigError, ResourceError, TargetError, UnsupportedError
from kilotune.model.frozen_inputs import FrozenInputs
from kilotune.model.kept_rows import KeptRows
from kilotune.model.last_blocks import blocks_of, in_last_blocks
from tests.support.models import Nested, randomize, tiny_llama


def small(name: str, **more: Any) -> nn.Module:
    """A random transformers model of four blocks, width 16, vocabulary 32."""
    import transformers

    torch.manual_seed(0)
    width = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
    width |= {"vocab_size": 32, "max_position_embeddings": 64, "pad_token_id": 0, **more}
    of = {
        "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
        "roberta": (transformers.RobertaConfig, transformers.RobertaForSequenceClassification),
        "modernbert": (transformers.ModernBertConfig, transformers.ModernBertForSequenceClassification),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "gpt_neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM),
    }
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=4, n_head=2, vocab_size=32, n_positions=64, **more)
        return transformers.GPT2LMHeadModel(config)
    config_cls, model_cls = of[name]
    if name in ("gemma2", "qwen3", "mistral"):
        width |= {"head_dim": 8, "num_key_value_heads": 2}
    return model_cls(config_cls(**width))


CAUSAL = ["llama", "gpt2", "gemma2", "qwen3", "mistral", "gpt_neox"]
ENCODERS = ["bert", "roberta", "modernbert"]


def batch(rows: list[list[int]], causal: bool, left: bool = False) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    labels = torch.where(mask.bool(), ids, -100) if causal else torch.tensor([len(row) % 2 for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


ROWS = [[3, 4, 5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16], [17, 18, 19, 20, 21, 22, 23]]


def adapted(base: nn.Module, method: str = "lora", last: int = 2) -> PeftModel:
    model = get_peft_model(base, in_last_blocks(base, get_config(method, target_modules="all-linear"), last))
    randomize(model, scale=0.3)
    return model


def gradients(model: PeftModel, given: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = model(**given)
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), output.logits.detach(), found


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("name", [*CAUSAL, *ENCODERS])
def test_the_same_numbers_as_without(name: str, where: str, tmp_path: Path) -> None:
    causal = name in CAUSAL
    model = adapted(small(name)).eval()
    one, other = batch(ROWS[:3], causal), batch([ROWS[2], ROWS[1]], causal)
    whole = [gradients(model, one), gradients(model, other)]
    with FrozenInputs(model, 2, KeptRows(folder=tmp_path if where == "disk" else None)) as frozen:
        first, again = gradients(model, one), gradients(model, other)
        twice = gradients(model, one)
        usage = frozen.usage
    assert (usage.rows, usage.found, usage.computed) == (3, 5, 3)
    assert usage.bytes == (6 + 3 + 5) * 16 * 4
    mask = [one["attention_mask"].bool(), other["attention_mask"].bool()]
    for got, wanted, seen in ((first, whole[0], mask[0]), (again, whole[1], mask[1]), (twice, whole[0], mask[0])):
        torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-6)
        if causal:
            torch.testing.assert_close(got[1][seen], wanted[1][seen], rtol=1e-4, atol=1e-5)
        assert got[2].keys() == wanted[2].keys()
        for key, value in wanted[2].items():
            torch.testing.assert_close(got[2][key], value, rtol=1e-4, atol=1e-5)
    after = gradients(model, one)
    assert torch.equal(after[0], whole[0][0])
    assert not any("forward" in block.__dict__ for block in blocks_of(model).modules)


def test_frozen_blocks_do_not_run_again() -> None:
    model = adapted(small("llama"), last=1)
    ran: list[int] = []
    for number, block in enumerate(blocks_of(model.get_base_model()).modules):
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    with FrozenInputs(model, 1):
        model(**batch(ROWS, True))
        assert ran == [0, 1, 2, 3]
        ran.clear()
        model(**batch(ROWS[::-1], True))
        assert ran == [3]


def test_a_text_is_known_in_any_padding() -> None:
    model = adapted(small("llama")).eval()
    with FrozenInputs(model, 2) as frozen:
        model(**batch(ROWS, True))
        model(**batch(ROWS[1:2], True))  # not padded there
        assert frozen.usage.computed == 4
        model(**batch(ROWS, True, left=True))
        assert frozen.usage.computed == 4 + 3  # the longest one stands as it stood


def test_positions_that_count_from_the_padding_are_no_less_right() -> None:
    model = adapted(small("gpt2")).eval()
    left = batch(ROWS, True, left=True)
    with torch.no_grad():
        wanted = model(**left).logits
        with FrozenInputs(model, 2):
            model(**batch(ROWS, True))
            model(**left)
            got = model(**left).logits
    seen = left["attention_mask"].bool()
    torch.testing.assert_close(got[seen], wanted[seen], rtol=1e-4, atol=1e-5)


def test_other_inputs_are_another_row() -> None:
    model = adapted(small("bert")).eval()
    given = batch(ROWS[:1], False)
    kinds = torch.ones_like(given["input_ids"])
    with torch.no_grad():
        wanted = model(**given, token_type_ids=kinds).logits
        with FrozenInputs(model, 2):
            model(**given)
            got = [model(**given, token_type_ids=kinds).logits for _ in range(2)]
    assert all(torch.allclose(one, wanted, atol=1e-6) for one in got)


def test_dropout_of_the_frozen_part_is_off_and_that_of_the_rest_is_not() -> None:
    base = small("bert", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model = adapted(base).train()
    given, seen = batch(ROWS, False), []
    blocks_of(base).modules[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    with FrozenInputs(model, 2):
        losses = [model(**given).loss.item() for _ in range(3)]
    assert all(module.training for module in model.modules())
    own = given["attention_mask"].bool()
    torch.testing.assert_close(seen[1][own], seen[2][own])
    assert len(set(losses)) == 3


@pytest.mark.parametrize("megabytes", [0, 16 * 4 * 6 * 1e-6])
def test_what_does_not_fit_is_computed_each_time(megabytes: float) -> None:
    model = adapted(small("llama")).eval()
    given = batch(ROWS, True)
    wanted = model(**given).logits
    with FrozenInputs(model, 2, KeptRows(megabytes)) as frozen:
        got = [model(**given).logits for _ in range(3)]
        assert frozen.usage.bytes <= megabytes * 1e6
        assert frozen.usage.computed > 4
    seen = given["attention_mask"].bool()
    assert all(torch.allclose(one[seen], wanted[seen], atol=1e-5) for one in got)


def test_one_is_shared_by_models_of_the_same_base() -> None:
    kept, given = KeptRows(), batch(ROWS, True)
    with FrozenInputs(adapted(small("llama")), 2, kept) as frozen:
        frozen.root(**given)
    with FrozenInputs(adapted(small("llama"), "vera"), 2, kept) as frozen:
        frozen.root(**given)
        frozen.root(**given)
        assert frozen.usage.computed == 0


def test_what_gives_more_than_the_last_blocks_runs_whole() -> None:
    model = adapted(small("llama")).eval()
    given = batch(ROWS, True)
    with torch.no_grad(), FrozenInputs(model, 2) as frozen:
        wanted = frozen.root(**given, output_hidden_states=True).hidden_states
        assert frozen.usage.rows == 0
        prompt = given["input_ids"][:1]
        expected = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
    assert len(wanted) == 5
    assert torch.equal(model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False), expected)


def test_with_gradient_checkpointing() -> None:
    base = small("llama")
    model = adapted(base).train()
    given = batch(ROWS, True)
    wanted = gradients(model, given)
    base.activation_checkpointing_enable()
    base.enable_input_require_grads()
    with FrozenInputs(model, 2):
        got = [gradients(model, given) for _ in range(2)]
    for one in got:
        for key, value in wanted[2].items():
            torch.testing.assert_close(one[2][key], value, rtol=1e-4, atol=1e-5)


def _all_linear(base: nn.Module) -> PeftModel:
    return get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))


def _embeddings(base: nn.Module) -> PeftModel:
    return get_peft_model(base, LoraConfig(r=2, target_modules=["model.layers.3.mlp.up_proj", "embed_tokens"]))


def _saved(base: nn.Module) -> PeftModel:
    return get_peft_model(
        base, LoraConfig(r=2, target_modules=["model.layers.3.mlp.up_proj"], modules_to_save=["embed_tokens"])
    )


@pytest.mark.parametrize("made", [_all_linear, _embeddings, _saved])
@pytest.mark.parametrize("again", [False, True], ids=["alone", "kept by another"])
def test_what_is_trained_before_the_last_blocks_is_refused(made: Callable[[nn.Module], PeftModel], again: bool) -> None:
    kept, given = KeptRows(), batch(ROWS, True)
    if again:
        with FrozenInputs(adapted(small("llama")), 2, kept) as frozen:
            frozen.root(**given)
    model = made(small("llama"))
    with (
        FrozenInputs(model, 2, kept),
        pytest.raises(UnsupportedError, match=r"something is trained before model\.layers\.2 "),
    ):
        model(**given)


def test_a_replaced_forward_is_refused() -> None:
    model = adapted(small("llama"))
    block = blocks_of(model).modules[0]
    block.forward = copy.copy(block.forward)
    with FrozenInputs(model, 2), pytest.raises(UnsupportedError, match="has been replaced"):
        model(**batch(ROWS, True))
    assert "forward" in block.__dict__


class Halving(Nested):
    """Changes what it hands from block to block."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) / 2
        return self.head(x)


def test_a_model_that_changes_what_it_hands_on_is_refused() -> None:
    x = torch.randn(3, 6)
    model = Halving(blocks=4)
    with FrozenInputs(model.requires_grad_(False), 2), pytest.raises(UnsupportedError, match="changes what it hands"):
        model(x)


def test_any_module_with_blocks() -> None:
    x = torch.randn(3, 6)
    model = Nested(blocks=4).requires_grad_(False)
    wanted = model(x)
    with FrozenInputs(model, 2) as frozen:
        got = [model(x) for _ in range(2)]
        assert frozen.usage.found == 3
    assert all(torch.equal(one, wanted) for one in got)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    kept = KeptRows(folder=tmp_path / "file" / "there")
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot make a file in .*there: Not a directory"):
        kept.put(b"k", torch.zeros(2))


def test_wrong_arguments() -> None:
    with pytest.raises(ConfigError, match="megabytes: expected a number >= 0, got -1"):
        KeptRows(-1)
    with pytest.raises(ConfigError, match="expected 1 to 3, got 4: model.layers has 4 blocks"):
        FrozenInputs(small("llama"), 4)
    with pytest.raises(TargetError, match="needs a model with one list of equal blocks, and Sequential has none"):
        FrozenInputs(nn.Sequential(nn.Linear(2, 2)), 1)
    with pytest.raises(ConfigError, match=r"model: expected a torch\.nn\.Module, got "):
        FrozenInputs(3, 1)  # type: ignore[arg-type]


# -- which modules -------------------------------------------------------------------------------------


METHODS = ["vera", "lora", "ia3", "bitfit", "unilora", "loraxs", "dora", "bottleneck"]
PAIRS = [
    (n, m) for n in ("llama", "gpt2", "bert") for m in METHODS if (n, m) != ("llama", "bitfit")
]  # it has no biases


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_the_last_blocks_and_no_others(name: str, method: str) -> None:
    base = small(name)
    words = "all-biased" if method == "bitfit" else "all-linear"
    wide = get_config(method, target_modules=words, **({"r": 2} if method == "loraxs" else {}))
    narrow = in_last_blocks(base, wide, 1)
    every = get_peft_model(copy.deepcopy(base), wide).installed("default").layers
    where = f"{blocks_of(base).name}.3."
    taken = get_peft_model(base, narrow).installed("default").layers
    assert list(taken) == [layer for layer in every if layer.startswith(where)]
    assert taken


def test_they_are_named_as_peft_does() -> None:
    config = in_last_blocks(tiny_llama(layers=4), VeraConfig(r=4, target_modules="all-linear"), 2)
    assert config.layers_to_transform == (2, 3)
    assert config.layers_pattern == ("layers",)
    assert set(config.target_modules or ()) == {
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_peft_takes_the_same(tmp_path: Path) -> None:
    import peft

    base = tiny_llama(layers=4)
    model = adapted(copy.deepcopy(base))
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path))
    given = batch(ROWS, True)
    with torch.no_grad():
        torch.testing.assert_close(theirs(**given).logits, model.eval()(**given).logits)


def test_what_chooses_by_itself_is_refused() -> None:
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[1])
    with pytest.raises(ConfigError, match="layers_to_transform chooses by itself"):
        in_last_blocks(tiny_llama(layers=4), config, 2)
    with pytest.raises(TargetError, match=r"nothing that target_modules takes lies in model\.layers\.3"):
        in_last_blocks(tiny_llama(layers=4), LoraConfig(target_modules=["embed_tokens"]), 1)
