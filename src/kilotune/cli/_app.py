"""The typer application: its verbs, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, final

import typer
from typer.core import TyperGroup
from typer.main import get_command, get_group

from ..errors import KilotuneError
from ._output import complain

__all__ = ["app"]

VERBS = (
    "fetch",
    "init",
    "train",
    "generate",
    "chat",
    "evaluate",
    "export",
    "compare",
    "demo",
    "intrinsic-dimension",
    "plan",
    "inspect",
    "merge",
    "convert",
    "doctor",
    "serve",
    "store",
    "fleet",
    "keys",
)
ERROR, INTERRUPTED = 2, 130


@final
class Commands(Mapping[str, Any]):
    """Verb -> its click command; the verb's file is imported when it is asked for."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(VERBS)

    def __len__(self) -> int:
        return len(VERBS)

    def __getitem__(self, verb: str) -> Any:
        if verb not in VERBS:
            raise KeyError(verb)
        if verb not in self._made:
            self._made[verb] = _command(verb)
        return self._made[verb]


def _command(verb: str) -> Any:
    name = verb.replace("-", "_")
    module = importlib.import_module(f".{name}", __package__)
    if isinstance(group := getattr(module, "app", None), typer.Typer):  # a verb with verbs of its own
        return get_group(group)
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    epilog = getattr(module, "EPILOG", None)
    alone.command(verb, epilog=epilog() if epilog is not None else None)(getattr(module, name))
    return get_command(alone)


@final
class Verbs(TyperGroup):
    """Runs a verb; every foreseen error ends as ``error: ...`` on stderr and an exit code."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands: Any = Commands()

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        run = super().main
        if not standalone_mode:
            return run(args, prog_name, complete_var, False, windows_expand_args, **extra)
        sys.exit(_guarded(lambda: run(args, prog_name, complete_var, False, windows_expand_args, **extra)))


def _guarded(run: Callable[[], Any]) -> int:
    """The exit code of ``run``; what is no foreseen error keeps its traceback, for it is a defect."""
    try:
        result = run()
        return result if isinstance(result, int) else 0
    except KilotuneError as error:
        complain(str(error))
    except BrokenPipeError:  # the reader went away, as `head` does
        sys.stdout = None
        return ERROR
    except OSError as error:
        complain(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        # typer's usage errors; their class moved between versions, their method did not
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        complain(f"{' '.join(describe().split())} Try --help.")
    return ERROR


def _version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata  # takes longer than all of typer

        print(f"kilotune {importlib.metadata.version('kilotune')}")
        raise typer.Exit


def _start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """One frozen base model, very many fine-tunes: VeRA and LoRA, measured in kilobytes.

    Every verb takes --json. Exit codes: 0 done; 1 the answer is no; 2 an error; 130 interrupted.
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


app = typer.Typer(
    name="kilotune",
    cls=Verbs,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.callback(invoke_without_command=True)(_start)
