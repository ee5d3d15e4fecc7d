"""The benchmarks: each runs at a tiny size and writes its table; what they measure with is held to known amounts."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, final

import pytest
import torch
from torch import Tensor, nn

from tests.support.paths import ROOT

MIB = 2**20
CPU = torch.device("cpu")

# PEFT asks transformers for an attribute that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of benchmarks/ as a module, found as it finds its neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("_harness", monkeypatch)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("_models", monkeypatch)


# -- smoke: each script, tiny ---------------------------------------------------------------------------

TINY = ["--hidden", "64", "--layers", "1", "--vocabulary", "50", "--rounds", "2"]
RUNS = {
    "training llama": ("training", [*TINY, "--tokens", "32", "--sequence", "16", "--ranks", "4", "--ways"]),
    "training bert": ("training", [*TINY, "--model", "bert", "--tokens", "16", "--ranks", "4", "--lora-ranks", "2"]),
    "training bfloat16": (
        "training",
        [*TINY, "--tokens", "16", "--ranks", "4", "--only", "kilotune*,peft VeRA*", "--dtype", "bfloat16"],
    ),
    "inference": ("inference", [*TINY, "--tokens", "1,8", "--ranks", "4", "--lora-ranks", "2", "--least", "0.001"]),
    "adapters": (
        "adapters",
        ["--layers", "1", "--rank", "4", "--adapters", "4", "--peft-adapters", "2", "--rounds", "2"],
    ),
    "routing": (
        "routing",
        [*TINY, "--rows", "3", "--length", "4", "--rank", "4", "--resident", "6"]
        + ["--put-hidden", "64", "--put-layers", "1"],
    ),
    "train_memory": (  # that the estimates hold is part of its exit code
        "train_memory",
        ["--hidden", "64", "--layers", "1", "--tokens", "16", "--steps", "2"]
        + ["--cases", "llama vera r 64, batch 8, c*;bert full*"],
    ),
}


@pytest.mark.heavy
@pytest.mark.parametrize("run", RUNS)
def test_each_runs_and_writes(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, words = RUNS[run]
    assert load(name, monkeypatch).main([*words, "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "\n|" in told
    assert "nan" not in told
    (data,) = tmp_path.glob("*.json")
    (plot,) = tmp_path.glob("*.png")
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = json.loads(data.read_text())
    assert set(found["machine"]) == {"cpu", "cores", "threads", "gpu", "python", "versions", "date"}
    assert found["results"]
    if name == "training":
        (case,) = found["results"]
        assert {len(seconds) for seconds in case["times"]["seconds"].values()} == {2}
        floor = case["measured"]["floor"]
        for measured in case["measured"].values():
            assert measured["peak"] >= measured["live"] >= measured["kept"] > 0, measured
            assert measured["flops"] > 0
        assert floor["trained"] == 0


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:Specified to not save vera_A and vera_B:UserWarning")
def test_learning_beside_answers_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "toy", "--seconds", "1", "--rounds", "1", "--streams", "2", "--tokens", "4", "--shares", "0.5"]
    benchmark = load("learning", monkeypatch)
    assert benchmark.main([*words, "--jobs", "2", "--rank", "4", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "| share 0.5" in told
    assert "time of a job over PEFT's" in told
    (data,) = tmp_path.glob("*.json")
    assert json.loads(data.read_text())["results"]["beside"]["share 0.5"][0][0] > 0
    with pytest.raises(SystemExit):
        benchmark.main(["--model", "toy", "--only", "corrections"])


def test_the_bars_are_told_and_a_failing_one_is_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = load("adapters", monkeypatch)
    words = ["--layers", "1", "--rank", "4", "--adapters", "3", "--peft-adapters", "1", "--rounds", "1", "--bars"]
    monkeypatch.setattr(adapters, "LIMIT", 1e9)
    assert adapters.main([*words, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("PASS") == 2
    monkeypatch.setattr(adapters, "LIMIT", 1e-9)
    assert adapters.main([*words, "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("FAIL") == 2


def planned(training: ModuleType, seconds: dict[str, float], kept: dict[str, int], flops: dict[str, int]) -> Any:
    """A case of three rounds in which everything took what the test says; 1 where it says nothing."""
    variants = training.variants_of(training.options(["--bars"]))
    case = training.Case(training.Shape("llama", 768, 3), 2048, 512)
    for variant in variants:
        amounts = (flops.get(variant.name, 100), kept.get(variant.name, 100))
        case.measured[variant.name] = training.Measured(variant, 1, *amounts, 100, 100)
        case.times.seconds[variant.name] = [seconds.get(variant.name, 1.0)] * 3
    return case


def test_the_bars_of_training_are_those_of_the_issue(monkeypatch: pytest.MonkeyPatch) -> None:
    training = load("training", monkeypatch)
    small, large = "kilotune VeRA 256", "kilotune VeRA 1024"
    fast = {small: 0.91, large: 0.79, "full": 0.9, "peft LoRA 8": 0.95}
    lean = {small: 61, large: 61, "floor": 56}
    assert [bar.verdict for bar in training.bars_of(planned(training, fast, lean, {}))] == ["PASS"] * 8

    def fails(seconds: dict[str, float], kept: dict[str, int], flops: dict[str, int] | None = None) -> set[str]:
        bars = training.bars_of(planned(training, {**fast, **seconds}, {**lean, **kept}, flops or {}))
        return {bar.what.split(": ")[1] for bar in bars if bar.verdict == "FAIL"}

    assert fails({small: 0.93}, {}) == {"r 256, step over PEFT VeRA's", "r 256, step over PEFT LoRA r 8's"}
    assert fails({large: 0.81}, {}) == {"r 1024, step over PEFT VeRA's"}
    assert fails({"full": 0.7}, {}) == {"r 256, step over full fine-tuning's", "r 1024, step over full fine-tuning's"}
    assert fails({"full": 0.7}, {}, {small: 111, large: 109}) == {"r 1024, step over full fine-tuning's"}
    assert fails({}, {small: 63, "floor": 60}) == {"r 256, kept over PEFT VeRA's"}
    assert fails({}, {large: 63}) == {"r 1024, kept over PEFT VeRA's"}
    assert fails({}, {"floor": 55}) == {"r 256, kept over the floor's"}


def test_a_bar_that_was_not_measured_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    training = load("training", monkeypatch)
    case = planned(training, {}, {}, {})
    for taken in case.times.seconds.values():
        taken.clear()
    del case.measured["peft VeRA 256"]
    bars = training.bars_of(case)
    assert {bar.verdict for bar in bars if "step" in bar.what} == {"not measured"}
    harness = load("_harness", monkeypatch)
    assert harness.judge([harness.Bar("there", 1.0, 1.0)]) == 0
    assert harness.judge([harness.Bar("there", 1.0, 1.0), harness.Bar("missing", None, 1.0)]) == 1


@pytest.mark.parametrize("name", ["training", "inference"])
def test_what_was_measured_before_ctrl_c_is_printed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, harness = load(name, monkeypatch), load("_harness", monkeypatch)
    real, runs = harness.seconds_of, 0

    def interrupted(run: Callable[[], object], device: torch.device) -> float:
        nonlocal runs
        runs += 1
        if runs == 12:  # five variants, and one time before the rounds: in the second or the third round
            raise KeyboardInterrupt
        return float(real(run, device))

    monkeypatch.setattr(harness, "seconds_of", interrupted)
    words = [*TINY, "--rounds", "9", "--tokens", "8", "--ranks", "4"]
    words += ["--only", "peft*4,kil*LoRA 8"] if name == "training" else ["--lora-ranks", "2", "--least", "1e-9"]
    assert script.main([*words, "--out", str(tmp_path)]) == 130
    told = capsys.readouterr()
    assert "interrupted" in told.err
    assert "\n|" in told.out
    (data,) = tmp_path.glob("*.json")
    (case,) = json.loads(data.read_text())["results"]
    assert len({len(seconds) for seconds in case["times"]["seconds"].values()}) == 1, "rounds are whole or not there"
    assert case["times"]["seconds"]


# -- what they measure with -----------------------------------------------------------------------------


def test_turns_rotate_and_ratios_are_of_one_round(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    slow = iter([1.0, 2.0, 3.0, 10.0, 30.0, 20.0, 600.0, 200.0, 400.0])  # a machine that slows down

    def fake(run: Callable[[], object], device: torch.device) -> float:
        run()
        return next(slow)

    monkeypatch.setattr(harness, "seconds_of", fake)
    rounds = harness.Rounds()
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    harness.take_turns(runs, 3, CPU, rounds, harness.Progress(), "test")
    assert "".join(order) == "abc" + "bca" + "cab"
    assert rounds.seconds == {"a": [1.0, 20.0, 200.0], "b": [2.0, 10.0, 400.0], "c": [3.0, 30.0, 600.0]}
    assert rounds.ratio("c", "b").median == 1.5  # the medians' own ratio would be 3
    assert rounds.ratio("c", "a").median == 3.0
    assert rounds.ratio("a", "nobody") is None
    assert harness.Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == harness.Spread(3.0, 2.0, 4.0)


@pytest.mark.filterwarnings("ignore:.*profiler.*")
def test_live_and_peak_count_what_is_handed_out(harness: ModuleType) -> None:
    x = torch.zeros(MIB // 4)  # 1 MiB

    def run() -> Tensor:
        y = x + 1  # 1 MiB
        z = torch.cat([y, y])  # 3
        del y  # 2
        return z[:8] + z.sum()  # a few bytes; z goes

    live, peak = harness.live_and_peak(run, CPU)
    assert live == pytest.approx(32, abs=256)
    assert peak == pytest.approx(3 * MIB, abs=1024)


def test_kept_counts_each_storage_once_and_leaves_the_model_out(harness: ModuleType) -> None:
    weight = torch.ones(4, 1024, requires_grad=True)  # 16 KiB
    x = torch.randn(256, 1024, requires_grad=True)  # 1 MiB

    def forward() -> Tensor:
        y = x.exp()  # keeps y, 1 MiB
        return (y @ weight.T).sum() + y.T.exp().sum()  # keeps y again, the weight, and exp(y.T), 1 MiB

    assert harness.kept_bytes(forward, []) == 2 * MIB + 16 * 1024
    assert harness.kept_bytes(forward, [weight]) == 2 * MIB
    with torch.no_grad():
        dropped = torch.randn(256, 1024)
    assert harness.kept_bytes(lambda: (dropped * 2).sum() + x.sum(), []) == 0

    def forgets() -> Tensor:
        x.exp().sum()  # a graph that is gone when the forward ends
        return x.sum()

    assert harness.kept_bytes(forgets, []) == 0


@final
class _Hides(torch.autograd.Function):
    """Keeps its input behind autograd's back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.hidden = x.clone()
        return x.sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.hidden


