"""``kilotune plan``: sizes and costs of fine-tunes before any of them runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._ui.sizes import parse_bytes, parse_count, readable_bytes
from ..adapter_files.names import REPO_ID
from ..bases import GGUF_SUFFIX, PACKAGED
from ..config import AdapterConfig, TaskType, check_listed_options, listed_options
from ..errors import ConfigError, check_one_of, did_you_mean, gather
from ..known_names import DTYPE_NAMES, METHOD_OPTIONS, MODEL_NAMES, PRESETS_OF
from ..train.settings.sections import adapter_names
from ._completion import complete, complete_methods
from ._output import Json, console, print_json, quiet_transformers, rows_table

if TYPE_CHECKING:
    from ..fleet.scale import Scale
    from ..plan import AdapterCosts, Base, BuiltIn, Head

__all__ = ["EPILOG", "models", "plan"]

NO_EFFECT = ("base_model_name_or_path", "inference_mode", "revision")  # on what is counted
USUAL = ("lora", "vera")  # planned where no method is named: those whose size --rank says


def models() -> dict[str, BuiltIn]:
    """The built-in models, and the convolutional networks of ``kilotune experiment cnn``."""
    from ..experiments.images.convnet import LORA_WIDTHS, VERA_WIDTHS, ConvNet
    from ..plan import BUILT_IN, BuiltIn

    nets = {"tutorial-vera": VERA_WIDTHS, "tutorial-lora": LORA_WIDTHS}
    text = "the convolutional network of `kilotune experiment cnn`"

    def built(widths: tuple[int, ...]) -> BuiltIn:
        return BuiltIn(text, lambda head: ConvNet(widths))

    return {**BUILT_IN, **{name: built(widths) for name, widths in nets.items()}}


def EPILOG() -> str:
    """The built-in models, and every option that --set takes, from the configs' own help texts."""
    lines = ["Built-in models: " + ", ".join(MODEL_NAMES) + "."]
    for name in (n for n in AdapterConfig.option_names() if n not in NO_EFFECT):
        lines.append(f"[bold]--set {name}=[/] {_escape(AdapterConfig.help_of(name))}")
    for method, own in METHOD_OPTIONS.items():
        lines += [f"[bold]--set {name}=[/] ({method}) {_escape(text)}" for name, text in own.items()]
    return "\n\n".join(lines)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A config.json or its folder, a built-in name (below), or a hub id.",
            metavar="MODEL",
            autocompletion=complete(lambda: MODEL_NAMES),
        ),
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            help="A method; may be given again. Default: lora and vera.",
            autocompletion=complete_methods,
        ),
    ] = None,
    rank: Annotated[
        list[int] | None, typer.Option("--rank", "-r", help="The rank; may be given again. Default: the method's own.")
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            "--targets",
            "-t",
            help="Names of modules, with commas between, or all-linear. Default: the architecture's own.",
        ),
    ] = None,
    targets_regex: Annotated[
        str | None, typer.Option(help="A regular expression for whole module names, in place of --targets.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"The base's dtype: {', '.join(DTYPE_NAMES)}. Default: as in its configuration.")
    ] = None,
    users: Annotated[
        str, typer.Option(help="How many adapters of this kind there will be; 1e6 is a number too.")
    ] = "1",
    memory: Annotated[
        str | None, typer.Option(help="Memory of a device for adapters, such as 24GiB: how many are resident in it.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Users a minute that one machine trains (benchmarks/fleet.py measures it).")
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE: any other option of the method, VALUE in JSON or plain text."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The revision of a hub id.")] = None,
    as_json: Json = False,
) -> None:
    """Count what a fine-tune costs before it runs: trained and shared numbers, bytes, files, many users."""
    values = _options(options or [], rank or [], targets, targets_regex)
    methods = [_method(name) for name in method or USUAL]
    for name in methods:
        _check_options(name, [*values, *(["r"] if rank else [])])
    if dtype is not None:
        check_one_of("dtype", dtype, DTYPE_NAMES)
    count = parse_count(users, "--users")
    space = None if memory is None else parse_bytes(memory, "--memory")
    _check_model(model)
    quiet_transformers()
    from ..fleet.scale import scale
    from ..plan import costs, load_base

    base = load_base(model, dtype=dtype, revision=revision, head=_head(values), built_in=models())
    values = _with_default_targets(base, values)
    ranks: list[int | None] = [*rank] if rank else [None]
    configs = [(name, _config(name, r, values)) for name in dict.fromkeys(methods) for r in ranks]
    results = [replace(costs(base.model, config, count), method=name) for name, config in configs]
    scales = [scale(base.model, config, count, space, rate) for _, config in configs]
    notes = [base.notes[m] for m in dict.fromkeys(methods) if m in base.notes]
    if as_json:
        print_json(_document(base, results, scales, notes))
    else:
        _show(base, results, scales, notes)


