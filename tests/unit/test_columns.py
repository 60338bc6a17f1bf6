"""Tables: rows come back as they were, whole, in part and in any order."""

from __future__ import annotations

import mmap
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from vswin_dist import columns, parquet
from vswin_dist.columns import Builder, Int32, Table, Texts, UInt32, block_of


@dataclass(frozen=True)
class Row:
    name: str
    number: Int32
    check: UInt32
    size: int
    rate: float


ROWS = [Row("é" * (n % 5) + f"{n}", n - 50, 2**32 - 1 - n, n << 40, n / 3) for n in range(100)]


@pytest.fixture(params=["one block", "many blocks, in files"])
def table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Table[Row]:
    if request.param != "one block":
        monkeypatch.setattr(columns, "BLOCK", 7)
        monkeypatch.setattr(columns, "IN_MEMORY", 64)
    return Table.of(Row, iter(ROWS))


def test_rows_come_back(table: Table[Row], tmp_path: Path) -> None:
    assert list(table) == ROWS and table == Table.of(Row, ROWS) and table != Table.of(Row, ROWS[1:])
    assert [table[i] for i in (0, 7, -1)] == [ROWS[0], ROWS[7], ROWS[-1]]
    assert (table.row(9).name, table.row(9).check, table.value("size", -1)) == (ROWS[9].name, ROWS[9].check, 99 << 40)
    with pytest.raises(IndexError):
        table[100]
    assert table.column("name").tolist() == [r.name for r in ROWS]
    assert table.numbers("number").dtype == np.int32 and table.numbers("check").dtype == np.uint32
    parquet.write(table, tmp_path / "t.parquet")
    assert parquet.read(tmp_path / "t.parquet", Row) == table
    assert [Row(**r) for r in pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pylist()] == ROWS


@pytest.mark.parametrize("part", [slice(3, 20), slice(None, None, 9), slice(90, None), np.array([5, 5, 99, 0])])
def test_parts_of_parts(table: Table[Row], part: slice | np.ndarray) -> None:
    expected = [ROWS[i] for i in part.tolist()] if isinstance(part, np.ndarray) else ROWS[part]
    found = table[part]
    assert list(found) == expected == list(pickle.loads(pickle.dumps(found)))
    assert found[1:][0] == expected[1] and found.column("name").tolist() == [r.name for r in expected]
    assert found.value("rate", 1) == expected[1].rate


def test_an_empty_table(tmp_path: Path) -> None:
    empty = Table.of(Row, [])
    parquet.write(empty, tmp_path / "t.parquet")
    assert list(empty) == [] == list(parquet.read(tmp_path / "t.parquet", Row)) and not len(Texts.of([]))


def test_what_a_column_cannot_hold_is_refused(tmp_path: Path) -> None:
    lists = {name: [getattr(r, name) for r in ROWS[:2]] for name in Row.__dataclass_fields__}
    for change in ({"number": [0, 2**31]}, {"check": [0, -1]}, {"name": ["a", 3]}, {"rate": [None, 1.0]}):
        with pytest.raises(ValueError, match=f"column {next(iter(change))}: "):
            block_of(Row, lists | change)
    with pytest.raises(ValueError, match="differ in length"):
        Builder(Row).add(block_of(Row, lists | {"size": [1]}))
    for arrays, message in (
        ({"name": ["a"]}, "column number is missing"),
        ({n: ["x"] for n in lists}, "x"),
        ({n: [None] for n in lists}, "values are missing"),
    ):
        pyarrow.parquet.write_table(pyarrow.table(arrays), tmp_path / "t.parquet")
        with pytest.raises(ValueError, match=message):
            parquet.read(tmp_path / "t.parquet", Row)


def test_files_are_written_and_read_without_pandas(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from vswin_dist import parquet; from vswin_dist.columns import Table; "
        "from vswin_dist.manifest import Reject; path = Path(sys.argv[1]); "
        "parquet.write(Table.of(Reject, [Reject('a', 'b', 'c', 'd')]), path); "
        "assert parquet.read(path, Reject)[0].detail == 'd'; print('pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "t")], capture_output=True, text=True)
    assert done.stdout == "False\n", f"to import it takes longer than to open a million samples\n{done.stderr}"


def test_columns_of_other_kinds_as_another_tool_writes_them(table: Table[Row], tmp_path: Path) -> None:
    other = pyarrow.table(
        {
            "name": pyarrow.array([r.name for r in ROWS], pyarrow.large_string()),
            "number": pyarrow.array([r.number for r in ROWS], pyarrow.int64()),
            "check": [r.check for r in ROWS],
            "size": [r.size for r in ROWS],
            "rate": [r.rate for r in ROWS],
        }
    )
    pyarrow.parquet.write_table(other, tmp_path / "t.parquet", row_group_size=30)
    assert parquet.read(tmp_path / "t.parquet", Row) == table


def test_a_pass_over_a_table_in_files_keeps_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "IN_MEMORY", 64)
    monkeypatch.setattr(columns, "BLOCK", 1 << 12)
    builder = Builder(Row)
    count = 1 << 16
    numbers = {name: np.arange(count).astype(kind) for name, kind in builder.kinds.items() if kind is not None}
    builder.add({"name": Texts(np.arange(1, count + 1) * 400, np.full(400 * count, 97, np.uint8)), **numbers})
    large = builder.table()

    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE

    before, most, total = mapped(), 0, 0
    for block in large.blocks():
        total += int(block["name"].data.sum()) + int(block["size"].sum())
        most = max(most, mapped() - before)
    assert total == 400 * count * 97 + count * (count - 1) // 2
    assert most < 8_000_000 and mapped() - before < 4_000_000, "of 27 MB"
    assert large.value("name", count - 1) == "a" * 400
