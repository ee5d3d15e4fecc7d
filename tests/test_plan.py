"""The counts of ``kilotune.plan``, against formulas that are written here and nowhere in the library."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kilotune import ConfigError, LoraConfig, MissingExtraError, TargetError, VeraConfig, get_peft_model
from kilotune.config import AdapterConfig
from kilotune.model.parameter_report import count_parameters
from kilotune.plan import BUILT_IN, AdapterCosts, Base, Head, costs, load_base
from tests.support.cli_helpers import BERT, LLAMA, llama

QUERY_VALUE = ["query", "value"]


@pytest.fixture(scope="module")
def base() -> Any:
    made: dict[str, Base] = {}

    def get(name: str) -> Base:
        if name not in made:
            made[name] = load_base(name)
        return made[name]

    return get


def vera_formula(shapes: list[tuple[int, int]], rank: int) -> int:
    """One number of b per output and one of d per rank, for every (out, in)."""
    return sum(out + rank for out, _ in shapes)


def lora_formula(shapes: list[tuple[int, int]], rank: int) -> int:
    return sum(rank * (out + inn) for out, inn in shapes)


# -- what the papers and tutorials count ---------------------------------------------------------------


def test_the_four_layer_example(base: Any) -> None:
    model = base("four-layer").model
    assert base("four-layer").parameters == 39_970
    lora = costs(model, LoraConfig(r=16, target_modules="all-linear")).parameters
    assert (lora.trainable, lora.frozen_base, lora.frozen_shared, lora.pairs) == (12_960, 39_970, 0, 0)
    vera = costs(model, VeraConfig(r=16, target_modules="all-linear", sharing="shape")).parameters
    assert (vera.trainable, vera.frozen_base, vera.frozen_shared, vera.pairs) == (434, 39_970, 9_120, 3)
    assert vera.total == 49_524
    nested = costs(model, VeraConfig(r=16, target_modules="all-linear")).parameters
    assert (nested.trainable, nested.frozen_shared, nested.pairs) == (434, 16 * (120 + 120), 1)


@pytest.mark.parametrize("targets", [["query", "value"], ["query", "key"]], ids="-".join)
@pytest.mark.parametrize(
    ("name", "width", "layers", "vera", "lora"),
    [
        ("roberta-base", 768, 12, (18_456, 18_816, 24_576), ("36.8K", "589.8K", "9437.1K")),
        ("roberta-large", 1024, 24, (49_200, 49_920, 61_440), ("98.3K", "1572.8K", "25165.8K")),
    ],
)
def test_table_1_of_the_vera_paper(
    base: Any,
    name: str,
    width: int,
    layers: int,
    vera: tuple[int, ...],
    lora: tuple[str, ...],
    targets: list[str],
) -> None:
    for rank, of_vera, of_lora in zip((1, 16, 256), vera, lora, strict=True):
        found = costs(base(name).model, VeraConfig(r=rank, target_modules=targets))
        assert found.parameters.trainable == of_vera == 2 * layers * (width + rank)
        assert found.parameters.frozen_shared == rank * 2 * width
        assert found.layers == 2 * layers
        assert found.shapes == {(width, width): 2 * layers}
        other = costs(base(name).model, LoraConfig(r=rank, target_modules=targets)).parameters.trainable
        assert other == 2 * 2 * layers * width * rank
        assert f"{other // 100 / 10}K" == of_lora  # the paper cuts off the digits, it does not round


def test_gpt3_takes_seconds_and_no_memory() -> None:
    start = time.perf_counter()
    base = load_base("gpt3")
    assert base.parameters == 174_604_259_328  # 175B
    assert all(p.is_meta for p in base.model.parameters())
    users = 1_000_000
    lora = costs(base.model, LoraConfig(r=16), users)
    vera = costs(base.model, VeraConfig(r=16), users)
    big = costs(base.model, VeraConfig(r=256))
    seconds = time.perf_counter() - start
    assert lora.parameters.trainable == 75_497_472 == 2 * 2 * 96 * 12288 * 16
    assert lora.adapter_bytes == 301_989_888  # 302 MB in float32
    assert lora.users_bytes == 301_989_888_000_000  # 302 TB
    assert vera.parameters.trainable == 2_362_368 == 2 * 96 * (12288 + 16)
    assert vera.adapter_bytes == 9_449_472  # 9.4 MB
    assert vera.users_bytes == 9_449_472_000_000  # 9.4 TB
    assert vera.parameters.shared_bytes == 4 * 16 * 2 * 12288
    assert big.parameters.trainable == 2_408_448  # the paper prints 8.7M
    assert "2.8M" in base.notes["vera"]
    assert "8.7M" in base.notes["vera"]
    assert "lora" not in base.notes
    assert seconds < 20, seconds  # 3 to 4 on an idle core


@pytest.mark.parametrize(
    ("name", "config", "trainable"),
    [
        ("roberta-base", VeraConfig(r=1024, target_modules=QUERY_VALUE), 43_008),
        ("vit-base", VeraConfig(r=256, target_modules=r".*\.(query|value|q_proj|v_proj)"), 24_576),
        ("vit-large", VeraConfig(r=256, target_modules=r".*\.(query|value|q_proj|v_proj)"), 61_440),
        ("gpt2-medium", VeraConfig(r=1024), 98_304),  # c_attn is query, key and value in one: 24 * (3072 + 1024)
        ("gpt2-large", VeraConfig(r=1024), 36 * (3 * 1280 + 1024)),
        ("llama-7b", VeraConfig(r=1024, target_modules="all-linear"), 1_589_248),
        ("llama-13b", VeraConfig(r=1024, target_modules="all-linear"), 2_416_640),
        ("llama-7b", LoraConfig(r=64, target_modules="all-linear"), 159_907_840),
        ("llama-7b", VeraConfig(r=256), 278_528),
        ("llama-3.2-3b", VeraConfig(r=256), 129_024),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_published_counts(base: Any, name: str, config: AdapterConfig, trainable: int) -> None:
    assert costs(base(name).model, config).parameters.trainable == trainable


def test_gpt2_large_with_query_and_value_apart(tmp_path: Path) -> None:
    """The paper's 165,888 counts query and value as layers of their own."""
    shape = {"hidden_size": 1280, "word_embed_proj_dim": 1280, "ffn_dim": 5120, "num_hidden_layers": 36}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "opt", "num_attention_heads": 20, **shape}))
    assert costs(load_base(str(file)).model, VeraConfig(r=1024)).parameters.trainable == 165_888


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("bert-base", 109_514_298),
        ("roberta-base", 124_697_433),
        ("vit-base", 86_389_248),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
    ],
)
def test_built_in_models_have_their_published_sizes(base: Any, name: str, parameters: int) -> None:
    assert base(name).parameters == parameters


