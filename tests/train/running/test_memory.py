"""The plan of a training: what a step takes is counted on tensors without numbers, and held to what it then takes."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

import kilotune
from kilotune.train.data.rows import Ragged, Rows
from kilotune.train.running.memory import Estimate, Machine, estimate_memory, machine_of
from kilotune.train.running.memory_ledger import Ledger
from kilotune.train.running.memory_rehearsal import PLAIN, CannotRehearse, Step, count_real, rehearse
from kilotune.train.running.planning import largest_rows, plan_run
from kilotune.train.running.process_memory import forget_peak, peak_bytes, process_bytes
from kilotune.train.running.session import Session, open_session
from kilotune.train.settings.sections import (
    AdapterSettings,
    DataSettings,
    LogSettings,
    ModelSettings,
    TrainingSettings,
    TrainSettings,
)
from tests.support.paths import ROOT
from tests.support.train_support import model_folder, prompts, write_jsonl

CPU = torch.device("cpu")
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 90}
pytestmark = pytest.mark.filterwarnings("ignore:.*profiler.*")


def measured(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """The most bytes that the allocator has handed out at a moment of ``run``, by torch's profiler."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    harness: Any = importlib.import_module("_harness")
    run()  # what is made at the first time only
    return int(harness.live_and_peak(run, CPU)[1])


def model_of(kind: str) -> nn.Module:
    import transformers as t

    torch.manual_seed(0)
    small = {key: value for key, value in SIZE.items() if key != "vocab_size"}
    made: Mapping[str, Callable[[], nn.Module]] = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZE, use_cache=False)),
        "eager": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZE, attn_implementation="eager")),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=90)),
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**SIZE)),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(image_size=16, patch_size=4, **small)),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=90, decoder_start_token_id=0)
        ),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**SIZE, num_local_experts=4, num_key_value_heads=2)),
    }
    return made[kind]().train()


def batch_of(kind: str, rows: int = 4, padded: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind == "vit":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator), "labels": torch.arange(rows) % 2}
    ids = torch.randint(5, 90, (rows, 24), generator=generator)
    mask = torch.ones_like(ids)
    if padded and rows > 1:
        mask[1, 15:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 2 if kind == "bert" else ids}


def adapted(kind: str, method: str) -> nn.Module:
    base = model_of(kind)
    if method == "full":
        return base
    if method == "bitfit":
        return kilotune.get_peft_model(base, kilotune.get_config("bitfit"))
    return kilotune.get_peft_model(base, kilotune.get_config(method, target_modules="all-linear"))


def step_of(model: nn.Module, batch: Mapping[str, Any], step: Step = PLAIN) -> Callable[[], None]:
    """A training step as the Trainer does it, with gradients that go at its end."""
    base: Any = model

    def loss() -> Tensor:  # the other outputs go
        with torch.autocast("cpu", torch.bfloat16, enabled=step.precision == "bfloat16"):
            found: Tensor = model(**batch)["loss"]
        return found

    def run() -> None:
        loss().backward()  # type: ignore[no-untyped-call]
        for parameter in model.parameters():
            parameter.grad = None

    if step.checkpointing:
        base.gradient_checkpointing_enable()
    return run


# -- against what is measured --------------------------------------------------------------------------

CASES = [
    *(("llama", method, PLAIN) for method in ("vera", "lora", "dora", "ia3", "bottleneck", "full")),
    *((kind, "vera", PLAIN) for kind in ("eager", "gpt2", "bert", "vit", "t5")),
    *(("llama", method, Step(checkpointing=True)) for method in ("vera", "full")),
    ("bert", "bitfit", PLAIN),
    ("llama", "vera", Step(precision="bfloat16")),
]