def test_live_sees_what_autograd_is_not_told_of(harness: ModuleType) -> None:
    x = torch.randn(MIB // 4, requires_grad=True)

    def hide() -> Tensor:
        loss: Tensor = _Hides.apply(x)  # type: ignore[no-untyped-call]
        return loss

    assert harness.kept_bytes(hide, []) == 0
    assert harness.live_and_peak(hide, CPU)[0] == pytest.approx(MIB, abs=256)


def test_flops_are_those_of_the_formula(harness: ModuleType) -> None:
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(32, 16, requires_grad=True)
    flops, result = harness.flops_of(lambda: nn.functional.linear(x, weight).sum().backward() or "result")
    assert (flops, result) == (3 * 2 * 8 * 16 * 32, "result")
    q = torch.randn(2, 3, 8, 16, requires_grad=True)  # batch, heads, tokens, features
    pairs = 2 * 3 * 8 * 8 * 16
    forward, _ = harness.flops_of(lambda: nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
    both, _ = harness.flops_of(lambda: nn.functional.scaled_dot_product_attention(q, q, q).sum().backward())
    assert (forward, both) == (2 * 2 * pairs, (2 + 5) * 2 * pairs)


# -- what they measure ----------------------------------------------------------------------------------


def small(models: ModuleType, kind: str = "llama") -> tuple[Any, Any, dict[str, Tensor]]:
    shape = models.Shape(kind, 64, 1, 50)
    return shape, models.build(shape, 16, CPU, torch.float32), models.sample(shape, 32, 16, CPU)


def test_twins_read_the_same_memory_and_keep_their_own_gradients(models: ModuleType) -> None:
    shape, base, batch = small(models)
    full = models.dress(base, models.Variant("none", "full"), shape)
    again = models.dress(base, models.Variant("kilotune", "vera", 4), shape)
    pointers = {p.data_ptr() for p in base.parameters()}
    assert {p.data_ptr() for p in full.parameters()} == pointers
    assert pointers <= {p.data_ptr() for p in again.parameters()}
    models.loss_of(full, batch).backward()
    assert all(p.grad is None and not p.requires_grad for p in base.parameters())
    own = models.dress(base, models.Variant("peft", "lora", 4), shape, share=False)
    assert not pointers & {p.data_ptr() for p in own.parameters()}


def test_the_floor_trains_nothing_and_runs_back_through_every_layer(models: ModuleType) -> None:
    shape, base, batch = small(models)
    floor = models.dress(base, models.Variant("none", "floor"), shape)
    assert models.trained(floor) == []
    asked: list[Tensor] = []
    floor.get_input_embeddings().register_forward_hook(lambda _module, _args, output: asked.append(output))
    models.loss_of(floor, batch).backward()
    assert asked[0].grad is not None
    assert asked[0].grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_peft_and_kilotune_adapt_the_same(models: ModuleType, kind: str) -> None:
    shape, base, batch = small(models, kind)
    layers, plain = models.linear_layers(base, shape), models.logits_of(base, batch)
    counts = {}
    for library in ("peft", "kilotune"):
        for method in ("vera", "lora"):
            variant = models.Variant(library, method, 4)
            counts[library, method] = models.check(models.dress(base, variant, shape), variant, layers, batch, plain)
    assert counts["peft", "vera"] == counts["kilotune", "vera"]
    assert counts["peft", "lora"] == counts["kilotune", "lora"]


def test_a_variant_that_is_not_what_it_says_is_refused(models: ModuleType) -> None:
    shape, base, batch = small(models)
    layers, plain = models.linear_layers(base, shape), models.logits_of(base, batch)
    variant = models.Variant("kilotune", "vera", 4)

    def check(model: Any) -> None:
        models.check(model, variant, layers, batch, plain)

    check(models.dress(base, variant, shape))
    with pytest.raises(AssertionError, match="trains 760 numbers, expected 732"):
        check(models.dress(base, models.Variant("kilotune", "vera", 8), shape))
    idle = models.dress(base, variant, shape)
    for name, parameter in idle.named_parameters():
        if "lambda_b" in name:
            parameter.data.zero_()
    with pytest.raises(AssertionError, match="the output is the base model's"):
        check(idle)
    without = {name: layer for name, layer in layers.items() if not name.endswith("o_proj")}
    without["other"] = nn.Linear(64, 64)  # as many numbers
    with pytest.raises(AssertionError, match=r"against the rule: \['model.layers.0.self_attn.o_proj', 'other'\]"):
        models.check(models.dress(base, variant, shape), variant, without, batch, plain)


def test_a_forced_way_is_forced(models: ModuleType) -> None:
    """Each way gives the gradients of the others, by other products."""
    shape, base, batch = small(models)
    harness_flops = importlib.import_module("_harness").flops_of
    gradients, flops = {}, {}
    for way in ("picked", *models.WAYS):
        model = models.dress(base, models.Variant("kilotune", "vera", 48, way), shape)
        flops[way], _ = harness_flops(lambda model=model: models.loss_of(model, batch).backward())
        gradients[way] = torch.cat([p.grad.double() for p in models.trained(model)])
    for way in models.WAYS:
        assert torch.allclose(gradients[way], gradients["picked"], rtol=1e-3, atol=1e-6), way
    assert len({flops[way] for way in models.WAYS}) == 3, flops


# -- the command ----------------------------------------------------------------------------------------


def test_make_bench_runs_every_script(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["make", "--no-print-directory", "-n", "bench", "ARGS="]  # `make test ARGS=...` hands its own down
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1].strip() == ".venv/bin/python benchmarks/_all.py", done.stderr
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py")}
    runs = load("_all", monkeypatch).RUNS
    assert {run.words[0] for run in runs} == scripts
    for run in runs:
        if run.words[0] in ("training", "inference", "adapters", "routing"):
            load(run.words[0], monkeypatch).options(run.words[1:])


def test_bench_runs_all_and_fails_when_one_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = load("_all", monkeypatch)
    codes = {"training": 1, "inference": 0}
    ran: list[str] = []

    def fake(command: list[str]) -> int:
        ran.append(Path(command[1]).stem)
        return codes.get(ran[-1], 0)

    monkeypatch.setattr(runner, "call", fake)
    assert runner.main([]) == 1
    assert set(ran) == {run.words[0] for run in runner.RUNS}
    assert "failed: training --bars" in capsys.readouterr().out
    ran.clear()
    assert runner.main(["inference", "import_time"]) == 0
    assert ran == ["inference", "import_time"]
    codes["inference"] = 130  # Ctrl-C ends all
    ran.clear()
    assert runner.main([]) == 130
    assert ran[-1] == "inference"
    assert runner.main(["nonsense"]) == 2
    assert "training" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rounds", "0"], "expected a number above zero"),
        (["--bars", "--only", "x"], "--bars is about"),
        (["--tokens", "17", "--sequence", "16", "--hidden", "64"], "no whole number of sequences"),
        (["--device", "nonsense"], "error"),
    ],
)
def test_wrong_options_are_told(
    words: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = load("training", monkeypatch)
    with pytest.raises(SystemExit) as caught:
        training.main(words)
    assert told in f"{capsys.readouterr().err} {caught.value}"


def test_no_result_names_the_host(harness: ModuleType) -> None:
    import getpass
    import platform

    told = json.dumps(harness.machine(CPU))
    assert platform.node() not in told.split('"')
    assert getpass.getuser() not in told.split('"')
    assert sys.executable not in told
