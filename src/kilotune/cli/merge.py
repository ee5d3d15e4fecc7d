"""``kilotune merge``: a base and an adapter into a plain model folder that needs no kilotune."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._ui.sizes import readable_bytes
from ..bases import located
from ..errors import CheckpointError, ConfigError, check_one_of, gather
from ..known_names import DTYPE_NAMES
from ._options import On
from ._output import Json, console, print_json, quiet_transformers, warn
from ._paths import check_adapter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..adapter_files.reading import AdapterFile

__all__ = ["merge"]

# What belongs to a model folder beside the model: tokenizers and the settings of processors. Never code.
# What a model folder may hold; the whole folder is replaced.
MODEL_SUFFIXES = frozenset({".json", ".safetensors", ".model", ".txt", ".jinja", ".md", ".tiktoken"})
TEMPLATES = ("chat_template.jinja", "chat_template.json")
BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    *TEMPLATES,
    "preprocessor_config.json",
    "processor_config.json",
)


def merge(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder, or a hub id.", metavar="ADAPTER")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    base: Annotated[
        str | None,
        typer.Option(help="The base's folder or hub id. Default: the hub id that the adapter names."),
    ] = None,
    on: On = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"The dtype of the weights: {', '.join(DTYPE_NAMES)}. Default: as they are stored. Makes a quantised "
            "base dense."
        ),
    ] = None,
    safe: Annotated[bool, typer.Option("--safe/--no-safe", help="Refuse where a merged weight is not finite.")] = True,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Load the new folder and compare every weight.")
    ] = True,
    revision: Annotated[str | None, typer.Option(help="The base's revision, where it is a hub id.")] = None,
    adapter_revision: Annotated[str | None, typer.Option(help="The revision of ADAPTER, where it is a hub id.")] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace OUT when it holds a model, and nothing else."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base's weights: a model folder that transformers loads as any other."""
    if dtype is not None:
        check_one_of("--dtype", dtype, DTYPE_NAMES)
    check_adapter(adapter, base, revision, shapes=True)
    quiet_transformers()
    from ..model.parameter_report import count_parameters
    from ._adapter import base_of, check_out, load_fitting_base, open_adapter, open_below

    check_out(out, [adapter, *([base] if base else []), *([on] if on else [])], force)
    _check_replaceable(out)
    file = open_adapter(adapter, adapter_revision)
    below = open_below(file, on)
    source, revision = base_of(file, base, revision)
    base_folder = located(source)
    if Path(base_folder).is_file():
        raise ConfigError(f"--base {source}: is a file; merging needs the folder with the weights")
    model = load_fitting_base(file, source, revision, dtype)
    tied = getattr(model.config, "tie_word_embeddings", False)
    notes = _merge(model, file, below, safe, dtype)
    untied = tied and not model.config.tie_word_embeddings
    with _fresh(out) as folder:
        model.save_pretrained(folder)
        copied = _copy_beside(file, base_folder, revision, folder)
        if verify:
            _verify(model, folder)
    document = {
        "adapter": adapter,
        "on": on,
        "base": source,
        "out": str(out),
        "architecture": type(model).__name__,
        "method": file.method.name,
        "parameters": count_parameters(model).total,
        "dtype": str(model.dtype).removeprefix("torch."),
        "untied": untied,
        "verified": verify,
        "copied": copied,
        "files": {path.name: path.stat().st_size for path in sorted(out.iterdir()) if path.is_file()},
        "warnings": notes,
    }
    for note in notes:
        warn(note)
    if as_json:
        print_json(document)
    else:
        _show(document)


# -- the model -------------------------------------------------------------------------------------


def _check_replaceable(out: Path) -> None:
    """The whole of OUT is replaced, so nothing may be in it but the files of a model.

    Raises:
        CheckpointError: folders, or files that no model folder has, by name.

    """
    inside = sorted(out.iterdir()) if out.is_dir() else []
    foreign = [p.name for p in inside if not p.is_file() or p.suffix not in MODEL_SUFFIXES]
    if foreign:
        raise CheckpointError(
            f"the output {out} holds more than a model, and --force would delete it: {', '.join(foreign[:10])}; take "
            "another folder"
        )


