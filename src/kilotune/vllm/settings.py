"""What ``additional_config={"kilotune": {...}}`` says, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, final

from ..errors import ConfigError, did_you_mean, gather
from ..projections.matrices import SEED_LIMIT

__all__ = ["KEY", "LINEAR", "STORE", "Settings"]

KEY = "kilotune"  # in additional_config
STORE = "KILOTUNE_VLLM_STORE"  # the environment variable with the store's URL, for one that has a password in it
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


ONE_SHARED = (
    "one shared adapter a process: it is merged into the base's weights, which all requests run; start a process for "
    "each, and send each request to that of its shared adapter"
)


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an engine can serve, and from where.

    rank: of the largest adapter; smaller ones are served too. seed: of the frozen matrices (``projection_prng_key``).
    targets: the last names of the layers that adapters may change. store: the URL of the store, or None where the
    environment variable KILOTUNE_VLLM_STORE has it. namespace: whose adapters; None: of all, and a request names one as
    ``namespace/name``. alias: the version meant where a request names none, the newest by default. pattern: what a
    name must look like. require_base: refuse adapters of which it is not known what base they were trained on.
    max_abs: the largest value that a number of an adapter may have. max_adapters: how many different adapters one
    engine takes in before it refuses more. spill: the folder for a worker's own copies of rows, the system's temporary
    one by default. on: the shared adapter that is merged into the engine's model, as NAME/3 (merged_base.py), or None.
    """

    rank: int
    seed: int = 0
    targets: tuple[str, ...] = LINEAR
    store: str | None = None
    namespace: str | None = "default"
    alias: str | None = None
    pattern: str = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
    require_base: bool = True
    max_abs: float = 1e3
    max_adapters: int = 20_000
    spill: str | None = None
    on: str | None = None

    @classmethod
    def of(cls, values: object) -> Settings:
        """From the JSON object.

        Raises:
            ConfigError: all that is wrong with it.

        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"additional_config[{KEY!r}]: expected an object, got {values!r:.200}")
        names = [field.name for field in fields(cls)]
        faults = [f"unknown: {key!r}.{did_you_mean(str(key), names)}" for key in values if key not in names]
        if "rank" not in values:
            faults.append("rank: is missing; give the rank of the largest adapter")
        known = {key: values[key] for key in values if key in names}
        if isinstance(known.get("targets"), list):
            known["targets"] = tuple(known["targets"])
        made = cls(**{"rank": 1, **known})
        faults += made._faults()
        if faults:
            raise ConfigError(gather(f"additional_config[{KEY!r}]:", faults))
        return made

    def _faults(self) -> list[str]:
        found = [
            f"{name}: expected a whole number from 1, got {value!r}"
            for name, value in (("rank", self.rank), ("max_adapters", self.max_adapters))
            if type(value) is not int or value < 1
        ]
        if type(self.seed) is not int or not 0 <= self.seed < SEED_LIMIT:
            found.append(f"seed: expected a whole number in 0 ... 2**64 - 1, got {self.seed!r}")
        if not isinstance(self.targets, tuple) or not self.targets or not all(_is_word(t) for t in self.targets):
            found.append(
                f"targets: expected a list of the last names of layers, such as 'q_proj', got {self.targets!r}"
            )
        if isinstance(self.on, list | tuple):
            found.append(f"on: {ONE_SHARED}, got {list(self.on)!r}")
        elif self.on is not None and not (isinstance(self.on, str) and re.fullmatch(r"[^/]+/[0-9]{1,10}", self.on)):
            found.append(f"on: expected the shared adapter as NAME/3, with its version, got {self.on!r}")
        for name in ("store", "namespace", "alias", "spill"):
            if not isinstance(value := getattr(self, name), str | None) or value == "":
                found.append(f"{name}: expected a text or null, got {value!r}")
        try:
            re.compile(self.pattern)
        except (TypeError, re.error) as error:
            found.append(f"pattern: expected a regular expression, got {self.pattern!r}: {error}")
        if type(self.require_base) is not bool:
            found.append(f"require_base: expected true or false, got {self.require_base!r}")
        if isinstance(self.max_abs, bool) or not isinstance(self.max_abs, int | float) or not self.max_abs > 0:
            found.append(f"max_abs: expected a number above 0, got {self.max_abs!r}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the reverse of :meth:`of`."""
        return {**asdict(self), "targets": list(self.targets)}


def _is_word(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\w+", value) is not None
