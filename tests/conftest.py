"""What all tests share: fixed seeds, no network, and hypothesis that finds the same examples each time."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported; no test goes to the network
# With AMX, oneDNN 3.12 (of torch 2.13) returns memory that it has not written for some convolutions in bfloat16:
# torch.nn.Conv2d(3, 4, (2, 3), stride=(1, 2), padding=(1, 0)) of a (4, 3, 5, 4) batch, without anything of ours.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import hypothesis
import pytest
import torch

from tests.support.parts import in_part, part_of

hypothesis.settings.register_profile(
    "kilotune",
    deadline=None,  # the first example pays for imports and caches
    derandomize=True,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("kilotune")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="K/N", help="only the K-th of N parts of the tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (text := config.getoption("--part")) is not None:
        try:
            which, count = part_of(text)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error
        own = [item for item in items if in_part(item.nodeid, which, count)]
        config.hook.pytest_deselected(items=[item for item in items if not in_part(item.nodeid, which, count)])
        items[:] = own


def pytest_collection_finish() -> None:
    """What is there before the first test is there to the end, so no garbage collection need look through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A PostgreSQL server of this worker's own (postgres_server.Server)."""
    from tests.support.postgres_server import running

    with running() as server:
        yield server