def _check_model(model: str) -> None:
    """Refuse a model that is no name, no path that is there, and no hub id, before anything large is imported."""
    path = Path(model)
    if model in MODEL_NAMES or model in PACKAGED or model.endswith(GGUF_SUFFIX) or path.is_file():
        return
    if path.is_dir() or path.suffix == ".json":
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            where = f"{file.parent} holds no {file.name}" if file.parent.is_dir() else f"{file} is not there"
            raise ConfigError(where)
    elif not REPO_ID.fullmatch(model):
        hint = did_you_mean(model, MODEL_NAMES)
        raise ConfigError(f"{model!r} is no file, folder, built-in model or hub id (owner/name).{hint}")


def _method(name: str) -> str:
    """The name of a method or a preset, as it is spelled here."""
    known = adapter_names(name.lower())
    if name.lower() not in known:
        raise ConfigError(f"unknown method {name!r}.{did_you_mean(name, known)} Methods: {', '.join(sorted(known))}")
    return name.lower()


def _check_options(method: str, given: Sequence[str]) -> None:
    """Refuse a wrong option by its name before anything large is imported; its value is the config's to check."""
    try:
        check_listed_options(method, given)
    except ConfigError as error:
        hint = _others(PRESETS_OF.get(method, method), given, {name: listed_options(name) for name in METHOD_OPTIONS})
        raise ConfigError(f"{error}{hint}") from error


def _others(method: str, given: Sequence[str], options: Mapping[str, Sequence[str]]) -> str:
    """The methods that have the given options, where this one has not."""
    others = [name for name, own in options.items() if set(given) <= set(own)]
    if not others or method in others:
        return ""
    return f"\n  These options are of {' and '.join(others)}: add --method {others[0]}"


def _options(given: list[str], ranks: list[int], targets: str | None, targets_regex: str | None) -> dict[str, Any]:
    """The options of the config that were given; each fault is named, all at once."""
    faults = [f"--set {item!r}: expected KEY=VALUE" for item in given if not item.partition("=")[0] or "=" not in item]
    pairs = [(key, text) for key, sign, text in (item.partition("=") for item in given) if key and sign]
    keys = [key for key, _ in pairs]
    faults += [f"--set {key}: has no effect on a plan" for key in keys if key in NO_EFFECT]
    faults += [f"--set {key}: is given {keys.count(key)} times" for key in dict.fromkeys(keys) if keys.count(key) > 1]
    if "r" in keys and ranks:
        faults.append("--set r: is given by --rank as well")
    ways = [targets is not None, targets_regex is not None, "target_modules" in keys]
    if sum(ways) > 1:
        faults.append("--targets, --targets-regex and --set target_modules exclude each other")
    if faults:
        raise ConfigError(gather("the options do not fit together:", faults) if len(faults) > 1 else faults[0])
    values = {key: _value(text) for key, text in pairs}
    if targets is not None:
        values["target_modules"] = targets if targets == "all-linear" else [t.strip() for t in targets.split(",")]
    if targets_regex is not None:
        values["target_modules"] = targets_regex
    return values


def _head(values: Mapping[str, Any]) -> Head:
    """The head of the task that is planned; a task that does not exist is the config's to refuse."""
    from ..plan import Head

    task = values.get("task_type")
    return Head(task) if task in list(TaskType) else Head()


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _with_default_targets(base: Base, values: Mapping[str, Any]) -> dict[str, Any]:
    """A plain torch model has no architecture with targets of its own: all its linear layers."""
    plain = getattr(getattr(base.model, "config", None), "model_type", None) is None
    return {"target_modules": "all-linear", **values} if plain else dict(values)