def test_every_built_in_model_can_be_planned(base: Any) -> None:
    for name in (n for n in BUILT_IN if n != "gpt3"):  # which has a test of its own
        targets = "all-linear" if name == "four-layer" else None
        found = costs(base(name).model, VeraConfig(r=2, target_modules=targets))
        assert found.parameters.trainable == sum(n * (out + 2) for (out, _), n in found.shapes.items())


# -- the same as in earnest ----------------------------------------------------------------------------

CONFIGS = [
    VeraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    VeraConfig(r=4, target_modules="all-linear", sharing="shape"),
    VeraConfig(r=4, target_modules=["q_proj", "down_proj"], save_projection=True),
    VeraConfig(r=4, target_modules="all-linear", sharing="shape", save_projection=True),
    VeraConfig(r=4, target_modules=["q_proj"], generator="peft"),
    VeraConfig(r=4, target_modules=["q_proj"], generator="peft", save_projection=True),
    VeraConfig(r=4, target_modules=["q_proj"], bias="vera_only"),
    LoraConfig(r=3, target_modules=["q_proj", "down_proj"]),
    LoraConfig(r=3, target_modules="all-linear", rank_pattern={"down_proj": 5}, bias="all"),
    LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_a_plan_is_what_a_run_has(tmp_path: Path, config: AdapterConfig) -> None:
    """Counts, and the file's size to the byte, on the meta device and on a real model."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": True, **LLAMA})
    )
    planned = costs(load_base(str(tmp_path)).model, config)
    real = get_peft_model(llama(attention_bias=True), config)
    assert planned.parameters == real.report()
    real.save_pretrained(tmp_path / "adapter")
    assert planned.file_bytes == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert planned.adapter_bytes == 4 * real.report().trainable
    assert planned.training_bytes == real.report().total_bytes + 12 * real.report().trainable


def test_names_that_are_not_ascii_are_counted_in_bytes(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("größe", nn.Linear(5, 3))
    model.add_module("norm", nn.BatchNorm1d(3))  # saved whole, with its int64 counter
    config = LoraConfig(r=2, target_modules=["größe"], modules_to_save=["norm"])
    planned = costs(model, config)
    get_peft_model(model, config).save_pretrained(tmp_path / "a")
    assert planned.file_bytes == (tmp_path / "a" / "adapter_model.safetensors").stat().st_size


def test_the_model_is_as_it_was(base: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    before = [(name, id(module)) for name, module in model.named_modules()]
    values = [p.clone() for p in model.parameters()]
    costs(model, VeraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(TargetError):
        costs(model, VeraConfig(r=2, target_modules=["nothing"]))
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(values, model.parameters(), strict=True))


@pytest.mark.parametrize("rank", [1, 7, 40])
def test_unequal_shapes_against_the_formula(rank: int) -> None:
    shapes = [(7, 3), (5, 7), (7, 3), (2, 5)]
    model = nn.ModuleList(nn.Linear(inn, out, bias=False, device="meta") for out, inn in shapes)
    vera = costs(model, VeraConfig(r=rank, target_modules="all-linear"))
    assert vera.parameters.trainable == vera_formula(shapes, rank)
    assert vera.parameters.frozen_shared == rank * (7 + 7)
    apart = costs(model, VeraConfig(r=rank, target_modules="all-linear", sharing="shape"))
    assert apart.parameters.frozen_shared == rank * sum(out + inn for out, inn in set(shapes))
    assert apart.parameters.pairs == 3
    lora = costs(model, LoraConfig(r=rank, target_modules="all-linear"))
    assert lora.parameters.trainable == lora_formula(shapes, rank)
    assert lora.shapes == {(7, 3): 2, (5, 7): 1, (2, 5): 1}


def test_a_weight_that_is_tied_transposed_counts_once() -> None:
    """The report goes by memory location, not by object and not by shape."""
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False))
    first, second = model[0], model[1]
    second.weight = nn.Parameter(first.weight.detach().T)
    assert count_parameters(model).total == 24 + 24
    assert count_parameters(model).total_bytes == 4 * 48


# -- where a base comes from ---------------------------------------------------------------------------


def test_file_folder_and_built_in_agree(tmp_path: Path) -> None:
    values = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "transformers_version": "5.0.0"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    sizes = {load_base(str(source)).parameters for source in (tmp_path, tmp_path / "config.json", "gpt2")}
    assert sizes == {124_439_808}


def test_dtype_of_the_base(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "dtype": "bfloat16"}))
    as_written = load_base(str(tmp_path))
    assert as_written.report.total_bytes == 2 * as_written.parameters
    assert load_base(str(tmp_path), dtype="float32").report.total_bytes == 4 * as_written.parameters
    half = costs(load_base("four-layer", dtype="float16").model, VeraConfig(r=16, target_modules="all-linear"))
    assert half.parameters.shared_bytes == 2 * half.parameters.frozen_shared  # A and B follow the base
    assert half.adapter_bytes == 4 * 434  # the vectors do not
    sizes = load_base("four-layer").bytes_by_dtype()
    assert sizes == {"float32": 4 * 39_970, "bfloat16": 2 * 39_970, "float16": 2 * 39_970}


def test_a_task_has_its_head() -> None:
    plain = load_base("roberta-base")
    labelled = load_base("roberta-base", head=Head("SEQ_CLS", 3))
    assert type(plain.model).__name__ == "RobertaForMaskedLM"
    assert type(labelled.model).__name__ == "RobertaForSequenceClassification"
    found = costs(labelled.model, VeraConfig(r=16, task_type="SEQ_CLS"))
    assert found.parameters.trainable == 18_816 + (768 * 768 + 768) + (768 * 3 + 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[1]", "with a 'model_type'"),
        ("{}", "with a 'model_type'"),
        ('{"model_type": "robbert"}', "Did you mean 'roberta'?"),
        ('{"model_type": "gpt2", "n_embd": "wide"}', "n_embd"),
        ('{"model_type": "bert", "hidden_size": 16, "num_attention_heads": 3}', "cannot build this model"),
    ],
)
def test_a_bad_config_is_one_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_base(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_source_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        load_base(str(tmp_path))
    with pytest.raises(ConfigError, match="is not there"):
        load_base(str(tmp_path / "none" / "config.json"))
    with pytest.raises(ConfigError, match="no file, folder, built-in model or hub id"):
        load_base("../roberta base")
    import transformers

    def offline(*args: Any, **options: Any) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(ConfigError, match=r"Did you mean 'roberta-base'\? .* cannot be had: no network\. Without a "):
        load_base("robeta-base")


def test_a_hub_id_is_asked_for_without_running_code(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    asked: list[Any] = []

    def hub(source: str, **options: Any) -> Any:
        asked.append((source, options))
        return transformers.BertConfig(**BERT)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", hub)
    base = load_base("owner/name", revision="v1")
    assert type(base.model).__name__ == "BertModel"
    assert base.origin == "hub: owner/name"
    assert asked == [("owner/name", {"revision": "v1", "trust_remote_code": False})]


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert load_base("four-layer").parameters == 39_970
    with pytest.raises(MissingExtraError, match=r"pip install 'kilotune\[transformers\]'"):
        load_base("gpt2")


def test_wrong_arguments() -> None:
    with pytest.raises(ConfigError, match=r"dtype: expected one of .* Did you mean 'bfloat16'\?"):
        load_base("four-layer", dtype="bfloat")
    with pytest.raises(ConfigError, match="is not on the hub"):
        load_base("four-layer", revision="main")
    with pytest.raises(ConfigError, match=r"task: expected one of .* Did you mean 'SEQ_CLS'\?"):
        load_base("roberta-base", head=Head("SEQ_CLASS"))
    model = load_base("four-layer").model
    for users in (0, -1, True, 1.5):
        with pytest.raises(ConfigError, match="users: expected a whole number >= 1"):
            costs(model, VeraConfig(r=2, target_modules="all-linear"), users)  # type: ignore[arg-type]


def test_the_document_is_plain() -> None:
    found = costs(load_base("four-layer").model, VeraConfig(r=16, target_modules="all-linear"), users=10)
    assert isinstance(found, AdapterCosts)
    document = json.loads(json.dumps(found.to_dict()))
    assert document["parameters"]["trainable"] == 434
    assert document["users_bytes"] == 17_360
    assert document["users_file_bytes"] == 10 * document["file_bytes"]
    assert {"out": 120, "in": 120, "count": 2} in document["shapes"]
    assert document["options"]["r"] == 16
