"""Four ways to go on with a QLoRA adapter, against the model that was trained.

The base is an MLP (64, 256, 256, 10) trained on half of scikit-learn's handwritten digits, upright. Its hidden
layers are then quantised to bitsandbytes' NF4 (double quantisation), and a LoRA of rank 4 learns the same digits
turned upside down. Told for the test half, turned, mean and spread of five seeds: accuracy, loss, how many predictions
are those of the trained model, and the relative distance of the logits from its logits.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kilotune import LoraConfig, MergePrecisionWarning, PeftModel, get_peft_model

SEEDS = range(5)
Data = tuple[Tensor, Tensor, Tensor, Tensor]


def digits(turned: bool) -> Data:
    """Train images (n, 64) and labels, test images and labels; every second one is for the test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16
    x = (x.flip(1, 2) if turned else x).reshape(-1, 64)
    y = torch.tensor(labels)
    return x[::2], y[::2], x[1::2], y[1::2]


def train(model: nn.Module, data: Data, steps: int, rate: float) -> None:
    """AdamW on batches of 64 of the train half."""
    x, y, _, _ = data
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.eval()


def quantised(base: nn.Sequential) -> nn.Sequential:
    """A copy whose hidden layers are NF4."""
    import bitsandbytes as bnb

    model = copy.deepcopy(base)
    for place in (0, 2):
        plain = base[place]
        layer = bnb.nn.LinearNF4(plain.in_features, plain.out_features)
        layer.load_state_dict(plain.state_dict())
        model[place] = layer.to("cpu")
    return model


def ways(base: nn.Sequential, trained: PeftModel, four_bit: Callable[[], nn.Sequential]) -> dict[str, nn.Module]:
    """The trained model, and what can be made of it."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", MergePrecisionWarning)
        trained.save_pretrained(folder)

        def again(model: nn.Module) -> PeftModel:
            return PeftModel.from_pretrained(model, folder)

        return {
            "4-bit base, adapter beside it (what was trained)": trained,
            "dense: merge_and_unload(dtype=float32)": again(four_bit()).merge_and_unload(dtype=torch.float32),
            "dense: merge_and_unload(dtype=bfloat16)": again(four_bit()).merge_and_unload(dtype=torch.bfloat16),
            "naive: into the original weights": again(copy.deepcopy(base)).merge_and_unload(),
            "requantised: merge_and_unload(requantize=True)": again(four_bit()).merge_and_unload(requantize=True),
        }


def run(seed: int) -> dict[str, tuple[float, float, float, float]]:
    """(accuracy, loss, same predictions, distance of the logits) by way."""
    torch.manual_seed(seed)
    upright, turned = digits(turned=False), digits(turned=True)
    base = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    train(base, upright, 500, 1e-3)
    model = get_peft_model(quantised(base), LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
    train(model, turned, 500, 2e-3)
    x, y = turned[2:]
    found, reference = {}, None
    for name, way in ways(base, model, lambda: quantised(base)).items():
        with torch.no_grad():
            logits = way.eval()(x.to(next(way.parameters()).dtype) if "bfloat16" in name else x).float()
        reference = logits if reference is None else reference
        found[name] = (
            float((logits.argmax(1) == y).float().mean()),
            float(F.cross_entropy(logits, y)),
            float((logits.argmax(1) == reference.argmax(1)).float().mean()),
            float((logits - reference).norm() / reference.norm()),
        )
    return found


def main() -> None:
    runs = [run(seed) for seed in SEEDS]
    print("| | accuracy | loss | same predictions | distance of the logits |")
    print("|---|---|---|---|---|")
    for name in runs[0]:
        values = torch.tensor([found[name] for found in runs])
        (a, b, c, d), (sa, sb, sc, sd) = values.mean(0).tolist(), values.std(0).tolist()
        print(f"| {name} | {a:.2%} ± {sa:.2%} | {b:.3f} ± {sb:.3f} | {c:.2%} ± {sc:.2%} | {d:.4f} ± {sd:.4f} |")


if __name__ == "__main__":
    main()
