"""Embeddings against PEFT, live: forward, gradients, steps, merging, files both ways; GPT-BigCode; tied heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import kilotune
from kilotune import CheckpointError
from tests.peft_parity.files import check_outputs, check_peft_to_ours, files, peft_load, scrambled
from tests.peft_parity.oracle import (
    IDS,
    LAYERED,
    SIZES,
    Fed,
    assert_same,
    base,
    check_forward,
    check_gradients,
    check_merge,
    check_training,
    loss_of,
    peft_parameters,
    quiet,
    run,
    twins,
)

WORDS = torch.tensor([[1, 4, 4, 2, 9], [0, 2, 4, 7, 7]])


class Words(Fed):
    """A table with a padding row (2), and one whose gradient is divided by how often an id occurs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=2)
        self.other = nn.Embedding(13, 6, scale_grad_by_freq=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        ids = x.long()
        return self.head(self.table(ids) + torch.tanh(self.other(ids)))

    def example(self, dtype: torch.dtype) -> Tensor:
        return WORDS


def big_code() -> GPTBigCodeForCausalLM:
    """A small GPT-BigCode with random weights; its head is tied to wte."""
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPTBigCodeForCausalLM(
        GPTBigCodeConfig(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=1, **still
        )
    )


def gemma() -> Gemma3ForCausalLM:
    """Gemma's embedding multiplies what it looks up by sqrt(width)."""
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24, head_dim=8)
    )


def llama(tie: bool = False) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            **SIZES, num_attention_heads=2, num_key_value_heads=2, intermediate_size=24, tie_word_embeddings=tie
        )
    )


LAYERED.update({"words": Words, "bigcode": big_code, "gemma": gemma, "llama-words": llama})
TARGETS: dict[str, list[str]] = {
    "words": ["table", "other"],
    "bigcode": ["c_attn", "c_proj", "c_fc", "wte", "wpe"],
    "gemma": ["embed_tokens"],
    "llama-words": ["embed_tokens", "lm_head"],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"lora_alpha": 3},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}
# PEFT scales by Gemma's factor, but not in DoRA.
CASES = [(name, v) for name in TARGETS for v in VARIANTS if (name, v) != ("gemma", "dora")]


def pair(name: str, variant: str, **options: Any) -> Any:
    return twins(name, "lora", **{"r": 4, "target_modules": TARGETS[name], **VARIANTS[variant], **options})


@pytest.mark.parametrize("name, variant", CASES)
def test_forward_and_gradients(name: str, variant: str) -> None:
    both = pair(name, variant)
    check_forward(both)
    check_gradients(both)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name, variant", CASES)
def test_three_optimizer_steps(name: str, variant: str, optimizer: str) -> None:
    check_training(pair(name, variant), optimizer)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merge(variant: str) -> None:
    check_merge(pair("words", variant))


@pytest.mark.parametrize("name, variant", [case for case in CASES if "embed_tokens" not in TARGETS[case[0]]])
def test_what_peft_writes_is_read_and_written_back(name: str, variant: str, tmp_path: Path) -> None:
    """For the others, in whose files PEFT puts the base's embedding too, see the test of that."""
    options = {"r": 4, "target_modules": TARGETS[name], **VARIANTS[variant]}
    check_peft_to_ours(name, "lora", torch.float32, options, tmp_path)


@pytest.mark.parametrize("name, variant", CASES)
def test_what_we_write_is_read_by_peft(name: str, variant: str, tmp_path: Path) -> None:
    config = kilotune.LoraConfig(r=4, target_modules=TARGETS[name], **VARIANTS[variant])
    model = scrambled(kilotune.get_peft_model(base(name), config))
    model.save_pretrained(tmp_path / "ours")
    theirs = peft_load(tmp_path / "ours", base(name))
    check_outputs(theirs, model)
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    (_, one), (_, other) = files(tmp_path / "ours"), files(tmp_path / "theirs")
    tables = {key for key in other if key.endswith("base_layer.weight")}
    assert_same(
        {k: tuple(v.shape) for k, v in one.items()}, {k: tuple(other[k].shape) for k in set(other) - tables}, ""
    )
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    check_outputs(kilotune.PeftModel.from_pretrained(base(name), tmp_path / "theirs"), model)


def test_the_base_s_embedding_in_peft_s_file_is_passed_over_where_it_is_the_base_s(tmp_path: Path) -> None:
    both = pair("llama-words", "lora")
    with quiet():
        both.theirs.save_pretrained(tmp_path / "theirs")
    _, tensors = files(tmp_path / "theirs")
    tables = {key for key in tensors if key.endswith("base_layer.weight")}
    assert tables == {
        "base_model.model.model.embed_tokens.base_layer.weight",
        "base_model.model.lm_head.base_layer.weight",
    }
    loaded = kilotune.PeftModel.from_pretrained(base("llama-words"), tmp_path / "theirs")
    check_outputs(loaded, both.theirs)
    other = base("llama-words")
    with torch.no_grad():
        other.get_input_embeddings().weight[3, 3] += 1
    with pytest.raises(CheckpointError, match=r"embed_tokens\.base_layer\.weight: the file has another base weight"):
        kilotune.PeftModel.from_pretrained(other, tmp_path / "theirs")


