"""What a method says of each key of its file is what the adapter trains, keeps frozen, or shares."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from kilotune.adapter_files.reading import open_adapter
from kilotune.methods import Kept
from tests.conformance.cells import Cell
from tests.conformance.checks import adapted, layers_of
from tests.conformance.declared import every_cell


@every_cell("kept in files")
def test_the_numbers_of_a_file_are_those_of_the_model(cell: Cell, tmp_path: Path) -> None:
    model = adapted(cell)
    model.save_pretrained(tmp_path)
    file = open_adapter(tmp_path)
    found = Counter[Kept]()
    for key, said in file.said.items():
        found[said.kept or Kept.TRAINED] += file.files.tensors[key].numel()
    installed = model.installed("default")
    trained = sum(p.numel() for _, p in model.adapter_parameters())
    written = installed.method.frozen
    frozen = sum(slot.own()[key].numel() for slot in installed.slots().values() for key in written)
    assert (found[Kept.TRAINED], found[Kept.FROZEN]) == (trained, frozen)
    others = {key for key, said in file.said.items() if said.kept is None}
    assert all(key.endswith("bias") for key in others)
    layers = {said.layer for said in file.said.values()} - {""}
    assert len(layers) in (0, len(layers_of(model)))  # none, where all of it is of the whole model
