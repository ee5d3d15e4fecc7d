"""How much of an adapter's change 16-bit weights round away when it is merged.

One linear layer (1024, 1024), weights N(0, 1/in), VeRA r 256 scaled to a change of the given size relative to W
(Frobenius norms). ``lost`` is the norm of what rounding took over the norm of the change, as
``MergePrecisionWarning`` measures it.
"""

from __future__ import annotations

import torch
from torch import nn

from kilotune import VeraConfig, get_peft_model

SIZES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def lost(dtype: torch.dtype, size: float) -> float:
    """The part of the change lost at ``size`` = |change| / |W|."""
    torch.manual_seed(0)
    layer = nn.Linear(1024, 1024, bias=False)
    nn.init.normal_(layer.weight, std=1024**-0.5)
    model = get_peft_model(nn.Sequential(layer).to(dtype), VeraConfig(target_modules=["0"]))
    wrapped = model.adapted_layers()["0"]
    parameters = dict(model.adapter_parameters())
    nn.init.normal_(parameters["0.vera_lambda_b"])
    base = wrapped.base_matrix().float()
    change = wrapped.merged_with(["default"]).weight
    assert change is not None
    now = float((change.float() - base).norm() / base.norm())
    with torch.no_grad():
        parameters["0.vera_lambda_b"].mul_(size / now)
    return wrapped.merged_with(["default"]).lost


def main() -> None:
    print("| change / weight | " + " | ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES) + " |")
    print("|---|" + "---|" * len(DTYPES))
    for size in SIZES:
        print(f"| {size:g} | " + " | ".join(f"{lost(dtype, size):.2%}" for dtype in DTYPES) + " |")


if __name__ == "__main__":
    main()
