"""Base models that are no folder yet: by a short name out of a package, or in a GGUF file. Needs no torch to import.

packaged.py lists the names and fetches, gguf_files.py writes folders, cache.py keeps them whole. Imports errors.py and
whole_file.py only. Begin in located.py, which everything calls that loads a base.
"""

from __future__ import annotations

from .cache import cache_folder
from .located import GGUF_SUFFIX, located
from .packaged import PACKAGED, Packaged, fetch

__all__ = ["GGUF_SUFFIX", "PACKAGED", "Packaged", "cache_folder", "fetch", "located"]
