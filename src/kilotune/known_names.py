"""What there is by name, known without importing torch: for help texts, completion and the checks of settings.

known_names.json is written by ``python scripts/known_names.py`` from the methods' configs and the built-in models, the
home of all that it says; ``tests/repository/test_known_names.py`` fails where it is not what they say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

__all__ = ["DTYPE_NAMES", "METHOD_OPTIONS", "MODEL_NAMES", "PRESET_NAMES"]

DTYPE_NAMES = ("float32", "bfloat16", "float16")
"""The dtypes that the weights of a base can be held in."""

_LISTED = json.loads((Path(__file__).parent / "known_names.json").read_text(encoding="utf-8"))

METHOD_OPTIONS: Mapping[str, Mapping[str, str]] = _LISTED["methods"]
"""Method -> its own options -> their help texts; the options that all methods have are AdapterConfig's."""

PRESET_NAMES: tuple[str, ...] = tuple(_LISTED["presets"])
"""Other names that a method can be picked by."""

MODEL_NAMES: tuple[str, ...] = tuple(_LISTED["models"])
"""The models that ``kilotune plan`` has built in."""
