"""``kilotune serve``: the adapters of a store over one base, by OpenAI's API."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from ..errors import ConfigError, MissingExtraError
from ..serve.http.keys import fixed_keys
from ..serve.http.settings import EngineSettings, ServeSettings
from ..train.settings.config_file import merged
from ..train.settings.places import check_base
from ..train.settings.sections import ModelSettings
from ._output import Json, print_json, quiet_transformers

__all__ = ["serve"]

OWN = (
    "host",
    "port",
    "name",
    "keys",
    "namespace",
    "cors_origin",
    "tool_format",
    "slow_request",
    "adapter_folder",
    "own_chat_templates",
    "learn",
)  # settings with an option of their own
OF_ENGINE = ("task", "dtype", "device", "revision")
REST = [key for key in (*ServeSettings.known(), *EngineSettings.known()) if key not in (*OWN, *OF_ENGINE)]


def _help(name: str) -> str:
    return ServeSettings.help_of(name)


def _engine_help(name: str) -> str:
    return EngineSettings.help_of(name)


def serve(
    model: Annotated[str, typer.Option("--model", "-m", help=ModelSettings.help_of("base"))],
    store: Annotated[
        str,
        typer.Option("--store", "-s", help="The adapters: sqlite:///adapters.db, postgresql://..., or a folder."),
    ],
    host: Annotated[str, typer.Option(help=_help("host"))] = "127.0.0.1",
    port: Annotated[int, typer.Option(help=_help("port"))] = 8000,
    keys: Annotated[str | None, typer.Option(help=_help("keys"))] = None,
    name: Annotated[str | None, typer.Option(help=_help("name"))] = None,
    namespace: Annotated[str, typer.Option(help=_help("namespace"))] = "default",
    task: Annotated[str, typer.Option(help=_engine_help("task"))] = "auto",
    dtype: Annotated[str, typer.Option(help=_engine_help("dtype"))] = "auto",
    device: Annotated[str, typer.Option(help=_engine_help("device"))] = "auto",
    revision: Annotated[str | None, typer.Option(help=_engine_help("revision"))] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help=f"{_help('cors_origin')} May be given again; none: no page may.")
    ] = None,
    tool_format: Annotated[str, typer.Option(help=_help("tool_format"))] = "auto",
    slow_request: Annotated[float | None, typer.Option(metavar="SECONDS", help=_help("slow_request"))] = None,
    adapter_folder: Annotated[
        list[str] | None, typer.Option(metavar="DIR", help=f"{_help('adapter_folder')} May be given again; none: off.")
    ] = None,
    own_chat_templates: Annotated[bool, typer.Option("--own-chat-templates", help=_help("own_chat_templates"))] = False,
    learn: Annotated[bool, typer.Option("--learn", help=_help("learn"))] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help=f"KEY=VALUE, of {', '.join(REST)}. May be given again.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve the adapters of a store over one base, by OpenAI's API, with a page to look at under /.

    It runs until SIGTERM or Ctrl-C, and then lets running requests end. Its log is on stderr, a JSON object a line.
    """
    chosen, options = _settings(
        {
            "host": host,
            "port": port,
            "keys": keys,
            "name": name,
            "namespace": namespace,
            "cors_origin": tuple(cors_origin or ()),
            "tool_format": tool_format,
            "slow_request": slow_request,
            "own_chat_templates": own_chat_templates,
            "learn": learn,
            "adapter_folder": tuple(adapter_folder or ()),
        },
        {"task": task, "dtype": dtype, "device": device, "revision": revision},
        settings or [],
    )
    check_base(model, revision)
    quiet_transformers()
    try:
        from ..serve.http.logs import log, set_up
        from ..serve.http.process import listen, run
        from ..serve.http.startup import build
    except ImportError as error:
        if (error.name or "kilotune").partition(".")[0] == "kilotune":
            raise
        raise MissingExtraError(str(error.name).partition(".")[0], "serve", "kilotune serve") from error
    manager, kept = fixed_keys() if keys is None else (None, ())
    with listen(chosen) as listening:
        service = build(model, store, chosen, options, kept)
        set_up()
        for note in service.notes:
            log("note", note=note)
        run(service, listening, lambda url: _tell(url, service.base, manager, as_json))


def _tell(url: str, base: str, manager: str | None, as_json: bool) -> None:
    """What somebody at a terminal, or a script, has to know."""
    if as_json:
        more = {} if manager is None else {"manager_key": manager}
        print_json({"url": url, "model": base, **more})
    else:
        print(f"serving {base} at {url}")
        if manager is not None:
            print(f"without --keys nobody needs one here; to manage adapters during this run: {manager}")
    sys.stdout.flush()


def _settings(own: dict[str, Any], engine: dict[str, Any], words: list[str]) -> tuple[ServeSettings, EngineSettings]:
    for word in words:
        key = word.partition("=")[0].strip()
        if key in own or key in engine:
            raise ConfigError(f"--set {word!r}: has an option of its own, --{key.replace('_', '-')}")
    more = merged({}, words)
    for_engine = {key: more.pop(key) for key in [*more] if key in EngineSettings.known()}
    return ServeSettings(**own, **more), EngineSettings(**engine, **for_engine)
