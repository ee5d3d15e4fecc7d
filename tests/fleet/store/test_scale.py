"""A hundredth of the million: ten thousand adapters of 6 KB, made, put and read as `benchmarks/store.py` does it.

Sizes are held to the bars. Times are of a shared machine here, so they have ten times as much room as the bars give;
the benchmark holds them.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from kilotune.fleet.store import open_store
from tests.support.paths import ROOT


@pytest.mark.heavy
def test_ten_thousand_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("store")
    monkeypatch.setattr(benchmark, "READS", 1000)
    monkeypatch.setattr(benchmark, "WRITES", 20)
    url = f"sqlite:///{tmp_path}/a.db"
    result = benchmark.measure(url, 10_000, "sqlite")
    assert result.payload_bytes > 10_000 * 6144
    assert result.ratio <= 1.1
    assert result.put_rate > 200
    assert result.get_median < 0.010
    assert result.get_p99 < 0.050
    file = (tmp_path / "a.db").stat().st_size
    assert file <= 1.1 * result.payload_bytes
    with open_store(url, read_only=True) as store:
        torch.manual_seed(0)
        rows = [torch.randn(1536) for _ in range(3)]  # the first that were put
        for i, row in enumerate(rows):
            tensors = store.get(f"user-{i:08d}", 1).tensors()
            wanted = benchmark.contents(row).tensors
            assert all(torch.equal(tensors[key], value) for key, value in wanted.items())
        assert list(store.verify([f"user-{i:08d}" for i in range(0, 10_000, 97)])) == []
        assert store.stats().forms == 1


@pytest.mark.parametrize("size", [2_000, 5_000, 7_300, 12_000, 40_000])
def test_the_file_is_little_more_than_what_is_in_it(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At other sizes too: a small page wastes little, whatever is put on it."""
    from kilotune.fleet.store import Contents, Item
    from tests.support.store_support import CONFIG

    def items(count: int):  # type: ignore[no-untyped-def]
        for i in range(count):
            row = torch.randn(size // 8)
            tensors = {"base_model.model.0.vera_lambda_b": row, "base_model.model.0.vera_lambda_d": row.clone()}
            yield Item(f"user-{i:08d}", Contents(CONFIG, tensors, {}), {"user": i})

    with open_store(f"sqlite:///{tmp_path}/a.db") as store:
        store.put_many(items(400))
    with open_store(f"sqlite:///{tmp_path}/a.db") as store:
        stats = store.stats()
    assert stats.store_bytes <= (1.12 if size > 4000 else 1.3) * stats.payload_bytes


def test_what_packing_does_to_outputs_is_as_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    found = {(p.method, p.packing): p.of_change for p in importlib.import_module("store").packings()}
    for method in ("VeRA r 64", "LoRA r 8"):
        assert found[(method, "float32")] == 0
        assert 0 < found[(method, "bfloat16")] < 0.01
        assert found[(method, "bfloat16")] < found[(method, "int8")] < 0.03
