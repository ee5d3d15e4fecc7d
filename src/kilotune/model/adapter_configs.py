"""What ``model.peft_config`` gives: the configurations of a model's adapters, for reading."""

from __future__ import annotations

from typing import Any, Never, final

from ..config import AdapterConfig
from ..errors import AdapterError

__all__ = ["Configs"]


@final
class Configs(dict[str, AdapterConfig]):
    """Configurations by adapter; a change of this dict would change no adapter, so it is refused.

    In PEFT the dict is the model's own, and an entry in it is an adapter half-made.
    """

    def _refuse(self, *_: Any, **__: Any) -> Never:
        raise AdapterError(
            "model.peft_config is for reading: a config belongs to an adapter that is in the model. To add one: "
            "add_adapter(name, config) or load_adapter(); to take one out: delete_adapter(name); to change one: add it "
            "again under another name"
        )

    __setitem__ = __delitem__ = __ior__ = _refuse
    pop = popitem = clear = update = setdefault = _refuse

    def __reduce__(self) -> tuple[type[dict[str, AdapterConfig]], tuple[dict[str, AdapterConfig]]]:
        return dict, (dict(self),)  # a copy is anybody's
