"""The harness's own parts: which tests are ours, the files that list them, and what a run is held to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.peft_own import node_ids, report, rule
from scripts.peft_own.source import LISTS

IDS = [
    "test_a.py::T::test_x[1-2]",
    "test_a.py::T::test_x[1 b]",
    "test_a.py::T::test_y[1-2]",
    "test_a.py::T::test_y[1 b]",
]
IDS += ["test_a.py::test_z", "test_b.py::test_x[a::b[0]]", "test_a.py::test_w"]


# -- the rule -----------------------------------------------------------------------------------------------


def seen(parameters: str = "", made: list[tuple[str, dict[str, str]]] | None = None, names: str = "") -> rule.Seen:
    """What was noted of a test, names as words."""
    return rule.Seen(
        frozenset(parameters.split()),
        tuple(rule.Made(name, options) for name, options in made or []),
        frozenset(names.split()),
    )


RULE = [
    (seen("LoraConfig", [("LoraConfig", {"r": "3"})]), None),
    (seen("VeraConfig IA3Config UniLoraConfig"), None),
    (seen("LoHaConfig"), "config: LoHaConfig"),
    (seen("LoraConfig", [("LoraConfig", {}), ("LoHaConfig", {})]), "config: LoHaConfig"),
    (seen("LoraConfig", [("LoraConfig", {"layer_replication": "[]"})]), "option: LoraConfig.layer_replication"),
    (seen("", [("LoraConfig", {"init_lora_weights": "'pissa'"})]), None),
    (seen("", [("LoraConfig", {"init_lora_weights": "'mica'"})]), "option: LoraConfig.init_lora_weights='mica'"),
    (seen("", [], "peft.utils.other.ModulesToSaveWrapper"), None),
    (seen("", [], "peft.tuners.lora.layer.Linear"), None),
    (seen("", [], "peft.tuners.loha.layer.LoHaLayer"), "name: peft.tuners.loha.layer.LoHaLayer"),
    (seen("", [], "peft.tuners.lora.arrow.f"), "name: peft.tuners.lora.arrow.f"),
    (seen("LoraConfig", [], "peft.tuners.loha.config.LoHaConfig"), None),  # mentioned, to be passed over
    (seen(), "nothing of PEFT in it"),
]


def rule_holds() -> None:
    assert [rule.why_not(one) for one, _ in RULE] == [why for _, why in RULE]


def test_which_tests_are_ours() -> None:
    rule_holds()


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("HAD_CONFIGS", frozenset(rule.HAD_CONFIGS | {"LoHaConfig"})),
        ("LEFT_OUT_VALUES", {}),
        ("LEFT_OUT_MODULES", {}),
        ("HAD_TUNERS", rule.HAD_TUNERS | {"loha"}),
        ("OPTIONS", {**rule.OPTIONS, "LoraConfig": rule.OPTIONS["LoraConfig"] | {"layer_replication"}}),
    ],
)
def test_a_planted_fault_in_the_rule_is_told(name: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, name, fault)
    with pytest.raises(AssertionError):
        rule_holds()


def test_what_a_test_has_in_its_parameters_and_its_code() -> None:
    import peft

    names = {"peft": peft, "LoraConfig": peft.LoraConfig, "len": len}
    code = "def f():\n    from peft.tuners.vera import VeraConfig\n    return [LoraConfig(r=len(x)) for x in y]\n"
    exec(code, names)
    assert rule.peft_names(names["f"]) == {"peft.tuners.lora.config.LoraConfig", "peft.tuners.vera"}
    assert rule.config_classes(["r", {"a": [peft.LoraConfig()]}, (peft.IA3Config, int)]) == {"LoraConfig", "IA3Config"}
    made = rule.ready_made([{"a": [peft.LoraConfig(r=3, lora_bias=True)]}, peft.IA3Config])
    assert [(one.name, {*one.options} & {"r", "lora_bias", "lora_alpha"}) for one in made] == [
        ("LoraConfig", {"r", "lora_bias"})
    ]
    set_here = rule.options_set(peft.LoraConfig, {"r": 8, "lora_alpha": 3, "target_modules": None, "use_dora": True})
    assert set_here == {"lora_alpha": "3", "use_dora": "True"}


def test_kilotunes_options_are_the_rules() -> None:
    """An option that a config of ours gets or loses is told here, so that the lists are made anew."""
    import dataclasses

    import kilotune

    ours = {
        "LoraConfig": kilotune.LoraConfig,
        "VeraConfig": kilotune.VeraConfig,
        "IA3Config": kilotune.Ia3Config,
        "UniLoraConfig": kilotune.UniLoraConfig,
        "VBLoRAConfig": kilotune.VbLoraConfig,
    }
    import peft

    for name, cls in ours.items():
        of_peft = {field.name for field in dataclasses.fields(getattr(peft, name))}
        both = of_peft & {field.name for field in dataclasses.fields(cls)}
        assert both <= rule.OPTIONS[name], name


# -- files of node ids --------------------------------------------------------------------------------------


def kept(folder: Path) -> list[str]:
    node_ids.write(folder, IDS)
    return node_ids.read(folder)


def test_node_ids_are_kept_in_files(tmp_path: Path) -> None:
    assert kept(tmp_path) == sorted(IDS)
    text = (tmp_path / "test_a.txt").read_text()
    assert text == "T::test_x\nT::test_y\n  [1 b]\n  [1-2]\n\ntest_w\ntest_z\n"
    node_ids.write(tmp_path, IDS[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["test_a.txt"]


def test_a_planted_fault_in_the_files_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_ids, "split", lambda nodeid: (*nodeid.split("::", 1), ""))
    assert kept(tmp_path) == sorted(IDS)  # whole, only longer
    monkeypatch.setattr(node_ids, "split", lambda nodeid: (*nodeid.partition("[")[0].split("::", 1), ""))
    assert kept(tmp_path) != sorted(IDS)


def numbering_holds() -> None:
    listed = ["a.py::t[LoraConfig-kwargs12]", "a.py::t[IA3Config-kwargs13]", "a.py::u[x-kwargs1]", "a.py::u[x-kwargs2]"]
    assert node_ids.found(listed, listed) == {one: one for one in listed}
    renumbered = ["a.py::t[LoHaConfig-kwargs0]", "a.py::t[LoraConfig-kwargs1]", "a.py::t[IA3Config-kwargs2]"]
    assert node_ids.found(listed, renumbered) == {renumbered[1]: listed[0], renumbered[2]: listed[1]}
    # Two that only their numbers tell apart are not taken for one another.
    assert node_ids.found(listed, ["a.py::u[x-kwargs3]", "a.py::u[x-kwargs4]"]) == {}
    assert node_ids.found(listed[:3], ["a.py::u[x-kwargs0]", "a.py::u[x-kwargs3]"]) == {}
    assert node_ids.found(["a.py::v[r8-3]"], ["a.py::v[r16-3]", "a.py::v[r8-4]"]) == {}


def test_cases_that_are_numbered_otherwise_are_found() -> None:
    numbering_holds()


@pytest.mark.parametrize(
    "fault",
    [
        lambda nodeid: nodeid,
        lambda nodeid: nodeid.partition("[")[0],
    ],
)
def test_a_planted_fault_in_the_numbering_is_told(fault: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_ids, "unnumbered", fault)
    with pytest.raises(AssertionError):
        numbering_holds()


def test_the_lists_are_in_order() -> None:
    """What is in the repository is what the script would write, and nothing is in both lists."""
    for name in ("node_ids", "hub"):
        for path in (LISTS / name).glob("*.txt"):
            text = path.read_text(encoding="utf-8")
            assert "\n".join(node_ids.blocks(node_ids.read_one("test.py", text))) == text, path
    assert not set(node_ids.read(LISTS / "node_ids")) & set(node_ids.read(LISTS / "hub"))


def test_the_expected_failures_are_listed_and_have_reasons() -> None:
    expected = report.read_expected((LISTS / "expected_failures.txt").read_text(encoding="utf-8"))
    listed = node_ids.read(LISTS / "node_ids")
    verdict = report.compare(listed, {}, expected)
    assert [fault for fault in verdict.faults if fault.startswith("expected to fail, and not listed")] == []


# -- what a run is held to ----------------------------------------------------------------------------------

EXPECTED = (
    "# Left out:\n# a thing.\ntest_a.py::T::test_x[[]1-*\ntest_a.py::test_z\n\n# Other.\ntest_b.py::test_x[a::b[0]]\n"
)


def results(**changes: str) -> dict[str, dict[str, Any]]:
    """Outcomes: those that are expected to fail do."""
    failing = {IDS[0], IDS[4], IDS[5]}
    lines = {one: {"outcome": "failed" if one in failing else "passed", "why": "so"} for one in IDS}
    for place, outcome in changes.items():
        lines[IDS[int(place[1:])]]["outcome"] = outcome
    return lines


def judged(**changes: str) -> list[str]:
    """The faults of a run, where a third may fail."""
    expected = report.read_expected(EXPECTED.replace("[[]", "["))
    return report.compare(IDS, results(**changes), expected).faults


def comparison_holds() -> None:
    assert judged() == []
    assert judged(_0="skipped") == []
    assert judged(_3="failed") == [f"failed: {IDS[3]}: so"]
    assert judged(_3="skipped") == [f"skipped: {IDS[3]}: so"]
    assert judged(_4="passed") == [f"passes, and is expected to fail: {IDS[4]}"]
    unlisted = report.compare(IDS[1:4], results(), report.read_expected("# No.\ntest_a.py::test_z")).faults
    assert unlisted == ["expected to fail, and not listed: test_a.py::test_z"]
    assert report.compare(["a.py::b"], {}, []).faults[0] == "not run: a.py::b: "


def test_a_run_is_held_to_what_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "LEAST", 0.4)
    comparison_holds()


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("matches", lambda pattern, nodeid: nodeid.startswith(pattern)),
        ("matches", lambda pattern, nodeid: True),
        ("matches", lambda pattern, nodeid: False),
        ("LEAST", 0.99),
    ],
)
def test_a_planted_fault_in_the_comparison_is_told(
    name: str, fault: Callable[..., bool] | float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "LEAST", 0.4)
    monkeypatch.setattr(report, name, fault)
    with pytest.raises(AssertionError):
        comparison_holds()


def test_nine_of_ten_have_to_pass() -> None:
    names = [f"test_a.py::test_{number}" for number in range(20)]
    expected = [report.Expected(name, "so") for name in names]
    for failing, fault in ((2, []), (3, ["85.0% of what is listed passes; 90% is the least"])):
        lines = {
            name: {"outcome": "passed" if number >= failing else "failed", "why": ""}
            for number, name in enumerate(names)
        }
        assert report.compare(names, lines, expected[:failing]).faults == fault


def test_very_many_faults_are_told_in_short() -> None:
    faults = [f"failed: a.py::t{n}: Error: no {n}" for n in range(70)] + ["failed: a.py::u: Error: else", "80% pass"]
    assert report.in_short(faults[:2]) == faults[:2]
    assert report.in_short(faults)[0] == "    70 x failed: a.py::t0: Error: no 0"
    assert len(report.in_short(faults)) == 3
    assert report.in_short(faults, most=1)[1:] == ["and 2 reasons more"]


def test_a_pattern_without_a_reason_is_an_error() -> None:
    with pytest.raises(ValueError, match="no reason stands above 'test_b'"):
        report.read_expected("# So.\ntest_a\n\ntest_b\n")
    assert report.read_expected("# So\n# it is.\na\nb\n# Other.\nc\n") == [
        report.Expected("a", "So it is."),
        report.Expected("b", "So it is."),
        report.Expected("c", "Other."),
    ]


def test_a_run_on_peft_is_sorted(tmp_path: Path) -> None:
    ours = {"parameters": ["LoraConfig"], "made": [["LoraConfig", {"r": "2"}]], "names": [], "asked": []}
    lines = [
        {"id": "a.py::ours", "outcome": "passed", "why": "", "seen": ours},
        {"id": "a.py::fails", "outcome": "failed", "why": "no", "seen": ours},
        {"id": "a.py::hub", "outcome": "failed", "why": "no", "seen": {**ours, "asked": ["a/b"]}},
        {"id": "a.py::data", "outcome": "failed", "why": "Couldn't reach 'a/b' on the Hub", "seen": ours},
        {"id": "a.py::other", "outcome": "passed", "why": "", "seen": {**ours, "parameters": ["OFTConfig"]}},
        {"id": "a.py::gone", "outcome": "failed", "why": ""},
    ]
    path = tmp_path / "results"
    path.write_text("\n".join(map(json.dumps, lines)))
    lists = report.judge(report.read(path))
    assert (lists.listed, lists.hub) == (["a.py::ours"], ["a.py::hub", "a.py::data"])
    assert lists.rest == {
        "a.py::fails": "failed on PEFT: no",
        "a.py::other": "config: OFTConfig",
        "a.py::gone": "crashed on PEFT",
    }
    assert report.list_table(lists).splitlines()[-1].split() == ["all", "1", "2", "3"]
