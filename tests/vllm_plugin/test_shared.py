"""A shared adapter merged into the base of a real engine, with personal ones on top."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm", reason="the tests of the plugin run in .venv-vllm: make test-vllm")

import vllm_support as support
from vllm_engine import MIXED, Engine, started

from kilotune.errors import UnsupportedError


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """All adapters stand on one; transformers says beside it what they are over the merged weights."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILOTUNE_CACHE", str(folder / "cache"))
        yield from started(folder, shared="style")


def test_a_mixed_batch_on_a_shared_adapter(engine: Engine) -> None:
    engine.check(MIXED[:12])


def test_who_stands_on_nothing_is_refused(engine: Engine) -> None:
    engine.store.put("alone", support.adapted(engine.plain, 0))
    with pytest.raises(UnsupportedError, match="trained on the base alone"):
        engine.request("alone")