def _config(method: str, rank: int | None, values: Mapping[str, Any]) -> AdapterConfig:
    from ..methods import METHODS, PRESETS, get_config

    try:
        return get_config(method, **({**values} if rank is None else {**values, "r": rank}))
    except ConfigError as error:
        options = {name: cls.config_cls.option_names() for name, cls in METHODS.items()}
        hint = _others(PRESETS.get(method, (method, {}))[0], [*values, *([] if rank is None else ["r"])], options)
        raise ConfigError(f"{error}{hint}") from error


def _document(base: Base, results: list[AdapterCosts], scales: list[Scale], notes: list[str]) -> dict[str, Any]:
    return {
        "model": base.name,
        "origin": base.origin,
        "base": {
            "parameters": base.parameters,
            "bytes": base.report.total_bytes,
            "bytes_by_dtype": base.bytes_by_dtype(),
        },
        "plans": [{**result.to_dict(), "scale": own.to_dict()} for result, own in zip(results, scales, strict=True)],
        "notes": notes,
    }


def _show(base: Base, results: list[AdapterCosts], scales: list[Scale], notes: list[str]) -> None:
    out = console()
    sizes = ", ".join(f"{readable_bytes(size)} in {name}" for name, size in base.bytes_by_dtype().items())
    out.print(f"{base.name} ({base.origin}): {base.parameters:,} parameters; {sizes}", markup=False)
    columns = [f"{result.method} r {result.config.to_dict().get('r', '')}".strip() for result in results]
    out.print(rows_table("", columns, [*_rows(results), *_scale_rows(scales)]))
    for note in notes:
        out.print(f"Note: {note}", markup=False)


def _rows(results: list[AdapterCosts]) -> list[tuple[str, ...]]:
    def row(name: str, values: list[str]) -> tuple[str, ...]:
        return (name, *values)

    reports = [result.parameters for result in results]
    rows = [
        row("targets", [_targets(result) for result in results]),
        row("adapted layers", [f"{result.layers:,}" for result in results]),
        row("trainable", [f"{report.trainable:,}" for report in reports]),
        row("frozen base", [f"{report.frozen_base:,}" for report in reports]),
        row("frozen shared projections", [f"{report.frozen_shared:,}" for report in reports]),
        row("  in pairs", [str(report.pairs) for report in reports]),
        row("total", [f"{report.total:,}" for report in reports]),
        row("trainable % of total", [f"{report.percent:.4g}" for report in reports]),
        row("base", [readable_bytes(report.base_bytes) for report in reports]),
        row("shared projections", [readable_bytes(report.shared_bytes) for report in reports]),
        row("one adapter in memory", [readable_bytes(result.adapter_bytes) for result in results]),
        row("one adapter's file", [readable_bytes(result.file_bytes) for result in results]),
        row("training, without activations", [readable_bytes(result.training_bytes) for result in results]),
    ]
    if any(report.frozen_adapters for report in reports):  # LoRA-FA's A
        rows.insert(4, row("frozen in the adapter", [f"{report.frozen_adapters:,}" for report in reports]))
    users = results[0].users
    if users > 1:
        rows.append(row(f"{users:,} users in memory", [readable_bytes(r.users_bytes) for r in results]))
        rows.append(row(f"{users:,} users' files", [readable_bytes(r.users_file_bytes) for r in results]))
    return rows


def _scale_rows(scales: list[Scale]) -> list[tuple[str, ...]]:
    first, rows = scales[0], []
    if first.users > 1:
        for packing in first.store:
            rows.append((f"  in a store, {packing}", *(readable_bytes(own.store[packing]) for own in scales)))
    if first.memory is not None:
        for dtype in ("float32", "bfloat16"):
            held = ["not in a bank" if own.resident is None else f"{own.resident[dtype]:,}" for own in scales]
            rows.append((f"resident in {readable_bytes(first.memory)}, {dtype}", *held))
    if first.hours is not None:
        rows.append((f"hours of one machine at {first.rate:g} users/min", *(f"{own.hours:,.1f}" for own in scales)))
    return rows


def _targets(result: AdapterCosts) -> str:
    targets = result.config.target_modules
    return targets if isinstance(targets, str) else ", ".join(targets or ())
