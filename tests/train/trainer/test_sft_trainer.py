"""TRL's own SFTTrainer with a model of ours: saving, resuming, NF4, and what it would pass over.

tests/train/trainer/test_without_peft.py runs this file again where PEFT is not installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kilotune import LoraConfig, PeftModel, get_config, get_peft_model
from kilotune.errors import UnsupportedError
from kilotune.train.trainer.for_trainer import STATE_NAME, for_trainer
from tests.support.engine_support import adapted, arguments, letters, nf4_llama, weights
from tests.support.models import bits, tiny_llama

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::FutureWarning:trl")

CHAT = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def rows() -> Any:
    from datasets import Dataset

    asked, answers = ["abc def", "hello you", "what is", "go"], ["ghi", "me too", "it is", "on and on"]
    return Dataset.from_dict({"prompt": asked * 4, "completion": answers * 4})


def trainer(model: PeftModel, folder: Path, data: Any = None, **changed: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    given = {"max_steps": 4, "bf16": False, "max_length": 32, **changed}
    return SFTTrainer(
        model=for_trainer(model),
        args=arguments(folder, SFTConfig, **given),
        train_dataset=rows() if data is None else data,
        eval_dataset=rows() if given.get("eval_strategy") else None,
        processing_class=letters(),
    )


@pytest.mark.heavy
@pytest.mark.parametrize("case", ["lora", "unilora"])
def test_only_the_adapter_is_saved_and_training_resumes_with_the_same_bits(case: str, tmp_path: Path) -> None:
    whole, resumed = adapted(case), adapted(case, seed=77)
    start = weights(whole)
    run = trainer(whole, tmp_path)
    run.train()
    run.save_model(tmp_path / "out")
    assert all(not torch.equal(value, start[name]) for name, value in weights(whole).items())
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == {"adapter_model.safetensors"}
    held = load_file(tmp_path / "checkpoint-2" / STATE_NAME)
    trained = {name for name, p in whole.get_base_model().named_parameters() if p.requires_grad}
    assert held.keys() == {*trained, "kilotune.options"}
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert bits(resumed) == bits(whole)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(again).items())


def test_it_trains_what_the_model_itself_would() -> None:
    """Its fused head gives the loss of the model's own forward, adapter included."""
    model = adapted("lora")
    trainer(model, Path("unused"), save_strategy="no")
    root = model.get_base_model().eval()
    for _, parameter in model.adapter_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(4, 32, (3, 8))
    fused = root(input_ids=ids, labels=ids, fused_lm_head=True).loss
    own = root(input_ids=ids, labels=ids).loss
    with model.disable_adapter():
        assert not torch.isclose(root(input_ids=ids, labels=ids).loss, own)
    torch.testing.assert_close(fused, own)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = adapted("lora")
    run = trainer(
        model,
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the first one is the best
    )
    run.train()
    assert Path(run.state.best_model_checkpoint).name == "checkpoint-2"
    held = load_file(tmp_path / "checkpoint-2" / STATE_NAME)
    now = dict(model.get_base_model().named_parameters())
    assert all(torch.equal(now[name], value) for name, value in held.items() if name in now)


def test_chats_packed_and_the_loss_on_the_answer(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    turns = [[{"role": "user", "content": "abc"}, {"role": "assistant", "content": "def"}]] * 8
    tokenizer = letters()
    tokenizer.chat_template = CHAT
    model = adapted("vera")
    start = weights(model)
    run = SFTTrainer(
        model=for_trainer(model),
        args=arguments(
            tmp_path, SFTConfig, max_steps=2, bf16=False, max_length=16, packing=True, packing_strategy="wrapped"
        ),
        train_dataset=Dataset.from_dict({"messages": turns}),
        processing_class=tokenizer,
    )
    run.train()
    assert all(not torch.equal(value, start[name]) for name, value in weights(model).items())


def test_a_quantised_base_is_trained_and_its_vectors_stay_float32(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = adapted("vera", base=nf4_llama())
    start = weights(model)
    run = trainer(model, tmp_path)
    assert {p.dtype for _, p in model.adapter_parameters()} == {torch.bfloat16}, "TRL leaves them alone now"
    run.train()
    assert {value.dtype for value in weights(model).values()} == {torch.float32}
    assert all(not torch.equal(value, start[name]) for name, value in weights(model).items())
    held = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert {value.dtype for value in held.values()} == {torch.float32}
    resumed = adapted("vera", base=nf4_llama())
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert bits(resumed) == bits(model)


def test_an_adapter_on_the_head_which_trl_would_pass_over_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(UnsupportedError, match="TRL's trainers multiply .* leave it out of target_modules"):
        trainer(model, tmp_path).train()


def test_a_head_that_is_saved_whole_is_trained(tmp_path: Path) -> None:
    config = get_config("lora", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_llama(), config)
    head = model.lm_head.current().weight
    before = head.detach().clone()
    trainer(model, tmp_path).train()
    assert not torch.equal(head, before)
