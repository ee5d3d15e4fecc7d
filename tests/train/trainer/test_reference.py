"""TRL's trainers that hold the model against a reference, which shares the base's weights here.

What a trained adapter's reference is: https://github.com/huggingface/trl/pull/1193 and
https://github.com/huggingface/trl/pull/4723; a wrong one that nothing told of: https://github.com/huggingface/trl/issues/5222.
tests/train/trainer/test_without_peft.py runs this file again where PEFT is not installed.
"""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kilotune import LoraConfig, PeftModel, VeraConfig, get_config, get_peft_model
from kilotune.errors import ConfigError, UnsupportedError
from kilotune.train import for_trainer, shard_base, with_reference
from kilotune.train.trainer.reference import reference_of
from tests.support.engine_support import CASES, IDS, adapted, arguments, nf4_llama, weights
from tests.support.models import bits, freed_at_once, randomize, tiny_llama, watch
from tests.support.preferences import NAMES, Written, dense, dpo_loss, first, log_probs, options, rows, trainer

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::FutureWarning:trl")
LOG2 = math.log(2.0)


def goes_on(case: str = "lora", base: Any = None) -> PeftModel:
    """A model whose adapter does something already."""
    model = adapted(case, base=base)
    randomize(model, scale=1.0)
    return model


def storages(*roots: nn.Module) -> dict[int, int]:
    """The bytes of all memory that models hold, by its address, looked for outside of parameters and buffers too."""
    seen: dict[int, Any] = {}
    found: dict[int, int] = {}
    left: list[Any] = list(roots)
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, (type, type(gc))) or callable(getattr(one, "__code__", None)):
            continue
        seen[id(one)] = one
        if type(one) in (Tensor, nn.Parameter) and one.device.type != "meta":
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        if not hasattr(one, "__globals__"):
            left += gc.get_referents(one)
    return found


def added(root: nn.Module, reference: nn.Module) -> int:
    """The bytes that a reference takes beside its model."""
    mine = storages(root)
    return sum(size for place, size in storages(root, reference).items() if place not in mine)


def own_bytes(root: nn.Module, reference: nn.Module) -> int:
    """The bytes of what is trained, and of the options that the reference has as a buffer."""
    trained = sum(p.nbytes for p in root.parameters() if p.requires_grad)
    return trained + int(reference.get_buffer("kilotune_options").nbytes)


# -- values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["start", "base"])
def test_dpo_starts_with_log_2_or_with_what_the_adapter_has_gained_over_the_base(
    reference: str, tmp_path: Path
) -> None:
    model = goes_on()
    policy, base = dense(model, adapters=True), dense(model, adapters=False)
    by_hand = dpo_loss(policy, policy if reference == "start" else base)
    assert (abs(by_hand - LOG2) < 1e-12) is (reference == "start")
    logged = first(trainer("DPO", model, tmp_path, reference))
    assert logged["loss"] == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("case", ["vera", "dvora", "unilora"])
def test_what_an_adapter_has_once_for_all_layers_is_in_the_reference_too(case: str, tmp_path: Path) -> None:
    model = goes_on(case)
    by_hand = dpo_loss(dense(model, adapters=True), dense(model, adapters=False))
    assert abs(by_hand - LOG2) > 1e-3
    assert first(trainer("DPO", goes_on(case), tmp_path, max_steps=1))["loss"] == pytest.approx(LOG2, abs=1e-6)
    assert first(trainer("DPO", model, tmp_path, "base", max_steps=1))["loss"] == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize("new", [True, False], ids=["new", "goes on"])
@pytest.mark.parametrize("name", ["KTO", "GRPO", "RLOO"])
def test_the_others_start_without_a_distance(name: str, new: bool, tmp_path: Path) -> None:
    logged = first(trainer(name, adapted("vera") if new else goes_on("vera"), tmp_path))
    assert logged["kl"] == 0.0
    if name == "KTO":
        assert logged["loss"] == pytest.approx(0.5, abs=1e-6)  # 1 - sigmoid(0), wanted or not


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_the_distance_from_the_base_is_that_of_what_was_written(name: str, tmp_path: Path) -> None:
    model, reward = goes_on(), Written()
    policy, base = dense(model, adapters=True), dense(model, adapters=False)
    logged = first(trainer(name, model, tmp_path, "base", reward, max_steps=1))
    apart = [log_probs(policy, *pair) - log_probs(base, *pair) for pair in reward.pairs]
    each = torch.cat(apart)  # log p / q of each token; GRPO's estimate of the distance is q / p - log q / p - 1
    by_hand = (each if name == "RLOO" else (-each).exp() + each - 1).mean()
    assert abs(by_hand) > 1e-4
    assert logged["kl"] == pytest.approx(float(by_hand), rel=1e-3, abs=1e-6)