@pytest.mark.heavy
@pytest.mark.parametrize(("kind", "method", "step"), CASES)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_a_step_without_numbers_takes_what_a_step_takes(
    kind: str, method: str, step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = adapted(kind, method), batch_of(kind)
    counted = rehearse(model, batch, step)
    peak = measured(step_of(model, batch, step), monkeypatch)
    # Within 4 %: what operators take and give back within themselves is in the one only.
    assert counted.peak == pytest.approx(peak, rel=0.04), (counted, peak)


def test_a_mask_that_nobody_needs_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers leaves masks of ones out, which only numbers tell it."""
    peaks = {}
    for padded in (False, True):
        model, batch = model_of("llama"), batch_of("llama", padded=padded)
        peaks[padded] = rehearse(model, batch).peak
        assert peaks[padded] == pytest.approx(measured(step_of(model, batch), monkeypatch), rel=0.02)
    assert peaks[True] > peaks[False]


def test_quantised_weights_are_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
            self.second = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.second(self.first(x).relu()).square().mean()}

    net = Net().to("cpu")
    net(torch.ones(1, 64))  # quantises on the way
    model = kilotune.get_peft_model(net, kilotune.LoraConfig(r=4, target_modules="all-linear"))
    batch = {"x": torch.randn(512, 64)}
    peak = measured(step_of(model, batch), monkeypatch)
    assert rehearse(model, batch).peak == pytest.approx(peak, rel=0.05)


def test_a_model_whose_shapes_depend_on_numbers_is_run_in_earnest(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of("mixtral"), batch_of("mixtral", rows=6, padded=False)
    with pytest.raises(CannotRehearse, match="cannot be run without numbers"):
        rehearse(model, batch)
    estimate = estimate_memory(model, batch)
    assert estimate.how.startswith("counted on a step of 2 rows, for the model cannot be run without numbers")
    peak = measured(step_of(model, batch), monkeypatch)
    assert estimate.gradients + estimate.activations == pytest.approx(peak, rel=0.2)


def test_gradients_lie_there_during_the_next_forward() -> None:
    model, batch = model_of("llama"), batch_of("llama")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    once, twice = rehearse(model, batch), rehearse(model, batch, Step(accumulation=4))
    assert twice.gradients == size
    assert 0 < twice.peak - once.peak <= size


# -- by hand -------------------------------------------------------------------------------------------


def test_the_bytes_are_those_of_a_calculation_by_hand() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 100, bias=False), nn.Linear(100, 1, bias=False)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.second(self.first(x).exp()).sum()}

    counted = rehearse(Two(), {"x": torch.zeros(50, 8)})
    hidden = 4 * 50 * 100
    # exp keeps its output, which the second layer keeps too; the first layer's output goes; the loss is there
    assert counted.kept == hidden + 4
    # Backward: beside what is kept, the gradient of exp's output, then of its input, and the second weight's gradient.
    assert counted.peak == pytest.approx(3 * hidden + 4 * 100, abs=600)
    forward = rehearse(Two(), {"x": torch.zeros(50, 8)}, training=False)
    assert forward.peak == pytest.approx(2 * hidden, abs=250)
    assert (forward.gradients, forward.kept) == (0, 0)


def test_the_ledger_counts_each_storage_once_and_until_it_goes() -> None:
    before = torch.zeros(1000)
    ledger = Ledger()
    with ledger:
        ledger.know([before])
        a = before + 1
        view = a[10:].reshape(-1, 10)
        assert ledger.now == 4000
        b = view * 2
        assert ledger.now == 4000 + 3960
        a += 1
        before += 1
        del a
        assert ledger.now == 4000 + 3960, "the view holds it"
        del view
        assert ledger.now == 3960
    del b
    assert ledger.now == 0
    assert ledger.peak(set()) == (7960, 0)
    blocks = Ledger(512)
    with blocks:
        held = torch.zeros(1)
    assert blocks.now == 512
    del held


# -- everything stays as it was ------------------------------------------------------------------------


@pytest.mark.parametrize("count", [rehearse, count_real])
@pytest.mark.parametrize("method", ["vera", "dora"])
def test_model_and_random_numbers_stay_as_they_were(count: Any, method: str) -> None:
    def train(first: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model, batch = adapted("bert", method), batch_of("bert")  # with dropout
        torch.manual_seed(3)
        if first:
            model.eval()
            count(model, batch)
            assert not model.training
            assert all(p.grad is None for p in model.parameters())
            assert type(next(model.parameters())) is nn.Parameter
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            loss = model(**batch)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach(), {name: value.clone() for name, value in model.state_dict().items()}

    (loss, state), (again, after) = train(False), train(True)
    assert torch.equal(loss, again)
    assert all(torch.equal(state[name], after[name]) for name in state)


def test_running_means_and_gradients_stay_as_they_were() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
    batch = {"inputs": torch.randn(5, 3, 8, 8), "labels": torch.tensor([0, 1, 0, 1, 1])}
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net[0].weight.grad = torch.ones_like(net[0].weight)
    for count in (rehearse, count_real):
        assert count(net, batch, Step(loss=nn.functional.cross_entropy)).peak > 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net[0].weight.grad.sum() == net[0].weight.numel()


def test_transformers_is_as_it_was() -> None:
    from transformers import masking_utils

    before = masking_utils.is_tracing
    rehearse(model_of("llama"), batch_of("llama"))
    with pytest.raises(CannotRehearse):
        rehearse(model_of("mixtral"), batch_of("mixtral"))
    assert masking_utils.is_tracing is before


# -- the estimate --------------------------------------------------------------------------------------


def test_weights_optimizer_and_evaluation_are_in_the_estimate() -> None:
    model, batch = adapted("llama", "vera"), batch_of("llama")
    estimate = estimate_memory(model, batch, evaluation=batch_of("llama", rows=400))
    report = kilotune.count_parameters(model)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert estimate.weights == report.total_bytes + buffers == estimate.loaded
    assert estimate.optimizer == 8 * report.trainable
    assert estimate.evaluation == rehearse(model, batch_of("llama", rows=400), training=False).peak
    assert estimate.evaluation > estimate.activations + estimate.gradients, "so many rows, for this test"
    assert estimate.peak == estimate.weights + estimate.optimizer + estimate.evaluation
    assert "; an evaluation " in estimate.line()


def test_what_adamw_keeps_is_what_the_estimate_says() -> None:
    model = model_of("gpt2")
    optimizer = torch.optim.AdamW(model.parameters())
    model(**batch_of("gpt2"))["loss"].backward()
    optimizer.step()
    kept = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    estimate = estimate_memory(model, batch_of("gpt2"))
    assert estimate.optimizer == sum(t.numel() * t.element_size() for t in kept)


def test_several_processes_keep_a_copy_of_their_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    net = nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 200))
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    x, held = torch.randn(2, 200), list[nn.Module]()

    def run(several: bool) -> Callable[[], None]:
        def step() -> None:  # parameters of its own: on those of an earlier one its buckets would be filled too
            own = copy.deepcopy(net)
            # Its copy for the first exchange is let go of in another thread, at a time of its own: so none. And nothing
            # is freed within the next run.
            held.append(nn.parallel.DistributedDataParallel(own, init_sync=False) if several else own)
            held[-1](x).sum().backward()

        return step

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        alone, together = (measured(run(several), monkeypatch) for several in (False, True))
    finally:
        held.clear()
        dist.destroy_process_group()
    assert together - alone == pytest.approx(size, rel=0.02)
    batch = {"inputs": x, "labels": torch.zeros(2, dtype=torch.long)}
    estimates = [
        estimate_memory(net, batch, Step(loss=nn.functional.cross_entropy), processes=count) for count in (1, 2)
    ]
    assert estimates[1].peak - estimates[0].peak == size


def test_it_fits_or_not_by_what_is_still_to_come() -> None:
    estimate = Estimate(weights=100, loaded=100, gradients=10, optimizer=20, activations=50, kept=40, evaluation=0)
    assert estimate.peak == 180
    assert estimate.fits(Machine("CPU", 1000, 80)) is True
    assert estimate.fits(Machine("CPU", 1000, 79)) is False
    assert estimate.fits(Machine("other", 0, 0)) is None
    whole = dataclasses.replace(estimate, process=400)
    assert (whole.peak, whole.tensors) == (580, 180)
    assert "Python and libraries 400 B" in whole.line()
    assert whole.fits(Machine("CPU", 1000, 80)) is True  # the process is there already
    assert whole.fits(Machine("CPU", 1000, 79)) is False


def test_the_plan_and_the_result_count_the_same(session: Session, tmp_path: Path) -> None:
    from kilotune.train.run import fit

    session = dataclasses.replace(session, settings=session.settings.replace(output=str(tmp_path / "out")))
    plan = plan_run(session)
    assert plan.memory is not None
    resident = psutil.Process().memory_info().rss
    assert plan.memory.process == pytest.approx(resident - plan.memory.loaded, rel=0.1)
    assert plan.memory.peak == pytest.approx(fit(session).peak_memory, rel=0.25)


def test_the_peak_of_a_process_begins_anew() -> None:
    forget_peak(CPU)
    before = peak_bytes(CPU)
    size = 200_000_000
    held = torch.zeros(size // 4)
    assert held.sum() == 0
    assert size / 2 < peak_bytes(CPU) - before < 2 * size
    del held
    if sys.platform == "linux":
        forget_peak(CPU)
        assert peak_bytes(CPU) - before < size / 2
    assert process_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    def machine(limit: str, used: str) -> Machine:
        files = [tmp_path / name for name in ("max", "current")]
        for file, text in zip(files, (limit, used)):
            file.write_text(f"{text}\n")
        return machine_of(CPU, [files])

    whole = machine_of(CPU, ())
    assert 0 < whole.free < whole.total
    assert machine("1000000", "400000") == Machine("CPU", 1_000_000, 600_000)
    assert machine("1000000", "2000000").free == 0
    for unlimited in ("max", str(2**62), "nonsense"):
        assert machine(unlimited, "400000").total == whole.total


# -- the largest batch ---------------------------------------------------------------------------------


def test_the_largest_batch_has_the_longest_of_each_and_a_short_row() -> None:
    rows = Rows(
        {
            "input_ids": Ragged([[1] * n for n in (3, 9, 2, 5)], "int64"),
            "labels": Ragged([[1] * n for n in (1, 2, 7, 3)], "int64"),
        }
    )
    plain = [rows[i] for i in range(4)]
    for source in (rows, plain):
        chosen = largest_rows(source, 4)
        assert [(len(row["input_ids"]), len(row["labels"])) for row in chosen] == [(9, 2), (2, 7), (9, 2), (2, 7)]
        assert [len(row["input_ids"]) for row in largest_rows(source, 1)] == [9]
        assert len(largest_rows(source, 100)) == 4
    alike = [{"pixel_values": torch.zeros(3, 4, 4), "labels": i} for i in range(5)]
    assert [row["labels"] for row in largest_rows(alike, 3)] == [0, 1, 2]


# -- the plan ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("plan")
    return open_session(
        TrainSettings(
            model=ModelSettings(base=str(model_folder("llama"))),
            adapter=AdapterSettings(method="vera", options={"r": 8}),
            data=DataSettings(train=str(write_jsonl(folder / "data.jsonl", prompts(50))), validation_fraction=0.2),
            training=TrainingSettings(batch_size=4, accumulation=2, epochs=3, device="cpu"),
            logging=LogSettings(progress="quiet"),
            output=str(folder / "out"),
        )
    )


def test_the_plan_is_what_then_happens(session: Session) -> None:
    from kilotune.train.run import fit

    plan = plan_run(session)
    assert (plan.rows, plan.steps_per_epoch, plan.steps, plan.epochs) == (40, 5, 15, 3.0)
    assert plan.tokens == session.prepared.tokens
    assert plan.parameters.trainable == sum(p.numel() for p in session.model.parameters() if p.requires_grad)
    lengths = [len(session.prepared.train[i]["input_ids"]) for i in range(40)]
    assert plan.batch == (4, max(lengths))
    assert plan.memory is not None
    assert plan.memory.how == "rehearsed"
    assert plan.memory.evaluation > 0
    assert plan.fits is True
    result = fit(session)
    assert result.steps == plan.steps
    assert result.trained == plan.parameters.trainable
    assert result.adapter_bytes == plan.file_bytes


def test_the_plan_is_read_by_people_and_by_programs(session: Session) -> None:
    plan = plan_run(session, ["a smaller batch"])
    first, second, time, third, *notes = plan.lines()
    assert first.startswith(
        f"causal-lm, vera on {session.settings.model.base}: 400 numbers are trained (4.36 % of 9,184)"
    )
    tokens = session.prepared.tokens
    assert second.startswith(f"40 rows to train on, {tokens:,} tokens in all; 15 steps (batches of 4, ")
    assert time.startswith("about ")
    assert "2 batches a step, 5 an epoch), 3 epochs" in second
    assert third.startswith("memory: ")
    for part in ("weights ", "activations ", "gradients ", "optimizer ", "Python and libraries ", "largest batch 4 x "):
        assert part in third
    assert " that are free for it (CPU) (at the peak: " in third
    assert notes[0].startswith("15 steps are too few for most adapters to learn much in: give more epochs or rows")
    assert notes[1:] == list(session.notes)
    assert dataclasses.replace(plan, steps=40).short == ""
    told = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert told["memory"]["peak"] == plan.memory.peak  # type: ignore[union-attr]
    assert told["tokens"] == 3 * session.prepared.tokens
    assert told["fits"] is True
    assert told["too_short"] is True


def test_a_training_that_does_not_fit_is_told_what_needs_less(session: Session) -> None:
    plan = plan_run(session, ["training.batch_size 2", "a smaller model"])
    small = dataclasses.replace(plan, machine=Machine("CPU", 1000, 10))
    assert small.fits is False
    assert small.lines()[4] == (
        "that will not fit. What needs less, first things first: training.batch_size 2; a smaller model"
    )


def test_a_batch_that_the_model_refuses_does_not_stop_the_plan(session: Session) -> None:
    import dataclasses

    def broken(rows: list[Any]) -> dict[str, Tensor]:
        return {"input_ids": torch.full((2, 3), 10_000)}

    plan = plan_run(dataclasses.replace(session, prepared=dataclasses.replace(session.prepared, collate=broken)))
    assert plan.memory is None
    assert plan.fits is None
    assert plan.lines()[2].startswith("memory: not known beforehand: ")


def test_rehearsing_says_nothing(session: Session, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_run(session)
    assert capfd.readouterr() == ("", "")
