"""A server that learns from feedback is killed, again and again: the lesson is live once, with the same numbers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kilotune.serve.learning.turns import LEARNING, events, turn_name, wake
from kilotune.serve.learning.users import model_of
from tests.support.learning_support import Learning, learning

SERVER = """
import sys, time
from pathlib import Path
from tests.support.learning_support import learning
with learning(Path(sys.argv[1])) as made:
    made.runner.start()
    print("serving", flush=True)
    time.sleep(600)
"""
LESSONS = [("the cat", "a dog sat"), ("a dog", "on the hat"), ("a mat", "the cat sat")]


def taught(own: Learning) -> None:
    for asked, right in LESSONS:
        own.correct("ann", asked, right, "no")


def released(own: Learning) -> None:
    """Whoever has the turn is dead, and nobody waits until that shows."""
    own.documents.change(
        LEARNING, turn_name(own.space, "ann"), lambda one: replace(one, until=1.0) if one.state == "running" else one
    )


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_it_is_published_once(tmp_path: Path, seed: int) -> None:
    (tmp_path / "whole").mkdir()
    with learning(tmp_path / "whole") as own:
        taught(own)
        own.learn("ann")
        expected = own.registry.stored(own.space, own.registry.info(own.space, model_of("ann"), 1)).packed
    with learning(tmp_path) as own:
        taught(own)
        wake(own.documents, "ann", 0)
        draws = random.Random(seed)
        for _ in range(5):
            released(own)
            env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            words = [sys.executable, "-c", SERVER, str(tmp_path)]
            server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env)
            try:
                assert server.stdout is not None
                assert server.stdout.readline() == b"serving\n"
                time.sleep(draws.uniform(0.0, 4.0))
            finally:
                server.send_signal(signal.SIGKILL)
                server.communicate()
        released(own)
        if (claim := own.claim()) is not None:
            own.runner._work(claim)
        assert own.state("ann") == "rests"
        assert own.versions("ann") == [1]
        assert own.live("ann") == 1
        assert [one.data["type"] for one in events(own.documents, "ann")] == ["learned"]
        assert own.registry.stored(own.space, own.registry.info(own.space, model_of("ann"), 1)).packed == expected
