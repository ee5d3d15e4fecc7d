"""LoraConfig(layer_replication=...): blocks more than once over the same weights, as PEFT has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kilotune
import kilotune.peft as ours
from kilotune.errors import ConfigError, TargetError
from tests.peft.both import IDS, alike, filled, logits
from tests.peft_parity.oracle import quiet
from tests.support.models import tiny_classifier, tiny_llama

RANGES = [[0, 3], [1, 4]]  # blocks 0 1 2 1 2 3


def llama() -> Any:
    return tiny_llama(layers=4)


def replicated(library: Any, **options: Any) -> Any:
    config = library.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "layer_replication": RANGES, **options})
    model = library.get_peft_model(llama(), config)
    filled(library, model, "default")
    return model


def test_outputs_keys_and_training_are_pefts() -> None:
    def script(library: Any) -> Any:
        model = replicated(library, task_type="CAUSAL_LM")
        seen = [logits(model), model.get_base_model().config.num_hidden_layers]
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        seen += [library.get_peft_model_state_dict(model), logits(model)]
        with model.disable_adapter():
            seen.append(logits(model))
        return seen

    alike(script)


def test_copies_are_merged_apart() -> None:
    """PEFT adds the changes of all copies to the one weight that they share."""
    model = replicated(ours)
    wanted, own = logits(model), llama().model.layers[1].self_attn.q_proj.weight
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted)
    blocks = merged.model.layers
    assert not torch.equal(blocks[1].self_attn.q_proj.weight, blocks[3].self_attn.q_proj.weight)
    assert blocks[1].mlp.up_proj.weight is blocks[3].mlp.up_proj.weight
    back = replicated(ours).unload()
    assert torch.equal(back.model.layers[3].self_attn.q_proj.weight, own)


def test_a_bert_is_replicated_as_pefts() -> None:
    def script(library: Any) -> Any:
        config = library.LoraConfig(target_modules=["query"], layer_replication=[(0, 2), (0, 1)])
        model = library.get_peft_model(tiny_classifier(), config)
        filled(library, model, "default")
        return logits(model)

    alike(script)


def test_files_go_both_ways(tmp_path: Path) -> None:
    import peft

    with quiet():
        for library in (ours, peft):
            replicated(library).save_pretrained(str(tmp_path / library.__name__))
        wanted = logits(replicated(peft))
        for name in ("kilotune.peft", "peft"):
            assert json.loads((tmp_path / name / "adapter_config.json").read_text())["layer_replication"] == RANGES
            for library in (ours, peft):
                base = llama()
                loaded = library.PeftModel.from_pretrained(base, str(tmp_path / name))
                torch.testing.assert_close(logits(loaded), wanted)
                assert len(base.model.layers) == 6
    with pytest.raises(ConfigError, match="layer_replication"):  # its own models have no such option
        kilotune.PeftModel.from_pretrained(llama(), tmp_path / "peft")


def test_the_weights_are_the_bases_own_and_the_adapters_are_not() -> None:
    base = llama()
    numbers = {p.data_ptr() for p in base.parameters()}
    model = ours.get_peft_model(base, ours.LoraConfig(target_modules=["q_proj"], layer_replication=RANGES))
    frozen = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert frozen == numbers
    assert len(trained) == len({p.data_ptr() for p in trained}) == 12
    assert base.model.layers[1].mlp.up_proj.weight is base.model.layers[3].mlp.up_proj.weight


def test_generating_with_a_cache_is_as_without() -> None:
    model = replicated(ours, task_type="CAUSAL_LM").eval()
    made = [
        model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert torch.equal(*made)


def test_types_of_blocks_come_along() -> None:
    base = llama()
    full, sliding = "full_attention", "sliding_attention"
    base.config.layer_types = [full, sliding, full, sliding]
    ours.get_peft_model(base, ours.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 4]]))
    assert base.config.layer_types == [
        base.config.layer_types[0],
        *["sliding_attention"] * 2,
        "full_attention",
        "sliding_attention",
    ]


def test_a_second_adapter_stands_on_the_same_blocks() -> None:
    model = replicated(ours)
    model.add_adapter("same", ours.LoraConfig(target_modules=["v_proj"], layer_replication=RANGES))
    model.add_adapter("none", ours.LoraConfig(target_modules=["v_proj"]))
    assert len(model.get_base_model().model.layers) == 6
    with pytest.raises(ConfigError, match=r"replicated by \[\[0, 3\], \[1, 4\]\]"):
        model.add_adapter("other", ours.LoraConfig(target_modules=["v_proj"], layer_replication=[[0, 2]]))
    plain = ours.get_peft_model(llama(), ours.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="there are adapters in it"):
        plain.add_adapter("other", ours.LoraConfig(target_modules=["v_proj"], layer_replication=RANGES))


def test_a_model_is_as_it_was_where_the_adapter_cannot_be_added() -> None:
    base = llama()
    blocks = base.model.layers
    with pytest.raises(TargetError, match="no_such"):
        ours.get_peft_model(base, ours.LoraConfig(target_modules=["no_such"], layer_replication=RANGES))
    assert base.model.layers is blocks
    assert base.config.num_hidden_layers == 4
    ours.get_peft_model(base, ours.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2]]))
    assert len(base.model.layers) == 2


@pytest.mark.parametrize("wrong", ["0-4", 3, [3], [[0]], [[0, 1, 2]], [[2, 2]], [[-1, 2]], [[0, 1.5]], [["0", "1"]]])
def test_a_wrong_value_is_told_at_once(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"layer_replication: expected pairs \[first, end\]"):
        ours.LoraConfig(layer_replication=wrong)


def test_blocks_that_are_not_there_are_told() -> None:
    with pytest.raises(ConfigError, match="100000 blocks are more than the 1024"):
        ours.LoraConfig(layer_replication=[[0, 1]] * 100_000)
    with pytest.raises(ConfigError, match="there are 4 blocks, and a range ends at 5"):
        ours.get_peft_model(llama(), ours.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 5]]))
    with pytest.raises(ConfigError, match="no list of blocks"):
        ours.get_peft_model(
            nn.Sequential(nn.Linear(4, 4)), ours.LoraConfig(target_modules=["0"], layer_replication=[[0, 1]])
        )
