"""Base models that are no folder yet: by a short name out of a package, or in a GGUF file. Needs no torch to import.

packaged.py lists the names and fetches, wheels.py takes files out of a pinned package (other data than models, too),
gguf_files.py writes folders, cache.py keeps them whole. Imports errors.py and whole_file.py only. Begin in located.py,
which everything calls that loads a base.
"""

from __future__ import annotations

from .cache import cache_folder, made
from .located import GGUF_SUFFIX, located
from .packaged import PACKAGED, Packaged, fetch
from .wheels import Wheel, extract, opened

__all__ = [
    "GGUF_SUFFIX",
    "PACKAGED",
    "Packaged",
    "Wheel",
    "cache_folder",
    "extract",
    "fetch",
    "located",
    "made",
    "opened",
]
