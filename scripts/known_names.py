"""Write src/kilotune/known_names.json: names and help texts that the command line shows without importing torch.

python scripts/known_names.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kilotune import METHODS, AdapterConfig
from kilotune.cli.plan import models
from kilotune.methods import PRESETS

FILE = Path(__file__).parent.parent / "src" / "kilotune" / "known_names.json"


def own_options(config: type[AdapterConfig]) -> dict[str, str]:
    """The options that a method has beside those of all methods, with their help texts."""
    common = AdapterConfig.option_names()
    return {name: config.help_of(name) for name in config.option_names() if name not in common}


def text() -> str:
    """The whole file."""
    listed: dict[str, Any] = {
        "methods": {name: own_options(method.config_cls) for name, method in METHODS.items()},
        "configs": {name: method.config_cls.__name__ for name, method in METHODS.items()},
        "presets": {name: method for name, (method, _) in PRESETS.items()},
        "models": list(models()),
    }
    return json.dumps(listed, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(f"wrote {FILE}")
