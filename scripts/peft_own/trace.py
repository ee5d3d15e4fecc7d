"""What a test does on PEFT itself: the configs that it makes. Only for making the lists (``rule.py`` judges it)."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from .rule import Made, options_set


class Trace:
    """Notes each config that is made, until it is cleared."""

    def __init__(self) -> None:
        self.made: list[Made] = []

    def watch(self, cls: type) -> None:
        """Note the configs of a class; those of its subclasses are noted by these."""
        init: Any = cls.__dict__.get("__init__")
        if init is None or hasattr(init, "_noted"):
            return
        signature = inspect.signature(init)

        @functools.wraps(init)
        def noting(this: Any, *args: Any, **kwargs: Any) -> None:
            if type(this) is cls:
                try:
                    arguments = signature.bind(this, *args, **kwargs).arguments
                except TypeError:
                    arguments = dict(kwargs)
                self.made.append(Made(cls.__name__, options_set(cls, arguments)))
            init(this, *args, **kwargs)

        noting._noted = True  # type: ignore[attr-defined]
        cls.__init__ = noting  # type: ignore[misc]

    def watch_all(self) -> None:
        """Note the configs of all classes that PEFT has by now."""
        from peft.config import PeftConfigMixin

        todo: list[type[Any]] = [PeftConfigMixin]
        while todo:
            cls = todo.pop()
            self.watch(cls)
            below: list[type[Any]] = cls.__subclasses__()
            todo += [one for one in below if one.__module__.startswith("peft.")]

    def taken(self) -> tuple[Made, ...]:
        """What was noted since the last time, each once."""
        made, self.made = self.made, []
        return tuple({(one.name, tuple(one.options.items())): one for one in made}.values())
