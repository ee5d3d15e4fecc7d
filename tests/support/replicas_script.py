"""Two replicas of the service under Ray, for test_replicas.py: replicas_script.py FOLDER STORE KEYS PORT."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path


def build(folder: str, store: str, keys: str) -> object:
    """A service of the tiny base that stands in ``folder``."""
    from kilotune.serve.http.settings import ServeSettings
    from kilotune.serve.http.startup import build as built

    return built(folder, store, ServeSettings(keys=keys, name="tiny"))


def main() -> None:
    """Start, say where, and stay until the input ends."""
    import ray
    from ray import serve

    from kilotune.serve.replicas import application

    folder, store, keys, port = sys.argv[1:5]
    here = str(Path(__file__).resolve().parent.parent.parent)
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        configure_logging=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": here, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(application(functools.partial(build, folder, store, keys), replicas=2, resident=64), name="kilotune")
    print(json.dumps({"ready": True, "pid": os.getpid()}), flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()
    time.sleep(0.1)


if __name__ == "__main__":
    main()
