"""The experiment end to end on fewer epochs, its checks against planted faults, and its report."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from kilotune import OtherBaseWarning, PeftModel, VeraConfig
from kilotune._ui import pages
from kilotune.errors import KilotuneError
from kilotune.experiments.cnn import experiment as experiment
from kilotune.experiments.cnn import page as report
from kilotune.experiments.cnn import tuning
from kilotune.experiments.cnn.results import AdapterFacts, Check, CnnResult, MethodRun, SeedRun, checks_of, spread
from kilotune.experiments.cnn.settings import METHODS, CnnSettings, choose
from kilotune.experiments.images.convnet import VERA_WIDTHS, build
from kilotune.experiments.images.digits_data import ImageSet
from kilotune.experiments.images.settings import Recipe
from kilotune.experiments.images.training import one_thread

TINY = CnnSettings(seeds=1, epochs=1, adapt_epochs=1)


@pytest.fixture(scope="module")
def result() -> CnnResult:
    """One seed on fewer epochs; enough for every check to hold."""
    return experiment.run(choose("digits", quick=True, chosen={}))


@pytest.fixture(scope="module")
def tiny() -> CnnResult:
    """One epoch of each: nothing is learnt, but everything runs."""
    return experiment.run(TINY)


@pytest.mark.full
def test_every_check_holds(result: CnnResult) -> None:
    assert [check.detail for check in result.failures] == []
    assert len(result.checks) == 14


@pytest.mark.full
def test_adapted_classes_rise_and_others_fall(result: CnnResult) -> None:
    others = result.settings.other_classes
    (before_adapted,), (before_others,) = result.levels(None, (2, 3, 7)), result.levels(None, others)
    for method in METHODS:
        assert result.levels(method, (2, 3, 7))[0] > before_adapted + 0.1
        assert result.levels(method, others)[0] < before_others - 0.05
        assert result.among(method) > result.among(None)


@pytest.mark.full
def test_turning_makes_the_room_and_touches_nothing_else(result: CnnResult) -> None:
    (seed,) = result.seeds
    for label in result.settings.other_classes:
        assert seed.before[label] == seed.pretrained[label]
    assert all(seed.before[label] < seed.pretrained[label] for label in result.settings.classes)
    plain, turned = result.samples
    moved = [not torch.equal(plain[label], turned[label]) for label in range(10)]
    assert [label for label in range(10) if moved[label]] == [2, 3, 7]


@pytest.mark.full
def test_all_methods_start_from_one_network_and_see_as_much(result: CnnResult) -> None:
    assert len({run.losses[-1][0] for run in result.seeds[0].runs.values()}) == 1
    assert result.sizes == {"pretraining": 1198, "adaptation": 359, "test": 599}


@pytest.mark.full
def test_the_saved_adapters_are_the_first_seeds(result: CnnResult, tmp_path: Path) -> None:
    report.write_report(result, tmp_path)
    assert sorted(result.adapters) == [
        f"{method}/adapter_{what}" for method in ("lora", "vera") for what in ("config.json", "model.safetensors")
    ]
    with pytest.warns(OtherBaseWarning):  # the demo's base was trained before it was adapted
        model = PeftModel.from_pretrained(build(VERA_WIDTHS, 0), tmp_path / "adapters" / "vera")
    assert isinstance(model.peft_config["default"], VeraConfig)
    b = dict(model.adapter_parameters("default"))["fc1.vera_lambda_b"]
    facts = result.seeds[0].runs["vera"].adapter
    assert facts is not None
    assert b.double().norm().item() == pytest.approx(facts.norms["fc1"][1])
    assert sum(t.numel() for t in load(result.adapters["vera/adapter_model.safetensors"]).values()) == 542
    assert result.seeds[0].runs["vera"].weight_bytes == len(result.adapters["vera/adapter_model.safetensors"])


def without_timings(result: CnnResult) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(result.to_dict()))
    del plain["timings"]
    return plain


@pytest.mark.full
def test_the_same_run_gives_the_same_numbers_and_pictures(tiny: CnnResult) -> None:
    first = tiny
    torch.manual_seed(2)
    second = experiment.run(TINY)
    assert without_timings(first) == without_timings(second)
    for name, content in first.adapters.items():
        if name.endswith(".safetensors"):
            tensors, again = load(content), load(second.adapters[name])
            assert tensors.keys() == again.keys()
            assert all(torch.equal(tensors[key], again[key]) for key in tensors)
    still = dataclasses.replace(second, seconds=first.seconds, seeds=first.seeds)
    assert report.page(first) == report.page(still)


@pytest.mark.full
def test_another_seed_gives_other_numbers(tiny: CnnResult) -> None:
    first, second = tiny, experiment.run(dataclasses.replace(TINY, first_seed=1))
    assert first.seeds[0].losses != second.seeds[0].losses
    assert first.adapters["vera/adapter_model.safetensors"] != second.adapters["vera/adapter_model.safetensors"]


@pytest.mark.full
def test_progress_goes_from_start_to_end_and_global_state_is_left_alone() -> None:
    told: list[tuple[str, int, int]] = []
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    experiment.run(TINY, lambda *args: told.append(args))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    done = [steps for _, steps, _ in told]
    assert done == sorted(done)
    assert done[-1] == told[-1][2] == 300 + 3 * 90
    stages = list(dict.fromkeys(what for what, _, _ in told))
    assert stages == ["seed 0: pretraining", "seed 0: vera", "seed 0: lora", "seed 0: full"]


# -- the checks, against planted faults ------------------------------------------------------------


def facts(**changes: Any) -> AdapterFacts:
    good = AdapterFacts({"fc1": (0.0, 1.0), "fc2": (0.0, 2.0)}, True, 1e-6, 0, True)
    return dataclasses.replace(good, **changes)


def seed_run(seed: int, changes: dict[str, dict[str, Any]]) -> SeedRun:
    """A seed where the adapted classes 2, 3, 7 rise by 30 points and the others fall by 20."""
    before = [0.5 if label in (2, 3, 7) else 0.9 for label in range(10)]
    after = [0.8 if label in (2, 3, 7) else 0.7 for label in range(10)]
    sizes = {"vera": 10, "lora": 20, "full": 30}
    runs = {}
    for method in METHODS:
        adapter = None if method == "full" else facts()
        run = MethodRun(after, 0.9, [(1, 1.0)], 0.1, True, sizes[method], sizes[method], adapter)
        runs[method] = dataclasses.replace(run, **changes.get(method, {}))
    return SeedRun(seed, before, before, 0.5, [(1, 1.0)], 0.1, runs)


def failed(changes: dict[str, dict[str, Any]], only_last: bool = False) -> list[str]:
    """Names of the checks that fail when three seeds (or only the last) have these changes."""
    seeds = [seed_run(seed, changes if seed == 2 or not only_last else {}) for seed in range(3)]
    checks: list[Check] = checks_of(CnnSettings(), experiment.count(), seeds)
    return [check.name for check in checks if not check.passed]


def accuracies(adapted: float, others: float) -> list[float]:
    return [adapted if label in (2, 3, 7) else others for label in range(10)]


def test_a_good_run_passes() -> None:
    assert failed({}) == []


GAIN, PAY = "VeRA: the adapted classes gain", "VeRA: the other classes pay"
ZERO, MERGE = "VeRA: b left zero in every layer", "VeRA: merging moves nothing, the base is intact"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"after": accuracies(0.5, 0.7)}, [GAIN]),
        ({"after": accuracies(0.59, 0.7)}, [GAIN]),
        ({"after": accuracies(0.8, 0.9)}, [PAY]),
        ({"after": accuracies(0.8, 0.86)}, [PAY]),
        ({"after": accuracies(0.8, 0.95)}, [PAY]),
        ({"after": accuracies(0.2, 1.0)}, [GAIN, PAY]),
        ({"after": [*accuracies(0.95, 0.7)[:7], 0.5, 0.7, 0.7]}, [GAIN]),
        ({"adapter": facts(norms={"fc1": (0.0, 1.0), "fc2": (0.0, 0.0)})}, [ZERO]),
        ({"adapter": facts(norms={"fc1": (0.1, 1.0)})}, [ZERO]),
        ({"adapter": facts(norms={})}, [ZERO]),
        ({"adapter": facts(base_intact=False)}, [MERGE]),
        ({"adapter": facts(unmerge_exact=False)}, [MERGE]),
        ({"adapter": facts(merge_difference=1e-3)}, [MERGE]),
        ({"adapter": facts(merge_difference=float("nan"))}, [MERGE]),
        ({"reload_exact": False}, ["saved and loaded again, every copy is the same"]),
        ({"weight_bytes": 25}, ["VeRA's file is smaller than LoRA's, LoRA's than the network's"]),
    ],
)
def test_each_check_can_fail(change: dict[str, Any], wanted: list[str]) -> None:
    assert failed({"vera": change}) == wanted


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"after": accuracies(0.5, 0.7)}, [GAIN]),
        ({"after": accuracies(0.8, 0.9)}, [PAY]),
        ({"adapter": facts(base_intact=False)}, [MERGE]),
        ({"reload_exact": False}, ["saved and loaded again, every copy is the same"]),
    ],
)
def test_one_bad_seed_of_three_is_enough_to_fail(change: dict[str, Any], wanted: list[str]) -> None:
    assert failed({"vera": change}, only_last=True) == wanted


def test_counts_that_differ_from_the_tutorials_fail() -> None:
    counts = [dataclasses.replace(row, trainable=row.trainable + 1) for row in experiment.count()]
    checks = checks_of(CnnSettings(), counts, [seed_run(0, {})])
    assert [check.name for check in checks if not check.passed] == [
        "VeRA: parameters as in the tutorial's table",
        "LoRA: parameters as in the tutorial's table",
    ]


Touch = Callable[[pytest.MonkeyPatch], None]


def _break_merge(patch: pytest.MonkeyPatch) -> None:
    whole = PeftModel.merge_adapter

    def half(self: PeftModel, *args: Any, **options: Any) -> None:
        whole(self, *args, **options)
        with torch.no_grad():
            self.fc1.base_layer.weight[0, 0] += 10.0

    patch.setattr(PeftModel, "merge_adapter", half)


def _break_loading(patch: pytest.MonkeyPatch) -> None:
    whole = PeftModel.from_pretrained

    def changed(model: Any, folder: Any) -> PeftModel:
        loaded = whole(model, folder)
        with torch.no_grad():
            next(iter(dict(loaded.adapter_parameters("default")).values())).add_(1e-3)
        return loaded

    patch.setattr(PeftModel, "from_pretrained", changed)


def _leave_b_at_zero(patch: pytest.MonkeyPatch) -> None:
    whole = experiment.train

    def train(model: Any, *args: Any) -> list[float]:
        losses = whole(model, *args)
        for name, parameter in model.named_parameters():
            if "vera_lambda_b" in name or "lora_B" in name:
                parameter.data.zero_()
        return losses

    patch.setattr(experiment, "train", train)


@pytest.mark.full
@pytest.mark.parametrize(
    ("fault", "claim"),
    [
        (_break_merge, "merging moves nothing"),
        (_break_loading, "saved and loaded again"),
        (_leave_b_at_zero, "left zero in every layer"),
    ],
)
def test_a_fault_in_the_library_is_found(
    fault: Touch, claim: str, tiny: CnnResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = [check.name for check in tiny.failures]
    assert not any(claim in name for name in sound)
    fault(monkeypatch)
    assert any(claim in check.name for check in experiment.run(TINY).failures)


# -- the report ------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects tags, their addresses and text; complains of tags that do not close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset", "action")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read_page(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@pytest.mark.full
def test_the_page_is_whole_and_needs_nothing_else(result: CnnResult) -> None:
    text = report.page(result)
    reader = read_page(text)
    assert not {"script", "link", "iframe", "object", "embed"} & set(reader.tags)
    assert len(reader.addresses) == 3
    assert all(address.startswith("data:image/") for address in reader.addresses)
    styles = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"https?://|url\(|@import|//cdn", styles)
    for address in reader.addresses:
        kind, _, data = address.partition(";base64,")
        picture = base64.b64decode(data, validate=True)
        assert picture.startswith(b"\x89PNG" if kind.endswith("png") else b"<?xml")
        if kind.endswith("svg+xml"):
            assert b"<image" not in picture
            assert not re.search(rb'href="(?!#)', picture)


@pytest.mark.full
def test_the_page_says_what_matters(result: CnnResult) -> None:
    text = " ".join("".join(read_page(report.page(result)).text).split())
    for part in (
        *("542", "89,118", "89,660", "0.60 %", "4 pairs", "31,552", "121,212", "3,272", "78,110", "4.19 %", "4,616"),
        *("all 14 checks passed", "turned by 30 degrees", "as the tutorials", "by memory location", "SGD"),
        *("seeds", "learning rates: VeRA 0.03, LoRA 0.003", "held-out", "torch", "scikit-learn"),
        *(check.name for check in result.checks),
        *(check.detail for check in result.checks),
    ):
        assert part in text, part


@pytest.mark.full
def test_a_failed_run_says_so(result: CnnResult) -> None:
    failing = dataclasses.replace(result, seeds=[seed_run(0, {"vera": {"reload_exact": False}})])
    text = report.page(failing)
    assert "1 of 14 checks FAILED" in text
    assert "Not everything went as the tutorials report it" in text
    assert "Those classes rose" not in text


@pytest.mark.full
def test_the_page_of_several_seeds_shows_their_range(result: CnnResult) -> None:
    settings = dataclasses.replace(result.settings, seeds=2, rotation=0.0)
    lower = seed_run(1, {"vera": {"after": accuracies(0.7, 0.7)}})
    several = dataclasses.replace(result, settings=settings, seeds=[seed_run(0, {}), lower])
    text = "".join(read_page(report.page(several)).text)
    assert "70.0 to 80.0" in text
    assert "lowest and the highest seed" in text
    assert "Nothing was done to the pictures" in text


@pytest.mark.full
def test_names_are_escaped(result: CnnResult) -> None:
    names = ("<script>alert(1)</script>", *result.class_names[1:])
    settings = dataclasses.replace(result.settings, classes=(0, 2))
    text = report.page(dataclasses.replace(result, class_names=names, settings=settings, source="a & <b>"))
    assert "<script" not in text
    assert "a &amp; &lt;b&gt;" in text
    read_page(text)


@pytest.mark.full
def test_results_are_written_next_to_the_page(result: CnnResult, tmp_path: Path) -> None:
    files = report.write_report(result, tmp_path / "new" / "folder")
    assert [path.name for path in files[-2:]] == ["results.json", "report.html"]
    written = json.loads(files[-2].read_text())
    assert written == json.loads(json.dumps(result.to_dict()))
    assert written["passed"] is True
    assert written["summary"]["vera"]["adapted"] == pytest.approx(result.levels("vera", (2, 3, 7))[0])
    everything = {path.relative_to(tmp_path / "new" / "folder").as_posix() for path in tmp_path.rglob("*.*")}
    assert everything == {*(f"adapters/{name}" for name in result.adapters), "results.json", "report.html", "."} - {"."}


def test_writing_fails_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"old")
    written = []
    real = Path.write_bytes

    def fails_second(self: Path, data: bytes) -> int:
        written.append(self)
        if len(written) == 2:
            real(self, data[:1])
            raise OSError("disk full")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", fails_second)
    with pytest.raises(KilotuneError, match=r"could not write the report into .*: disk full"):
        pages.publish(tmp_path, {"a": b"new", "b": b"new"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}


def test_a_folder_that_cannot_be_written_is_found_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(KilotuneError, match="is a file"):
            pages.check_folder(place)
    pages.check_folder(tmp_path / "not" / "yet")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_spread() -> None:
    assert spread([0.5]) == "50.0"
    assert spread([0.25, 0.75]) == "50.0 (25.0 to 75.0)"


# -- the learning rates ----------------------------------------------------------------------------


def test_tuning_adapts_a_copy_and_judges_held_out_pictures() -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (8, 3, 32, 32), generator=generator, dtype=torch.uint8)
    images, net = ImageSet(pictures, torch.tensor([2, 3] * 4)), build(VERA_WIDTHS, 0)
    before = copy.deepcopy(net.state_dict())
    with one_thread():
        low = tuning.held_out_loss("vera", net, Recipe(1e-12, 1), images, images, 0)
        high = tuning.held_out_loss("full", net, Recipe(1e-2, 30), images, images, 0)
        wild = tuning.held_out_loss("lora", net, Recipe(1e30, 30), images, images, 0)
    assert high < low == pytest.approx(2.3, abs=0.1)
    assert wild == float("inf")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_chosen_rates_are_among_those_tried() -> None:
    for method, rate in CnnSettings().rates.items():
        assert rate in tuning.RATES[method]


@pytest.mark.full
@pytest.mark.timeout(900)  # minutes of work, and more beside other work
def test_tuning_finds_the_chosen_rates_good() -> None:
    lines: list[str] = []
    tuning.main(lines.append)
    found = {(line.split()[0], float(line.split()[2])): float(line.split()[5]) for line in lines[1:]}
    for method, rate in CnnSettings().rates.items():
        best = min(loss for (name, _), loss in found.items() if name == method)
        assert found[method, rate] < 1.25 * best


@pytest.mark.full
def test_the_whole_experiment_over_three_seeds() -> None:
    result = experiment.run(CnnSettings())
    assert result.failures == []
    assert result.seconds < 120