def test_gpt_bigcode_with_peft_s_published_targets_trains_both_embeddings() -> None:
    """c_attn, c_proj, c_fc, wte, wpe; rank 16, alpha 8, dropout 0.1: PEFT's names and counts, and it learns."""
    options = {"r": 16, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": TARGETS["bigcode"]}
    ours = kilotune.get_peft_model(base("bigcode"), kilotune.LoraConfig(**options))
    with quiet():
        theirs = peft.get_peft_model(base("bigcode"), peft.LoraConfig(**options))
    mine, other = dict(ours.adapter_parameters()), peft_parameters(theirs)
    assert_same({k: tuple(p.shape) for k, p in mine.items()}, {k: tuple(p.shape) for k, p in other.items()}, "tensors")
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    tables = {"transformer.wte": (64, 32), "transformer.wpe": (32, 32)}
    for name, (number, width) in tables.items():
        assert tuple(mine[f"{name}.lora_A"].shape) == (16, number)
        assert tuple(mine[f"{name}.lora_B"].shape) == (width, 16)
        assert not mine[f"{name}.lora_A"].any()  # PEFT's start: the first factor of an embedding is zero
        assert not other[f"{name}.lora_A"].any()
        assert 0.8 < float(mine[f"{name}.lora_B"].detach().std()) < 1.2
    start = {key: p.detach().clone() for key, p in mine.items()}
    frozen = {key: p.detach().clone() for key, p in ours.named_parameters() if not p.requires_grad}
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(mine.values(), lr=5e-3)
    losses = []
    for _ in range(40):
        ours.train()
        optimizer.zero_grad()
        loss_of(ours).backward()
        optimizer.step()
        losses.append(float(loss_of(ours.eval()).detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert [key for key, p in mine.items() if torch.equal(p, start[key])] == []
    assert all(torch.equal(p, frozen[key]) for key, p in ours.named_parameters() if key in frozen)
    used = mine["transformer.wte.lora_A"].detach().any(0).nonzero().flatten().tolist()
    assert used == sorted(set(IDS.flatten().tolist()))  # an id that never came is not trained


def test_the_row_of_padding_is_not_trained() -> None:
    both = twins("words", "lora", r=3, target_modules=["table"])
    for model in (both.ours, both.theirs):
        loss_of(model).backward()
    for gradient in (
        dict(both.ours.adapter_parameters())["table.lora_A"].grad,
        peft_parameters(both.theirs)["table.lora_A"].grad,
    ):
        assert gradient is not None
        assert not gradient[:, 2].any()
        assert gradient[:, 4].all()


def test_a_sparse_table_gives_its_factor_a_dense_gradient() -> None:
    """``sparse`` is about the table's own gradient; PEFT hands it on, and fails in its backward."""
    torch.manual_seed(0)
    plain, sparse = nn.Embedding(11, 6), nn.Embedding(11, 6, sparse=True)
    sparse.load_state_dict(plain.state_dict())
    grads = []
    for table in (plain, sparse):
        torch.manual_seed(1)
        model = kilotune.get_peft_model(nn.Sequential(table), kilotune.LoraConfig(r=2, target_modules=["0"]))
        model(WORDS).square().sum().backward()
        grads.append([p.grad for _, p in model.adapter_parameters()])
    for one, other in zip(*grads):
        assert torch.equal(one, other)
    with quiet():
        theirs = peft.get_peft_model(nn.Sequential(sparse), peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(RuntimeError):
        theirs(WORDS).square().sum().backward()


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_on_one_of_two_tied_weights_changes_that_one_only(merge: bool) -> None:
    torch.manual_seed(2)
    model, plain = llama(tie=True).eval(), llama(tie=True).eval()
    plain.load_state_dict(model.state_dict())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    adapted = kilotune.get_peft_model(model, kilotune.LoraConfig(r=2, target_modules=["embed_tokens"]))
    scrambled(adapted)
    factors = dict(adapted.adapter_parameters())
    a, b = factors["model.embed_tokens.lora_A"], factors["model.embed_tokens.lora_B"]
    table = plain.model.embed_tokens.weight.detach()
    expected = plain(inputs_embeds=F.embedding(IDS, table + 4.0 * (b @ a).T.detach())).logits
    if merge:
        adapted.merge_adapter()
    torch.testing.assert_close(adapted(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    if merge:
        assert torch.equal(model.lm_head.weight, table)
        adapted.unmerge_adapter()
    assert adapted.unload().lm_head.weight is adapted.get_base_model().model.embed_tokens.weight


def test_all_linear_takes_no_embedding_as_in_peft() -> None:
    both = twins("bigcode", "lora", r=2, target_modules="all-linear")
    assert not {name for name in both.ours.adapted_layers() if "wte" in name or "wpe" in name}


def test_dropout_is_left_out_at_an_embedding_as_in_peft() -> None:
    both = twins("words", "lora", r=3, target_modules=["table", "other"], lora_dropout=0.9)
    still = run(both.ours)
    for model in (both.ours, both.theirs):
        model.train()
        torch.testing.assert_close(run(model), still, rtol=1e-5, atol=1e-5)
