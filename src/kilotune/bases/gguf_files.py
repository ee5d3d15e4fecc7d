"""A GGUF file into a plain folder of transformers: config.json, model.safetensors, the tokenizer's files.

The weights are float32 where the file has them quantised: a value of Q4_1 is a 4-bit number times a float16 plus a
float16, and bfloat16's 8 bits would round that again. A CPU without bfloat16 would be slow with it, too. A file that
holds float16 or bfloat16 matrices keeps them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError, ConfigError, MissingExtraError, first_line
from .cache import cache_folder, check_room, made

__all__ = ["folder_of", "need_gguf", "write_folder"]

MAGIC = b"GGUF"
AS_STORED = {"F16": "float16", "BF16": "bfloat16"}
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


class _Inside(NamedTuple):
    """What a file says of itself. numbers: in all its tensors."""

    architecture: str
    dtype: str
    numbers: int


def folder_of(file: Path) -> Path:
    """The folder for a GGUF file, made in the cache where it is not there; a file that has changed gets a new one.

    Raises:
        ConfigError: it is no GGUF file, or transformers cannot read a model out of it.
        MissingExtraError: gguf or transformers is not installed.
        ResourceError: there is no room in the cache.

    """
    with file.open("rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise ConfigError(f"{file} is no GGUF file: it does not begin with 'GGUF'")
    whole, status = file.resolve(), file.stat()
    key = hashlib.sha256(f"{whole}\n{status.st_size}\n{status.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / "gguf" / f"{file.stem}-{key}"

    def make(out: Path) -> dict[str, Any]:
        write_folder(whole, out)
        return {"name": file.stem, "file": str(whole)}

    made(folder, make)
    return folder


def need_gguf(what: str) -> None:
    """Refuse where a package is missing that reads GGUF.

    Raises:
        MissingExtraError: gguf or transformers is not installed.

    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("gguf", "export", f"{what}: reading a GGUF file") from error
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("transformers", "transformers", f"{what}: reading a GGUF file") from error


def write_folder(file: Path, out: Path) -> None:
    """Write the model and the tokenizer in a GGUF file into ``out``, which is there.

    Raises:
        ConfigError: transformers cannot read it, or does not read all of it.
        CheckpointError: it is damaged.
        MissingExtraError: gguf or transformers is not installed.
        ResourceError: there is no room.

    """
    need_gguf(str(file))
    inside = _look(file)
    check_room(out, inside.numbers * BYTES[inside.dtype])
    model, tokenizer = _read(file, inside)
    _check_all_read(file, inside, model)
    plain = _plain(model)
    tokenizer.model_max_length = getattr(plain.config, "max_position_embeddings", tokenizer.model_max_length)
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _look(file: Path) -> _Inside:
    from gguf import GGUFReader

    try:
        reader: Any = GGUFReader(file)
        architecture = str(reader.fields["general.architecture"].contents())
        matrices = {str(tensor.tensor_type.name) for tensor in reader.tensors if len(tensor.shape) > 1}
        numbers = sum(int(tensor.n_elements) for tensor in reader.tensors)
    except Exception as error:  # the reader lets numpy's and its own errors out
        raise CheckpointError(f"{file} is damaged, or no GGUF file that gguf reads: {first_line(error)}") from error
    dtype = AS_STORED.get(matrices.pop(), "float32") if len(matrices) == 1 else "float32"
    return _Inside(architecture, dtype, numbers)


def _read(file: Path, inside: _Inside) -> tuple[Any, Any]:
    import torch
    import transformers

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    # Newer ones leave the weights in GGUF's blocks where they have a kernel for them, as on a GPU.
    newer = getattr(transformers, "GgufConfig", None)
    dense = {} if newer is None else {"quantization_config": newer(dequantize=True)}
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=getattr(torch, inside.dtype), output_loading_info=True, **where, **dense
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **where)
    except Exception as error:  # transformers raises a dozen unrelated kinds for what it does not know
        raise ConfigError(
            f"{file}: transformers {transformers.__version__} reads no causal language model out of this GGUF file, "
            f"whose architecture is {inside.architecture!r}: {first_line(error)}"
        ) from error
    if found["missing_keys"] or found["mismatched_keys"]:
        lacking = sorted([*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])])
        raise ConfigError(f"{file}: {len(lacking)} weights of the model are not in it as such: {lacking[0]}, ...")
    return model, tokenizer


def _plain(model: Any) -> Any:
    """The same model, not marked as quantised: transformers does not save what is."""
    import copy

    import torch

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.generation_config = model.generation_config
    return plain


def _check_all_read(file: Path, inside: _Inside, model: Any) -> None:
    """Refuse where transformers left numbers of the file out, as it does with Llama 3's rope_freqs."""
    numbers = sum(parameter.numel() for parameter in model.parameters())  # tied ones count once
    if numbers != inside.numbers:
        raise ConfigError(
            f"{file}: transformers makes a {type(model).__name__} of {numbers:,} numbers of the {inside.numbers:,} in "
            "this file, so it would not be the same model; take the model's own folder"
        )
