"""``python -m kilotune.vllm``: vLLM's OpenAI server with the plugin, or no server at all."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

from ..errors import ConfigError, KilotuneError, MissingExtraError, UnsupportedError
from . import worker_status as run
from .plugin import version_fault
from .settings import KEY, ONE_SHARED, STORE, Settings

SERVER = "vllm.entrypoints.openai.api_server"  # `vllm serve` of the CPU wheel fails on its package's name


def server_words(words: Sequence[str]) -> list[str]:
    """The arguments of vLLM's server for ours; those that are not ours are vLLM's.

    Raises:
        ConfigError: they do not go together. UnsupportedError, MissingExtraError: vLLM is not what it must be.

    """
    parser = argparse.ArgumentParser(prog="python -m kilotune.vllm", epilog="All else is passed to vLLM's server.")
    parser.add_argument("--store", help=f"the store's URL (or the environment variable {STORE})")
    parser.add_argument("--kilotune", default="{}", help='more settings, as JSON: \'{"rank": 256, "seed": 0}\'')
    parser.add_argument(
        "--on", action="append", default=[], help="a shared adapter to merge into the base: NAME, NAME/3 or NAME/alias"
    )
    parser.add_argument("--rank", type=int, help="the rank of the largest adapter")
    ours, rest = parser.parse_known_args(words)
    try:
        values = dict(json.loads(ours.kilotune))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--kilotune: expected a JSON object, got {ours.kilotune!r}: {error}") from None
    if ours.rank is not None:
        values["rank"] = ours.rank
    if len(ours.on) > 1:
        raise ConfigError(f"--on: {ONE_SHARED}")
    if ours.on and "on" in values:
        raise ConfigError("on: stands in --kilotune, too; give --on alone")
    if ours.store:
        os.environ[STORE] = ours.store
    settings = Settings.of(values)
    if not (settings.store or os.environ.get(STORE)):
        raise ConfigError("--store: is missing; give the URL of the store, such as sqlite:///adapters.db")
    _check(rest)
    if ours.on:
        settings = on_shared(rest, settings, ours.on[0])
    given = {word.partition("=")[0] for word in rest}
    if "--enable-lora" not in given:
        rest.append("--enable-lora")
    rest += ["--additional-config", json.dumps({KEY: settings.to_dict()})]
    return [*rest, "--middleware", "kilotune.vllm.gate.Gate"]


def on_shared(rest: list[str], settings: Settings, on: str) -> Settings:
    """Have the server load the base with a shared adapter merged into it, under the name that the base has.

    Args:
        rest: vLLM's own arguments, which are changed.
        settings: ours.
        on: the shared adapter, of the settings' namespace (or of '@shared', as the only one where they have none).

    Raises:
        ConfigError: there is no --model. AdapterError and others: see :func:`~.merged_base.merged_base`.

    """
    from ..fleet.store import open_store
    from ..fleet.store.names import SHARED
    from .merged_base import merged_base

    place = next((i for i, word in enumerate(rest) if word.partition("=")[0] == "--model"), None)
    if place is None or (rest[place] == "--model" and place + 1 == len(rest)):
        raise ConfigError("--on: is merged into the model; name that with --model")
    at = place + 1 if rest[place] == "--model" else place
    model = rest[at].removeprefix("--model=")
    url = os.environ.get(STORE) or settings.store
    assert url  # was checked
    with open_store(url, namespace=settings.namespace or SHARED, read_only=not url.startswith("postgres")) as store:
        record = store.find_shared(on)
    folder = merged_base(model, record)
    rest[at] = str(folder) if rest[place] == "--model" else f"--model={folder}"
    if not {"--served-model-name", "--served_model_name"} & {word.partition("=")[0] for word in rest}:
        rest += ["--served-model-name", model]
    return replace(settings, on=f"{record.info.name}/{record.info.version}")


def _check(rest: Sequence[str]) -> None:
    given = {word.partition("=")[0]: i for i, word in enumerate(rest)}
    for option in ("--additional-config", "--additional_config"):
        if option in given:
            raise ConfigError(f"{option}: is made of --kilotune here; leave it out")
    for option in ("--api-server-count", "--api_server_count", "-asc"):
        if option in given:
            word = rest[given[option]]
            number = word.partition("=")[2] or (rest[given[option] + 1] if len(rest) > given[option] + 1 else "")
            if number != "1":
                raise ConfigError(f"{option}: vLLM finds adapters by name with one server process only; leave it out")
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and KEY not in plugins.split(","):
        raise ConfigError(f"VLLM_PLUGINS={plugins!r} leaves the plugin out; add {KEY!r}")
    if find_spec("vllm") is None:
        raise MissingExtraError("vllm", "vllm", "serving VeRA in vLLM")
    import vllm

    if fault := version_fault(str(vllm.__version__)):
        raise UnsupportedError(fault)


def main(words: Sequence[str]) -> int:
    """Run the server; returns the exit code where it does not begin."""
    try:
        rest = server_words(words)
    except KilotuneError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    run.begin_anew()
    sys.argv = [SERVER, *rest]
    runpy.run_module(SERVER, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