def test_kto_tells_the_base_from_the_start(tmp_path: Path) -> None:
    model = goes_on()
    policy, base = dense(model, adapters=True), dense(model, adapters=False)
    run = trainer("KTO", model, tmp_path, "base", loss_type="apo_zero_unpaired")  # a loss without the batch's distance
    losses = []
    for row in rows("KTO"):
        asked, answer = (run.processing_class(row[key]).input_ids for key in ("prompt", "completion"))
        tokens = [*answer, run.processing_class.eos_token_id]
        gained = float(log_probs(policy, asked, tokens).sum() - log_probs(base, asked, tokens).sum())
        held = 1 / (1 + math.exp(-0.1 * gained))
        losses.append(1 - held if row["label"] else held)
    assert abs(sum(losses) / len(losses) - 0.5) > 1e-3
    assert first(run)["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


# -- bases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_merged_base_is_its_own_reference(name: str, tmp_path: Path) -> None:
    """The path in its config is that of the base before merging, which a second base would be loaded from."""
    base = goes_on().merge_and_unload()
    base.config._name_or_path = str(tmp_path / "before")
    logged = first(trainer(name, adapted("lora", base=base), tmp_path))
    assert logged["kl" if name != "DPO" else "loss"] == pytest.approx(LOG2 if name == "DPO" else 0.0, abs=1e-6)


def _int8() -> Any:
    import torchao.quantization as ao

    base = tiny_llama()
    ao.quantize_(base.model, ao.Int8WeightOnlyConfig(version=2))
    return base


def _bnb_int8() -> Any:
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        tiny_llama().save_pretrained(folder)
        scheme = BitsAndBytesConfig(load_in_8bit=True)
        return LlamaForCausalLM.from_pretrained(folder, quantization_config=scheme, device_map={"": "cpu"})


QUANTISED = {"bnb-nf4": nf4_llama, "bnb-int8": _bnb_int8, "torchao-int8": _int8}


@pytest.mark.parametrize("name", ["DPO", "GRPO"])
@pytest.mark.parametrize("scheme", QUANTISED)
def test_a_quantised_base_is_shared_as_it_is(scheme: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao" if scheme.startswith("torchao") else "bitsandbytes")
    model = goes_on("vera", base=QUANTISED[scheme]())
    start = weights(model)
    run = trainer(name, model, tmp_path, max_steps=1, learning_rate=1e-9)
    assert all(torch.equal(value, start[key]) for key, value in weights(model).items())  # TRL rounds to bfloat16
    assert added(run.model, run.ref_model) <= own_bytes(run.model, run.ref_model)
    logged = first(run)
    assert logged["kl" if name != "DPO" else "loss"] == pytest.approx(LOG2 if name == "DPO" else 0.0, abs=1e-6)


# -- what is shared ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["start", "base"])
@pytest.mark.parametrize("case", CASES)
def test_no_weight_of_the_base_is_there_twice(case: str, reference: str) -> None:
    model = goes_on(case)
    root = for_trainer(model)
    made = reference_of(root, reference)
    assert added(root, made) <= own_bytes(root, made)
    frozen = {id(p) for p in root.parameters() if not p.requires_grad}
    assert {id(p) for p in made.parameters()} & {id(p) for p in root.parameters()} <= frozen
    assert not any(p.requires_grad for p in made.parameters())
    assert not any(module.training for module in made.modules())


@pytest.mark.parametrize("scheme", ["dense", "torchao-int8"])
def test_a_model_that_is_moved_takes_its_reference_along(scheme: str) -> None:
    """As a Trainer moves it to its device after it was given the reference; here to another dtype."""
    model = adapted("lora", base=_int8() if scheme == "torchao-int8" else None)
    root = for_trainer(model)
    made = reference_of(root, "base")
    root.to(torch.bfloat16)
    assert {id(p) for p in made.parameters()} <= {id(p) for p in root.parameters()}
    assert made.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("reference", ["start", "base"])
def test_the_reference_stays_while_everything_that_can_be_trained_is(reference: str, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_llama(), config)
    randomize(model)
    norm = model.get_base_model().model.norm.weight.requires_grad_(True)
    before = norm.detach().clone()
    start = model.eval()(input_ids=IDS).logits
    with model.disable_adapter():
        base = model(input_ids=IDS).logits
    run = trainer("DPO", model, tmp_path, reference)
    run.train()
    assert not torch.equal(norm, before)
    assert not torch.allclose(model.eval()(input_ids=IDS).logits, start, atol=1e-3)
    kept = run.accelerator.unwrap_model(run.ref_model)
    assert torch.equal(type(kept).forward(kept, input_ids=IDS).logits, start if reference == "start" else base)


def test_the_active_adapters_of_several_are_the_reference(tmp_path: Path) -> None:
    model = goes_on("lora")
    model.add_adapter("other", VeraConfig(r=4))
    randomize(model, "other")
    model.set_adapter(["default", "other"])
    model.add_adapter("idle", get_config("unilora", r=2, theta_d_length=32))
    randomize(model, "idle")
    root, x = for_trainer(model), IDS
    state = bits(model)
    start, base = reference_of(root, "start"), reference_of(root, "base")
    assert torch.equal(start(input_ids=x).logits, model.eval()(input_ids=x).logits)
    with model.disable_adapter():
        assert torch.equal(base(input_ids=x).logits, model(input_ids=x).logits)
    model.set_adapter("idle")
    assert not torch.equal(start(input_ids=x).logits, model(input_ids=x).logits)
    assert bits(model) == state
    assert list(model.peft_config) == ["default", "other", "idle"]
    assert not any("idle" in name for name, _ in start.named_parameters())
    assert not any("adapters" in name or "shared" in name for name, _ in base.named_parameters())


@torch.no_grad()
def test_a_reference_outlives_its_model_and_is_freed_with_its_last_name() -> None:
    with freed_at_once() as watched:
        model = goes_on("unilora")
        made = reference_of(for_trainer(model), "start")
        watched += [*watch(model), *watch(made)]
        expected = model.eval()(input_ids=IDS).logits
        del model
        assert torch.equal(made(input_ids=IDS).logits, expected)
        del made


# -- options of TRL's ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_log_probs_computed_before_training_are_those_of_the_reference_asked_for(name: str, tmp_path: Path) -> None:
    """One after the other over the same rows and weights: TRL keeps them in a file by a hash of the reference."""
    losses = {}
    for reference in ("start", "base"):
        now = first(trainer(name, goes_on(), tmp_path, reference))["loss"]
        before = first(trainer(name, goes_on(), tmp_path, reference, precompute_ref_log_probs=True))["loss"]
        assert before == pytest.approx(now, abs=1e-6)
        losses[reference] = before
    assert abs(losses["start"] - losses["base"]) > 1e-3


def test_computed_before_training_they_know_the_options_of_the_adapter(tmp_path: Path) -> None:
    """Adapters of equal numbers and other options are other references."""
    losses = []
    for alpha in (2, 64):
        model = get_peft_model(tiny_llama(), LoraConfig(r=2, lora_alpha=alpha))
        randomize(model)
        losses.append(first(trainer("DPO", model, tmp_path, precompute_ref_log_probs=True))["loss"])
    assert losses == pytest.approx([LOG2, LOG2], abs=1e-6)


@pytest.mark.parametrize("name", ["DPO", "GRPO"])
def test_gradient_checkpointing_changes_nothing(name: str, tmp_path: Path) -> None:
    runs = []
    for on in (False, True):
        model = goes_on()
        run = trainer(name, model, tmp_path, gradient_checkpointing=on, max_steps=3)
        run.train()
        runs.append(([entry["loss"] for entry in run.state.log_history if "loss" in entry], weights(model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-4, abs=1e-5)
    for key, value in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][key], value, rtol=1e-3, atol=1e-5)


def test_what_turns_dropout_off_finds_that_of_adapters(tmp_path: Path) -> None:
    """TRL's ``disable_dropout`` is on for DPO."""
    for dropping in (False, True):
        model = get_peft_model(tiny_llama(), LoraConfig(r=2, lora_dropout=0.5))
        randomize(model, scale=1.0)
        logged = first(trainer("DPO", model, tmp_path, max_steps=1, disable_dropout=not dropping))
        assert (abs(logged["loss"] - LOG2) < 1e-6) is not dropping
        assert model.peft_config["default"].dropout == 0.5


def test_a_second_trainer_takes_the_start_that_there_is_then(tmp_path: Path) -> None:
    model = adapted("lora")
    for _ in range(2):
        start = model.eval()(input_ids=IDS).logits
        run = trainer("DPO", model, tmp_path)
        assert first(run)["loss"] == pytest.approx(LOG2, abs=1e-6)
        assert torch.equal(run.ref_model(input_ids=IDS).logits, start)
    assert first(trainer("DPO", model, tmp_path, "base"))["loss"] < LOG2 - 1e-3  # which was learnt twice


def test_a_reference_that_is_given_is_taken(tmp_path: Path) -> None:
    from trl import DPOTrainer

    model, other = adapted("lora"), tiny_llama(seed=3)
    by_hand = dpo_loss(dense(model, adapters=True), tiny_llama(seed=3).double().eval())
    run = with_reference(DPOTrainer)(model=model, ref_model=other, **options("DPO", tmp_path))
    assert run.accelerator.unwrap_model(run.ref_model) is other
    assert first(run)["loss"] == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_without_a_distance_in_the_loss_there_is_no_reference(name: str, tmp_path: Path) -> None:
    run = trainer(name, adapted("lora"), tmp_path, beta=0.0)
    assert run.ref_model is None
    run.train()


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_trainer_in_all_else(name: str, tmp_path: Path) -> None:
    import trl

    model = adapted("vera")
    run = trainer(name, model, tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    assert isinstance(run, getattr(trl, f"{name}Trainer"))
    assert type(run).__name__ == f"{name}Trainer"
    assert run.args.model_init_kwargs is None
    run.train()
    held = {path.name for path in (tmp_path / "checkpoint-1").glob("adapter*")}
    assert held == {"adapter_config.json", "adapter_model.safetensors"}
    assert list(model.peft_config) == ["default"]


# -- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("DPO", {"sync_ref_model": True}, "sync_ref_model: the reference shares the base's weights"),
        ("GRPO", {"sync_ref_model": True}, "sync_ref_model: the reference shares the base's weights"),
        ("GRPO", {"use_vllm": True}, "use_vllm: TRL sends vLLM a model's own weights, without its adapters"),
    ],
)
def test_what_would_go_wrong_with_shared_weights_is_refused(
    name: str, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = adapted("lora")
    state = bits(model)
    with pytest.raises(UnsupportedError, match=message):
        trainer(name, model, tmp_path, **changed)
    assert bits(model) == state


def test_a_head_in_another_dtype_than_the_embeddings_that_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(tie=True), LoraConfig(r=2))
    with pytest.raises(UnsupportedError, match="cast_lm_head_to_fp32: the head is tied to the embeddings"):
        trainer("GRPO", model, tmp_path, cast_lm_head_to_fp32=True)


def test_a_head_in_another_dtype_is_that_of_the_reference_too(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama().bfloat16(), LoraConfig(r=2))
    randomize(model, scale=1.0)
    assert first(trainer("GRPO", model, tmp_path, cast_lm_head_to_fp32=True))["kl"] == 0.0


@pytest.mark.parametrize("name", ["DPO", "GRPO"])
def test_an_adapter_that_is_not_trained_is_refused(name: str, tmp_path: Path) -> None:
    """https://github.com/huggingface/trl/issues/6700"""
    adapted("lora").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with pytest.raises(ConfigError, match="nothing would be trained: .* is_trainable=True"):
        trainer(name, model, tmp_path)


def test_merged_adapters_are_refused(tmp_path: Path) -> None:
    model = goes_on()
    model.merge_adapter()
    with pytest.raises(UnsupportedError, match=r"\['default'\] are merged .* unmerge_adapter\(\) first"):
        trainer("DPO", model, tmp_path)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_sharded_base_is_refused() -> None:
    model = adapted("lora")
    shard_base(model)
    with pytest.raises(UnsupportedError, match="the base is sharded, .* without shard_base"):
        reference_of(for_trainer(model), "start")


def test_what_cannot_be_copied_is_refused() -> None:
    import threading

    model = adapted("lora")
    model.get_base_model().guard = threading.Lock()
    with pytest.raises(UnsupportedError, match="the LlamaForCausalLM holds what cannot be copied: .*lock"):
        reference_of(for_trainer(model), "start")


@pytest.mark.parametrize("reference", ["start", "base"])
def test_a_class_of_ones_own_that_hands_its_arguments_on(reference: str, tmp_path: Path) -> None:
    from trl import DPOTrainer

    class Own(DPOTrainer):  # type: ignore[misc]  # TRL is untyped here
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    model = goes_on()
    base = dense(model, adapters=False)
    policy = dense(model, adapters=True)
    by_hand = dpo_loss(policy, policy if reference == "start" else base)
    run = with_reference(Own, reference)(model=for_trainer(model), **options("DPO", tmp_path))
    assert first(run)["loss"] == pytest.approx(by_hand, abs=1e-6)
    with pytest.raises(ConfigError, match="Own: give its arguments by name, model=... too"):
        with_reference(Own, reference)(for_trainer(model), **options("DPO", tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_a_trainer_whose_adapters_were_taken_out_is_refused(name: str, tmp_path: Path) -> None:
    """It would train the base's own weights, which the reference shares."""
    model = goes_on()
    run = trainer(name, model, tmp_path)
    model.merge_and_unload()
    with pytest.raises(ConfigError, match="adapters were taken out of the model after this trainer was made"):
        run.train()


def test_wrong_arguments_are_refused_in_one_line(tmp_path: Path) -> None:
    from trl import DPOTrainer

    with pytest.raises(ConfigError, match=r"reference: expected one of \['start', 'base'\], got 'bases'"):
        with_reference(DPOTrainer, "bases")
    with pytest.raises(ConfigError, match="expected a trainer of TRL's, such as DPOTrainer, got .*tuple"):
        with_reference(("DPOTrainer",))  # type: ignore[arg-type]
    made = with_reference(DPOTrainer)
    with pytest.raises(ConfigError, match="DPOTrainer is one of with_reference's already"):
        with_reference(made, "base")
    with pytest.raises(ConfigError, match=r"model: expected for_trainer\(model\), got .*LlamaForCausalLM"):
        made(model=tiny_llama(), **options("DPO", tmp_path))
    with pytest.raises(ConfigError, match="peft_config: the adapter is in the model already; leave it out"):
        made(model=adapted("lora"), peft_config=object(), **options("DPO", tmp_path))


# -- TRL's and transformers' trainers as they stand ----------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_trainer_that_loads_a_second_base_is_refused(name: str, tmp_path: Path) -> None:
    import trl
    from transformers import LlamaForCausalLM

    tiny_llama().save_pretrained(tmp_path / "base")
    model = adapted("lora", base=LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    with pytest.raises(UnsupportedError, match=rf"'{name.lower()}'.* a second base .*with_reference\(DPOTrainer\)"):
        getattr(trl, f"{name}Trainer")(model=for_trainer(model), **options(name, tmp_path))


def test_other_tags_are_as_ever() -> None:
    model = adapted("lora")
    root = for_trainer(model)
    root.add_model_tags("mine")
    root.add_model_tags(["trl", "sft"])
    assert root.model_tags == ["mine", "trl", "sft"]
    model.unload()
    assert "add_model_tags" not in root.__dict__


@pytest.mark.parametrize("name", [*NAMES, "SFT", "Reward"])
def test_the_plain_model_in_a_trainer_of_trl_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    import trl

    model = rewarding() if name == "Reward" else adapted("lora")
    with pytest.raises(ConfigError, match=r"a Trainer takes kilotune\.train\.for_trainer\(model\)"):
        getattr(trl, f"{name}Trainer")(model=model, **options(name, tmp_path))


@pytest.mark.parametrize("base", ["dense", "quantised"])
def test_the_plain_model_in_a_trainer_of_transformers_is_refused_in_one_line(base: str, tmp_path: Path) -> None:
    from transformers import Trainer

    model = adapted("vera", base=nf4_llama() if base == "quantised" else None)
    with pytest.raises(ConfigError, match=r"a Trainer takes kilotune\.train\.for_trainer\(model\)"):
        Trainer(model=model, args=arguments(tmp_path), train_dataset=[])


def rewarding() -> PeftModel:
    """A model that gives one number for each row."""
    from transformers import LlamaForSequenceClassification

    config = tiny_llama().config
    config.num_labels = 1
    return get_peft_model(LlamaForSequenceClassification(config), VeraConfig(r=4, task_type="SEQ_CLS"))


def test_the_reward_trainer_saves_the_adapter(tmp_path: Path) -> None:
    from trl import RewardTrainer

    model = rewarding()
    given = options("Reward", tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    RewardTrainer(model=for_trainer(model), **given).train()
    held = {path.name for path in (tmp_path / "checkpoint-1").glob("adapter*")}
    assert held == {"adapter_config.json", "adapter_model.safetensors"}
