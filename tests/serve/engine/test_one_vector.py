"""Adapters of every method, those of one vector for the whole model too, served beside others in one batch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from kilotune import PeftModel, get_config, get_peft_model
from kilotune.errors import ConfigError
from kilotune.fleet.bank.adapter_bank import Resident
from kilotune.methods import METHODS, Shared
from kilotune.serve.engine.interface import AdapterKey
from kilotune.serve.engine.tenant_adapters import AdapterRegistry
from tests.support.models import randomize
from tests.support.serve_support import Served, adapter_of, alone, answers, base_model, greedy, prompt_of

UNI = get_config("unilora", r=2, theta_d_length=64, target_modules=["q_proj", "down_proj"])
# Every method that is listed, as its class says, and Uni-LoRA with more numbers.
CONFIGS = {
    **{
        name: get_config(name, **{**method.example, "target_modules": ["q_proj", "down_proj"]})
        for name, method in METHODS.items()
    },
    "unilora": UNI,
}


def vector(seed: int, name: str = "unilora") -> PeftModel:
    model = get_peft_model(copy.deepcopy(base_model()), CONFIGS[name])
    randomize(model, seed=seed, scale=0.3)
    return model.eval()


def mixed(served: Served, name: str) -> None:
    """Users of a method, of VeRA, of LoRA and of the base answer at once as alone."""
    own = [vector(seed, name) for seed in range(3)] + [adapter_of(base_model(), 5), adapter_of(base_model(), 6, "lora")]
    keys = [AdapterKey.of("t", served.registry.put("t", f"m{i}", model)) for i, model in enumerate(own)]
    asked = [(prompt_of(i, 4 + i), greedy(6), key, "t") for i, key in enumerate([*keys, None, keys[0]])]
    models = [*own, base_model(), own[0]]
    found = [one.ids for one in answers(served.engine, asked)]
    assert found == [alone(model, prompt_of(i, 4 + i), 6) for i, model in enumerate(models)]
    assert not served.registry.residents._wholes, "one of them is in the model itself"


@pytest.mark.parametrize("name", CONFIGS)
def test_they_answer_beside_others_as_alone(name: str, tmp_path: Path) -> None:
    with Served(tmp_path, count=1) as served:
        mixed(served, name)


def test_anothers_vector_would_be_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the rows of a batch have the next user's vector."""

    def wrong(self: Resident, layer: object, which: int | None = None) -> Shared:
        values = self.values.roll(1, 0)
        return self.form.shared(values if which is None else values[which])

    monkeypatch.setattr(Resident, "shared", wrong)
    with Served(tmp_path, count=1) as served, pytest.raises(AssertionError):
        mixed(served, "unilora")


def test_the_bounds_of_a_form_count_the_vector(tmp_path: Path) -> None:
    vector(1).save_pretrained(tmp_path / "one")
    made = AdapterRegistry(f"sqlite:///{tmp_path}/a.db", copy.deepcopy(base_model()), slots=8, form_bytes=3 * 256)
    made.put("ann", "mine", tmp_path / "one")
    assert made.residents.room == 3 + made.residents.whole
    made.close()
    made = AdapterRegistry(f"sqlite:///{tmp_path}/a.db", copy.deepcopy(base_model()), form_bytes=255)
    with pytest.raises(ConfigError, match="form_bytes"):
        made.put("ann", "other", tmp_path / "one")
    made.close()


def test_norms_are_bounded_for_the_vector_too(tmp_path: Path) -> None:
    model = vector(1)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.mul_(1e6)
    made = AdapterRegistry(f"sqlite:///{tmp_path}/a.db", copy.deepcopy(base_model()), max_norm=100.0)
    with pytest.raises(Exception, match=r"norms above the bound of 100:\s+.*unilora_theta_d"):
        made.put("ann", "mine", model)
    made.close()
