"""Files in: every format gives the same rows, and what is broken is named by file and line."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from kilotune.errors import ConfigError
from kilotune.train.data import readers
from kilotune.train.data.readers import read
from tests.support.train_data import jsonl

ROWS = [
    {"text": "one, two", "label": "a"},
    {"text": 'say "three"\nand four', "label": "b"},
    {"text": "ünï — ✓", "label": "a"},
]


def rows_of(table: Any) -> list[dict[str, Any]]:
    return [{name: table.rows[i][name] for name in table.columns} for i in range(len(table))]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], separator: str = ",", encoding: str = "utf-8") -> str:
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return str(path)


def write_all(folder: Path) -> dict[str, str]:
    """The rows in every format."""
    whole = folder / "list.json"
    whole.write_text(json.dumps(ROWS))
    nested = folder / "nested.json"
    nested.write_text(json.dumps({"version": 1, "data": ROWS}, indent=1))
    lines = folder / "lines.json"
    lines.write_text("\n".join(map(json.dumps, ROWS)))
    packed = folder / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    marked = folder / "bom.jsonl"
    marked.write_text("\n\n".join(map(json.dumps, ROWS)), encoding="utf-8-sig")
    return {
        "jsonl": jsonl(folder / "rows.jsonl", ROWS),
        "jsonl with a mark and empty lines": str(marked),
        "jsonl.gz": str(packed),
        "a list": str(whole),
        "a list in an object": str(nested),
        "lines named .json": str(lines),
        "csv": write_csv(folder / "rows.csv", ROWS),
        "csv with a mark": write_csv(folder / "mark.csv", ROWS, encoding="utf-8-sig"),
        "tsv": write_csv(folder / "rows.tsv", ROWS, "\t"),
        "csv with semicolons": write_csv(folder / "semi.csv", ROWS, ";"),
        "parquet": write_parquet(folder / "rows.parquet", ROWS),
    }


def test_all_formats_give_the_same_rows(tmp_path: Path) -> None:
    for name, path in write_all(tmp_path).items():
        table = read(path)
        assert rows_of(table) == ROWS, name
        assert table.columns == ("text", "label"), name
        assert list(table.values("label")) == ["a", "b", "a"], name


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("jsonl", [":1", ":2", ":3"]),
        ("jsonl with a mark and empty lines", [":1", ":3", ":5"]),
        ("csv", [":2", ":3", ":5"]),  # the second row has a line break in it
        ("a list", [" item 1", " item 2", " item 3"]),
        ("parquet", [" row 1", " row 2", " row 3"]),
    ],
)
def test_each_row_knows_its_place(tmp_path: Path, name: str, places: list[str]) -> None:
    path = write_all(tmp_path)[name]
    table = read(path)
    assert [table.places[i] for i in range(3)] == [path + place for place in places]
    assert [table.take([2, 0]).places[i] for i in range(2)] == [path + places[2], path + places[0]]
    assert rows_of(table.take([2, 0])) == [ROWS[2], ROWS[0]]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_several_files_are_one_after_the_other(tmp_path: Path, kind: str) -> None:
    write = {"jsonl": jsonl, "parquet": write_parquet}[kind]
    first, second = (write(tmp_path / f"{i}.{kind}", rows) for i, rows in enumerate((ROWS[:2], ROWS[2:])))
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README.md").write_text("what this is")
    for source in ([first, second], str(tmp_path)):
        table = read(source)
        assert rows_of(table) == ROWS
        assert table.places[2] == f"{second}{':' if kind == 'jsonl' else ' row '}1"
        assert rows_of(table.take([1, 2])) == ROWS[1:]


def test_a_format_that_is_named_is_taken_whatever_the_file_is_called(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.txt", ROWS)
    assert rows_of(read(path, kind="jsonl")) == ROWS
    with pytest.raises(ConfigError, match=r"rows.txt: its name does not say what it is .*\.jsonl.*; set data.format"):
        read(path)


# -- broken files --------------------------------------------------------------------------------------


def fault(source: Any, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(source, **more)
    return str(caught.value)


def test_broken_lines_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        b'{"text": "fine"}\n{"text": "cut\n[1, 2]\n\n{"text": "fine"}\n"text"\n{"text": "\xff"}\n{"a": NaN}}\n'
    )
    text = fault(str(path))
    lines = text.splitlines()
    assert lines[0] == "data.train cannot be read:"
    assert lines[1].startswith(f"  - {path}:2: no valid JSON: Unterminated string starting at column 10")
    assert lines[2] == f"  - {path}:3: expected an object {{...}}, got a list"
    assert lines[3] == f"  - {path}:6: expected an object {{...}}, got text"
    assert lines[4] == f"  - {path}:7: no UTF-8: byte 0xff at position 10"
    assert lines[5].startswith(f"  - {path}:8: no valid JSON: Extra data")
    assert len(lines) == 6


def test_the_faults_of_several_files_come_together(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.csv"
    first.write_text("{\n")
    second.write_text("x,y\n1\n1,2\n1,2,3\n")
    text = fault([str(first), str(second), str(tmp_path / "c.csv")], name="data.test")
    assert re.findall(r"- (.*?:\d+|.*c.csv): ", text) == [
        f"{first}:1",
        f"{second}:2",
        f"{second}:4",
        str(tmp_path / "c.csv"),
    ]
    assert "expected 2 fields, as in the header, got 1" in text
    assert text.startswith("data.test cannot be read:")


def test_a_file_of_garbage_is_given_up_after_some_lines(tmp_path: Path) -> None:
    path = tmp_path / "noise.jsonl"
    path.write_bytes(b"\x80\n" * 10_000)
    text = fault(str(path))
    assert len(text.splitlines()) == 1 + readers.MAX_FAULTS
    assert text.endswith("the rest of the file was not read")


def test_deep_nesting_is_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text("[" * 200_000 + "\n")
    assert f"{path}:1: no valid JSON" in fault(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "list.jsonl",
            '[{"a": 1}]',
            "list.jsonl:1: expected an object .*; the file is a JSON list: set data.format to json",
        ),
        ("many.jsonl", '[\n{"a": 1}\n]', "many.jsonl:1: .*; the file is a JSON list: set data.format to json"),
        ("cut.json", '[{"a": 1},\n{"a": ', "cut.json:2: no valid JSON: Expecting value at column 7"),
        (
            "one.json",
            '{"a": 1}',
            "one.json: expected a list of objects, or an object with one list in it, got an object",
        ),
        ("mixed.json", '[{"a": 1}, 2]', "mixed.json item 2: expected an object {...}, got a number"),
        ("bytes.json", b'[\n\n"\xff"]', "bytes.json:3: no UTF-8"),
        ("bytes.csv", b"a,b\n1,2\n\xff,3\n", "bytes.csv:3: no UTF-8"),
        ("twice.csv", "a,b,a\n1,2,3\n", "twice.csv:1: the header has the column 'a' twice"),
        ("quote.csv", 'a,b\n1,2\n1,"2\n', "quote.csv:3: unexpected end of data"),
        ("noise.parquet", "PAR1", "noise.parquet: no Parquet file that can be read"),
        (
            "cut.jsonl.gz",
            gzip.compress(b"{}\n" * 999, mtime=0)[:-9],
            "cut.jsonl.gz: cannot be read: Compressed file ended",
        ),
        ("none.jsonl.gz", b"{}\n", "none.jsonl.gz: cannot be read: Not a gzipped file"),
    ],
)
def test_broken_files_are_one_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    text = fault(str(path))
    assert re.search(message.replace("{...}", r"\{\.\.\.\}"), text), text
    assert len(text.splitlines()) == 2


def test_lines_where_a_list_is_expected_name_the_other_format(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.json", ROWS)
    assert re.search(
        r"rows.json:2: .*Extra data.*; for one object per line, set data.format to jsonl", fault(path, kind="json")
    )


def test_long_fields_of_csv_are_read_and_the_module_is_left_as_it_was(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    rows = [{"text": "x" * 300_000, "label": "a"}]
    assert rows_of(read(write_csv(tmp_path / "long.csv", rows))) == rows
    assert csv.field_size_limit() == limit


def test_what_is_not_there_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path / "train.jsonl", ROWS)
    text = fault(str(tmp_path / "tran.jsonl"))
    assert "tran.jsonl: there is no such file or folder. Did you mean 'train.jsonl'?" in text
    assert "no folder" in fault(str(tmp_path / "nowhere" / "train.jsonl"))
    monkeypatch.chdir(tmp_path)
    assert "there is no such file, and no folder owner. For a data set of the hub, write hub:owner/name." in fault(
        "owner/name"
    )


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="a file that fails to be read")
def test_a_file_that_fails_while_it_is_read() -> None:
    assert "/proc/self/mem: cannot be read: [Errno 5]" in fault("/proc/self/mem", kind="jsonl")


def test_folders_of_mixed_files_and_sources_of_two_kinds_are_refused(tmp_path: Path) -> None:
    paths = write_all(tmp_path)
    assert re.search(r"a folder of files of one format.*found csv, json, jsonl, parquet", fault(str(tmp_path)))
    assert "these are of several formats" in fault([paths["jsonl"], paths["parquet"]])


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows.csv"):
        (tmp_path / name).write_text("")
        assert len(read(str(tmp_path / name))) == 0


# -- Parquet and the hub -------------------------------------------------------------------------------


def test_class_names_and_pictures_of_data_sets_are_known(tmp_path: Path) -> None:
    import datasets
    from PIL import Image

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"]), "n": datasets.Value("int64")}
    )
    pictures = [Image.new("RGB", (3, 2), color) for color in ("red", "blue")]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [1, 0], "n": [5, 6]}, features=features)
    path = tmp_path / "pictures.parquet"
    rows.to_parquet(path)
    table = read(str(path))
    assert dict(table.classes) == {"label": ("cat", "dog")}
    assert set(table.rows[0]["image"]) == {"bytes", "path"}  # not decoded before it is wanted
    assert list(table.values("n")) == [5, 6]


def hub_cache(home: Path, name: str, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A data set in huggingface_hub's cache, laid out as a download leaves it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = home / "hub" / f"datasets--{name.replace('/', '--')}"
    data = root / "snapshots" / commit / "data"
    data.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    for split, rows in splits.items():
        write_parquet(data / f"{split}-00000-of-00001.parquet", rows)


@pytest.fixture
def hub_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of the hub's libraries, which read their places once, at import."""
    import datasets.config
    import huggingface_hub.constants

    home = tmp_path / "home"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    return home


def test_a_data_set_of_the_hub_is_read_from_its_cache(hub_home: Path) -> None:
    hub_cache(hub_home, "someone/notes", {"train": ROWS[:2], "test": ROWS[2:]})
    assert rows_of(read("hub:someone/notes")) == ROWS[:2]
    table = read("hub:someone/notes", split="test")
    assert rows_of(table) == ROWS[2:]
    assert table.places[0] == "hub:someone/notes test row 1"
    text = fault("hub:someone/notes", split="tset")
    assert "hub:someone/notes has no split 'tset'. Did you mean 'test'? It has: train, test" in text
    assert "hub:someone/notes: BuilderConfig 'german' not found" in fault("hub:someone/notes", subset="german")


def test_a_data_set_that_cannot_be_reached_says_what_to_do(hub_home: Path) -> None:
    text = fault("hub:someone/nothing")
    assert "hub:someone/nothing cannot be reached" in text
    assert "not in the local cache" in text
    assert "HF_HOME" in text
    assert len(text.splitlines()) == 2


def test_a_folder_laid_out_like_the_hub_s_is_read_by_the_same_name(tmp_path: Path, hub_home: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    jsonl(folder / "train.jsonl", ROWS)
    assert rows_of(read(f"hub:{folder}")) == ROWS
