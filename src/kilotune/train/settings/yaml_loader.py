"""YAML as people write it: ``1e-3`` is a number, and a key that stands twice is an error."""

from __future__ import annotations

import functools
import re
from typing import Any

__all__ = ["loader_class"]

# YAML 1.1, which PyYAML reads, wants a point and a sign: 1.0e-3. YAML 1.2 and everybody else do not.
FLOAT = re.compile(r"[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+")


@functools.cache
def loader_class(yaml: Any) -> Any:
    """The loader's class; ``yaml`` is the package."""

    def mapping(loader: Any, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = loader.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                raise yaml.constructor.ConstructorError(None, None, "a key has to be a plain word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        values: dict[Any, Any] = yaml.SafeLoader.construct_mapping(loader, node, deep=True)
        return values

    made: Any = type("Loader", (yaml.SafeLoader,), {})
    made.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
    made.add_constructor("tag:yaml.org,2002:map", mapping)
    return made
