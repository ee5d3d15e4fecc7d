"""The pytest plugin of the child process that runs PEFT's tests: ``-p peft_own.plugin``.

PEFT_OWN_ON=kilotune (the default) puts the alias in; PEFT_OWN_ON=peft runs PEFT itself, for making the lists.
PEFT_OWN_HOME is the cache that ``source.py`` makes.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from . import alias, node_ids, rule
from .source import Source
from .standins import Hub
from .trace import Trace

HOME = Source(Path(os.environ["PEFT_OWN_HOME"]))
ON = os.environ.get("PEFT_OWN_ON", "kilotune")
if ON == "kilotune":
    alias.install(HOME.package)
TRACE = Trace()
NONE = SimpleNamespace(params={})  # in the place of the parameters of a test that has none
HUB = Hub(HOME.models)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Ours."""
    parser.addoption("--peft-own-ids", metavar="FILE", help="only the node ids in this file")
    parser.addoption("--peft-own-results", metavar="FILE", help="a line of JSON for each test is added to this file")


def pytest_configure(config: pytest.Config) -> None:
    """No network."""
    HUB.install()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """A file that is collected may make configs that kilotune.peft lacks."""
    with alias.inert_stubs():
        return (yield)


def short(nodeid: str) -> str:
    """A node id without the folder."""
    return nodeid.removeprefix("tests/")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what is listed; for the lists, what can be ours by its parameters."""
    path = config.getoption("--peft-own-ids")
    if path is not None:
        wanted = Path(path).read_text(encoding="utf-8").splitlines()
        listed = node_ids.found(wanted, [short(item.nodeid) for item in items])
        nodes: list[Any] = [*items]
        for item in nodes:
            call(item, f"tests/{listed.get(short(item.nodeid), short(item.nodeid))}")
        keep = [item for item in items if short(item.nodeid) in listed.values()]
    elif ON == "peft":
        keep = [item for item in items if not parameters(item) - rule.HAD_CONFIGS]
    else:
        return
    chosen = set(map(id, keep))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    items[:] = keep
    if ON == "peft":
        TRACE.watch_all()


def call(item: Any, nodeid: str) -> None:
    """Give an item another node id, which pytest keeps as a string, and since 9.2 as an object of its own."""
    if importlib.util.find_spec("_pytest.nodeid") is None:
        item._nodeid = nodeid
    else:
        item._id = importlib.import_module("_pytest.nodeid").coerce_node_id(nodeid)


def parameters(item: pytest.Item) -> frozenset[str]:
    """The classes of configs among a test's parameters."""
    return rule.config_classes(getattr(item, "callspec", NONE).params.values())


def names(item: pytest.Item) -> set[str]:
    """The names of PEFT in a test's own code and that of its fixtures."""
    if not isinstance(item, pytest.Function):
        return set()
    fixtures = [one.func for found in item._fixtureinfo.name2fixturedefs.values() for one in found]
    return {name for function in [item.function, *fixtures] for name in rule.peft_names(inspect.unwrap(function))}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Seeds, and nothing noted yet."""
    import torch

    torch.manual_seed(0)
    TRACE.taken()
    HUB.asked.clear()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to a report what the test made, where lists are made."""
    report: pytest.TestReport = yield
    if ON == "peft" and report.when == "teardown":
        seen = {
            "parameters": sorted(parameters(item)),
            "made": [*TRACE.taken(), *rule.ready_made(getattr(item, "callspec", NONE).params.values())],
            "names": sorted(names(item)),
            "asked": sorted(HUB.asked),
        }
        report.user_properties.append(("seen", json.dumps(seen)))
    return report


class Results:
    """Writes outcomes: the worst of a test's three phases, and the last line of what went wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.open: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A phase ended."""
        line = self.open.setdefault(report.nodeid, {"id": short(report.nodeid), "outcome": "passed", "why": ""})
        line["seconds"] = round(line.get("seconds", 0.0) + report.duration, 2)
        if report.outcome != "passed" and line["outcome"] == "passed":
            line["outcome"] = "xfailed" if hasattr(report, "wasxfail") else report.outcome
            line["why"] = reason(report)
        line.update({key: json.loads(str(value)) for key, value in report.user_properties if key == "seen"})
        if report.when not in ("setup", "call"):  # the end, or what xdist says of a worker that is gone
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.open.pop(report.nodeid)) + "\n")


def reason(report: pytest.TestReport) -> str:
    """One line that says why a test did not pass."""
    text = getattr(getattr(report.longrepr, "reprcrash", None), "message", "") or report.longreprtext
    return " ".join(text.split())[:300]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Outcomes are written by the process that hears of all of them."""
    path = session.config.getoption("--peft-own-results")
    if path is not None and not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(Results(Path(path)))
