"""transformers' own Trainer, no class of ours, with a model of ours: what it saves, resumes, loads and refuses.

tests/train/trainer/test_without_peft.py runs this file again where PEFT is not installed.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kilotune import LoraConfig, PeftModel, VeraConfig, get_config, get_peft_model
from kilotune.errors import CheckpointError, ConfigError
from kilotune.train.trainer.for_trainer import STATE_NAME, for_trainer
from tests.support.engine_support import CASES, IDS, LINES, adapted, arguments, nf4_llama, weights
from tests.support.models import bits, freed_at_once, randomize, tiny_llama, watch
from tests.support.paths import ROOT

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
TRAINERS = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}


def trainer(model: PeftModel, rows: list[dict[str, Tensor]], folder: Path, **changed: Any) -> Any:
    from transformers import Trainer

    given = {key: changed.pop(key) for key in ("eval_dataset", "compute_loss_func") if key in changed}
    return Trainer(model=for_trainer(model), args=arguments(folder, **changed), train_dataset=rows, **given)


# -- nothing to train --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["merged", "disabled", "deleted", "inference"])
def test_nothing_to_train_is_one_line(tmp_path: Path, how: str) -> None:
    """Without it torch says that element 0 of tensors does not require grad."""
    model = adapted("vera")
    run = trainer(model, LINES, tmp_path, max_steps=1)
    if how == "merged":
        model.merge_adapter()
    elif how == "deleted":
        model.delete_adapter("default")
    elif how == "inference":
        model.set_adapter("default", inference_mode=True)
    with (
        model.disable_adapter() if how == "disabled" else contextlib.nullcontext(),
        pytest.raises(ConfigError, match="^nothing would be trained: "),
    ):
        run.train()


# -- saving ------------------------------------------------------------------------------------------


def test_only_the_adapter_is_saved(tmp_path: Path) -> None:
    model = adapted("vera")
    run = trainer(model, LINES, tmp_path / "run", max_steps=2)
    run.train()
    run.save_model(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*ADAPTER, "training_args.bin"}
    assert {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()} == {*ADAPTER, *TRAINERS, STATE_NAME}
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    assert weights(again).keys() == weights(model).keys()
    assert all(torch.equal(value, weights(model)[name]) for name, value in weights(again).items())
    held = load_file(tmp_path / "run" / "checkpoint-2" / STATE_NAME)
    trained = {name for name, p in model.get_base_model().named_parameters() if p.requires_grad}
    assert held.keys() == {*trained, "kilotune.options"}


def test_several_adapters_are_saved_as_peft_does(tmp_path: Path) -> None:
    model = adapted("lora")
    model.add_adapter("other", LoraConfig(r=2))
    trainer(model, LINES, tmp_path, max_steps=2).train()
    assert {path.name for path in (tmp_path / "checkpoint-2" / "other").iterdir()} == ADAPTER


def test_processes_other_than_the_first_write_nothing(tmp_path: Path) -> None:
    root = for_trainer(adapted("lora"))
    root.save_pretrained(tmp_path / "checkpoint-1", is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_an_error_and_leaves_no_half_of_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    (folder / STATE_NAME / "in the way").mkdir(parents=True)
    root = for_trainer(adapted("lora"))
    with pytest.raises(CheckpointError, match=f"cannot write .*{STATE_NAME}"):
        root.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {*ADAPTER, STATE_NAME}


# -- resuming ----------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES)
def test_resumed_training_ends_with_the_same_bits(case: str, tmp_path: Path) -> None:
    rows = CASES[case][2]
    whole = adapted(case)
    start = weights(whole)
    trainer(whole, rows, tmp_path).train()
    resumed = adapted(case, seed=77)
    trainer(resumed, rows, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(not torch.equal(value, start[name]) for name, value in weights(whole).items())
    assert bits(resumed.get_base_model()) == bits(whole.get_base_model())


def test_running_statistics_are_resumed(tmp_path: Path) -> None:
    def model(seed: int) -> PeftModel:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        torch.manual_seed(seed)
        return get_peft_model(net, LoraConfig(r=2, target_modules=["0", "2"]))

    whole, resumed = model(1), model(2)
    trainer(whole, ROWS, tmp_path, **BARE).train()
    trainer(resumed, ROWS, tmp_path, **BARE).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert bits(resumed) == bits(whole)


def test_parameters_unfrozen_by_hand_are_resumed(tmp_path: Path) -> None:
    def model(seed: int) -> PeftModel:
        made = adapted("lora", seed)
        made.get_base_model().model.norm.weight.requires_grad_(True)
        return made

    whole, resumed = model(1), model(2)
    trainer(whole, LINES, tmp_path).train()
    trainer(resumed, LINES, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert bits(resumed) == bits(whole)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VeraConfig(r=4, projection_prng_key=3), r"default: projection_prng_key: the checkpoint has 0, the model 3"),
        (LoraConfig(r=2), r"default: peft_type: the checkpoint has 'VERA', the model 'LORA'"),
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused(config: Any, message: str, tmp_path: Path) -> None:
    base = VeraConfig(r=4)
    trainer(get_peft_model(tiny_llama(), base), LINES, tmp_path, max_steps=2).train()
    other = get_peft_model(tiny_llama(), config)
    before = bits(other)
    with pytest.raises(CheckpointError, match=message):
        trainer(other, LINES, tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    assert bits(other) == before


def test_a_checkpoint_that_does_not_fit_is_refused_with_all_that_is_wrong(tmp_path: Path) -> None:
    trainer(adapted("lora"), LINES, tmp_path, max_steps=2).train()
    path = tmp_path / "checkpoint-2" / STATE_NAME
    held = load_file(path)
    names = sorted(name for name in held if "lora" in name)
    held["strange"] = held.pop(names[0])
    held[names[1]] = held[names[1]].double()
    held[names[2]] = held[names[2]][:1]
    save_file(held, path)
    model = adapted("lora")
    before = bits(model)
    with pytest.raises(CheckpointError) as caught:
        trainer(model, LINES, tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    text = str(caught.value)
    assert f"missing: {names[0]}" in text
    assert "unexpected: strange" in text
    assert f"{names[1]}: expected" in text
    assert "torch.float64" in text
    assert f"{names[2]}: expected" in text
    assert bits(model) == before


def test_another_active_adapter_is_refused(tmp_path: Path) -> None:
    trainer(adapted("lora"), LINES, tmp_path, max_steps=2).train()
    model = adapted("lora")
    model.add_adapter("other", LoraConfig(r=2))
    model.set_adapter("other")
    with pytest.raises(CheckpointError, match=r"adapters \['default'\], the model's are \['other'\]; set_adapter"):
        trainer(model, LINES, tmp_path, max_steps=2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("case", ["lora", "unilora", "head"])
def test_the_best_checkpoint_is_loaded_at_the_end(case: str, tmp_path: Path) -> None:
    rows = CASES[case][2]
    model = adapted(case)
    run = trainer(
        model,
        rows,
        tmp_path,
        eval_dataset=rows,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the first one is the best
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert best.name == f"checkpoint-{2 * (1 + losses.index(max(losses)))}" != "checkpoint-6"
    held = load_file(best / STATE_NAME)
    now = dict(model.get_base_model().named_parameters())
    assert all(torch.equal(now[name], value) for name, value in held.items() if name in now)
    assert run.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-6)


# -- what a Trainer asks of a model --------------------------------------------------------------------


def test_columns_labels_and_losses_are_those_of_the_base(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import Trainer

    rows = Dataset.from_dict(
        {"input_ids": IDS.tolist(), "labels": IDS.tolist(), "text": ["a"] * len(IDS), "score": [0.5] * len(IDS)}
    )
    given = {"args": arguments(tmp_path), "train_dataset": rows}
    plain, ours = Trainer(model=tiny_llama(), **given), Trainer(model=for_trainer(adapted("lora")), **given)
    kept = [run._remove_unused_columns(rows).column_names for run in (plain, ours)]
    assert kept[0] == kept[1] == ["input_ids", "labels"]
    for name in ("label_names", "can_return_loss", "model_accepts_loss_kwargs", "_loss_shifts_labels"):
        assert getattr(ours, name) == getattr(plain, name)
    assert plain.label_names == ["labels"]
    ours.train()


def test_a_quantised_base_is_trained(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = adapted("vera", base=nf4_llama())
    codes = {name: value for name, value in bits(model).items() if "base_layer" in name}
    start = weights(model)
    trainer(model, LINES, tmp_path).train()
    assert codes == {name: value for name, value in bits(model).items() if "base_layer" in name}
    assert all(not torch.equal(value, start[name]) for name, value in weights(model).items())
    resumed = adapted("vera", base=nf4_llama())
    trainer(resumed, LINES, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(value, weights(model)[name]) for name, value in weights(resumed).items())
    for path in (tmp_path / "checkpoint-6").glob("*.safetensors"):
        assert not any("base_layer" in name or "embed" in name for name in load_file(path))


def test_the_trainer_refuses_a_quantised_base_without_the_answers(tmp_path: Path) -> None:
    """What :func:`for_trainer` is for: if this passes one day, the answer is no longer needed."""
    pytest.importorskip("bitsandbytes")
    from transformers import Trainer

    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=adapted("vera", base=nf4_llama()).model, args=arguments(tmp_path), train_dataset=LINES)


def test_gradient_checkpointing_reaches_the_adapter_through_frozen_embeddings(tmp_path: Path) -> None:
    plain, saving = adapted("lora"), adapted("lora")
    trainer(plain, LINES, tmp_path / "a", max_steps=2).train()
    trainer(
        saving,
        LINES,
        tmp_path / "b",
        max_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    ).train()
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(saving)[name], value, rtol=1e-4, atol=1e-6)


def test_rounding_to_bfloat16_by_others_is_undone_in_training() -> None:
    model = adapted("vera")
    root = for_trainer(model)
    for _, parameter in model.adapter_parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    root.eval()(input_ids=IDS)
    assert {p.dtype for _, p in model.adapter_parameters()} == {torch.bfloat16}
    root.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert {p.dtype for _, p in model.adapter_parameters()} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for _, p in model.adapter_parameters())


# -- modules that are not of transformers ----------------------------------------------------------------

ROWS = [{"input": row, "labels": row.sum().round().long() % 3} for row in torch.rand(16, 6)]


def loss(outputs: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return nn.functional.cross_entropy(outputs, labels)


BARE: dict[str, Any] = {"compute_loss_func": loss, "label_names": ["labels"]}  # for a module that returns no loss


def test_any_module_is_trained_saved_and_resumed(tmp_path: Path) -> None:
    def model(seed: int) -> PeftModel:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        torch.manual_seed(seed)
        return get_peft_model(net, get_config("unilora", r=2, theta_d_length=32, target_modules=["0", "2"]))

    whole, resumed = model(1), model(2)
    run = trainer(whole, ROWS, tmp_path, **BARE)
    run.train()
    run.save_model(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*ADAPTER, "training_args.bin"}
    trainer(resumed, ROWS, tmp_path, **BARE).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert bits(resumed) == bits(whole)
    x = torch.rand(2, 6)
    assert torch.equal(resumed(x), whole(x))


def test_columns_of_any_module_are_its_arguments(tmp_path: Path) -> None:
    from datasets import Dataset

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, points: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            y = self.layer(points)
            return {"logits": y} if labels is None else {"loss": nn.functional.cross_entropy(y, labels), "logits": y}

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["layer"]))
    rows = Dataset.from_dict(
        {"points": torch.rand(16, 6).tolist(), "labels": [i % 3 for i in range(16)], "name": ["a"] * 16}
    )
    start = weights(model)
    run = trainer(model, rows, tmp_path, max_steps=2)  # type: ignore[arg-type]
    assert run._remove_unused_columns(rows).column_names == ["points", "labels"]
    assert run.label_names == ["labels"]
    run.train()
    assert any(not torch.equal(value, start[name]) for name, value in weights(model).items())
    assert "eval_loss" in run.evaluate(rows)


# -- taking it back --------------------------------------------------------------------------------------


def test_handing_over_twice_is_handing_over_once() -> None:
    model = adapted("unilora")
    root = for_trainer(model)
    names, hooks = [name for name, _ in root.named_parameters()], len(root._forward_pre_hooks)
    assert for_trainer(model) is root is model.get_base_model()
    assert [name for name, _ in root.named_parameters()] == names
    assert len(root._forward_pre_hooks) == hooks


@pytest.mark.parametrize("end", ["unload", "merge_and_unload"])
def test_the_base_is_as_it_was_after_unloading(end: str, tmp_path: Path) -> None:
    base = tiny_llama()
    before, state = set(base.__dict__), bits(base)
    hooks = dict(base._forward_pre_hooks)
    model = get_peft_model(base, get_config("unilora", r=2, theta_d_length=32))
    randomize(model)
    for_trainer(model)
    assert "kilotune_shared.default.unilora_theta_d" in dict(base.named_parameters())
    plain = getattr(model, end)()
    assert plain is base
    assert set(base.__dict__) == before
    assert dict(base._forward_pre_hooks) == hooks
    assert (bits(base) == state) is (end == "unload")
    plain.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").is_file()
    assert load_file(tmp_path / "model.safetensors").keys() == load_of(tiny_llama(), tmp_path / "plain").keys()
    loaded = dict(base.load_state_dict(tiny_llama().state_dict())._asdict())
    assert loaded == {"missing_keys": [], "unexpected_keys": []}


def load_of(model: Any, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_other_state_dicts_are_loaded_as_ever() -> None:
    model = adapted("lora")
    root = for_trainer(model)
    state = {name: value + 1 for name, value in root.state_dict().items()}
    assert root.load_state_dict(state).missing_keys == []
    assert all(torch.equal(value, state[name]) for name, value in root.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        root.load_state_dict({})


def test_adapters_come_and_go_while_handed_over(tmp_path: Path) -> None:
    model = adapted("lora")
    root = for_trainer(model)
    model.add_adapter("uni", get_config("unilora", r=2, theta_d_length=32))
    model.set_adapter("uni")
    trained = [name for name, p in root.named_parameters() if p.requires_grad]
    assert trained == ["kilotune_shared.uni.unilora_theta_d"]
    trainer(model, LINES, tmp_path, max_steps=2).train()
    model.delete_adapter("uni")
    assert not any("uni" in name for name, _ in root.named_parameters())
    assert not any("kilotune_shared" in name for name in model.adapted_layers())


def test_what_is_not_ours_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"for_trainer: expected the model of get_peft_model\(\), got .*LlamaFor"):
        for_trainer(tiny_llama())


@pytest.mark.parametrize("kept", ["model", "root", "both"])
def test_a_handed_over_model_is_freed_with_its_last_name(kept: str) -> None:
    with freed_at_once() as watched:
        model = adapted("unilora")
        root = for_trainer(model)
        watched += watch(root)
        if kept == "root":
            del model  # the root goes on without it
        elif kept == "model":
            del root
        run = model if kept == "model" else root
        run(input_ids=IDS, labels=IDS).loss.backward()
        with tempfile.TemporaryDirectory() as folder:
            run.save_pretrained(folder)
            assert {path.name for path in Path(folder).iterdir()} == ADAPTER
        model = root = run = None


def test_any_module_that_is_handed_over_is_freed_with_its_last_name() -> None:
    with freed_at_once() as watched:
        model = get_peft_model(nn.Sequential(nn.Linear(6, 3)), LoraConfig(r=2, target_modules=["0"]))
        root = for_trainer(model)
        watched += watch(root)
        root(torch.rand(2, 6)).sum().backward()
        del model, root


def test_a_copy_of_a_handed_over_model_answers_for_itself(tmp_path: Path) -> None:
    root = for_trainer(adapted("vera"))
    twin = copy.deepcopy(root)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0 if parameter.requires_grad else 0.0)
    root.save_pretrained(tmp_path / "root")
    twin.save_pretrained(tmp_path / "twin")
    held = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("root", "twin")]
    assert held[0].keys() == held[1].keys()
    assert not any(torch.equal(held[0][key], held[1][key]) for key in held[0])


def test_the_options_in_a_checkpoint_are_json_beside_the_tensors(tmp_path: Path) -> None:
    root = for_trainer(adapted("vera"))
    root.save_pretrained(tmp_path / "checkpoint-1")
    held = bytes(load_file(tmp_path / "checkpoint-1" / STATE_NAME)["kilotune.options"].tolist())
    assert json.loads(held)["default"]["r"] == 4


def test_the_page_s_example_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    assert "for_trainer(model)" in code
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"base": tiny_llama(), "rows": LINES}
    exec(code.replace("save_steps=100", "use_cpu=True, report_to='none', disable_tqdm=True"), names)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {*ADAPTER, "training_args.bin"}
    moved = [(value - 0.1).abs().max() for name, value in weights(names["model"]).items() if name.endswith("_d")]
    assert max(moved) > 1e-4