def _merge(model: nn.Module, file: AdapterFile, below: AdapterFile | None, safe: bool, dtype: str | None) -> list[str]:
    """Merge for good; returns what was warned of."""
    from ..model.merging import MergePrecisionWarning
    from ..model.peft_model import PeftModel
    from ..plan import DTYPES
    from ..storage import storage_of
    from ._adapter import apart, put_below

    with apart():
        adapted = PeftModel.from_pretrained(model, file)
    put_below(adapted, below)
    held = ((module, storage_of(module)) for module in model.modules())  # adapted or not
    schemes = [storage.scheme(module) for module, storage in held if storage is not None and not storage.lossless]
    if schemes and dtype is None:  # transformers 5.23 cannot write what came from a quantised folder, so it gets dense
        raise ConfigError(
            f"the base is quantised ({schemes[0]}); give --dtype, and the merged model is a dense one in it"
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MergePrecisionWarning)
        adapted.merge_and_unload(
            progressbar=sys.stderr.isatty(),
            safe_merge=safe,
            dtype=DTYPES[dtype] if schemes and dtype is not None else None,
        )
    for other in (w for w in caught if not issubclass(w.category, MergePrecisionWarning)):
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    return [str(w.message) for w in caught if issubclass(w.category, MergePrecisionWarning)]


def _verify(model: Any, folder: Path) -> None:
    """Load the new folder and compare every tensor, bit for bit."""
    import torch

    again = type(model).from_pretrained(folder, dtype="auto", use_safetensors=True)
    old, new = model.state_dict(), again.state_dict()
    faults = [f"{key}: is not there after loading" for key in sorted(set(old) - set(new))]
    faults += [
        f"{key}: differs after loading"
        for key in sorted(set(old) & set(new))
        if old[key].dtype != new[key].dtype or not torch.equal(_bits(old[key]), _bits(new[key]))
    ]
    if faults:
        raise CheckpointError(gather("the merged model did not come back from its files; nothing was kept:", faults))


def _bits(tensor: Tensor) -> Tensor:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # so that NaN equals itself


# -- files -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _fresh(out: Path) -> Iterator[Path]:
    """A folder that becomes ``out`` when the block ends well, in one rename; else all is as it was."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        fresh, old = Path(name) / "new", Path(name) / "old"
        fresh.mkdir()
        yield fresh
        if out.exists():
            out.rename(old)
        try:
            fresh.rename(out)
        except BaseException:
            if old.exists():
                old.rename(out)
            raise


def _copy_beside(file: AdapterFile, source: str, revision: str | None, folder: Path) -> list[str]:
    """Copy the tokenizer's files: those of the adapter's folder, if it has any, else the base's.

    A chat template alone is no tokenizer: it comes with the base's.
    """
    found = _beside(file.folder)
    if all(path.name in TEMPLATES for path in found):
        base = _beside(Path(source)) if Path(source).is_dir() else _beside_on_hub(source, revision)
        own = {path.name for path in found}
        found = sorted([*(path for path in base if path.name not in own), *found], key=lambda path: path.name)
    for path in found:
        shutil.copyfile(path, folder / path.name)
    return [path.name for path in found]


def _beside(folder: Path) -> list[Path]:
    return sorted({path for pattern in BESIDE for path in folder.glob(pattern) if path.is_file()})


def _beside_on_hub(source: str, revision: str | None) -> list[Path]:
    try:
        from huggingface_hub import snapshot_download

        return _beside(Path(snapshot_download(source, revision=revision, allow_patterns=list(BESIDE))))
    except Exception as error:  # the weights are there already; a tokenizer can be copied by hand
        warn(f"the tokenizer of {source!r} was not copied: {str(error).splitlines()[0]}")
        return []


def _show(document: dict[str, Any]) -> None:
    out = console()
    size = readable_bytes(sum(document["files"].values()))
    out.print(f"merged {document['method']} adapter {document['adapter']} into {document['base']}", markup=False)
    out.print(
        f"{document['architecture']}, {document['parameters']:,} parameters in {document['dtype']}"
        + ("; the tied weights are apart now, because one was adapted" if document["untied"] else ""),
        markup=False,
    )
    checked = "loaded again and compared, bit for bit" if document["verified"] else "not loaded again"
    out.print(f"wrote {document['out']} ({size}), {checked}: {', '.join(document['files'])}", markup=False)
