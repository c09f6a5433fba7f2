"""Room on the disk: reserved first, and every sign of a full one is one error."""

from __future__ import annotations

import os
from pathlib import Path

import duckdb
import numpy as np
import pytest
from disk_case import largest_file

from evalkit.errors import DiskFull, JudgeSetupError
from evalkit.store.connection import damaged
from evalkit.util import disk
from evalkit.util.disk import disk_guard, is_full, mapped_array, size_text


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError("4096 requested and 512 written"),
        duckdb.IOException('IO Error: Could not write file "r.duckdb": No space left on device'),
    ],
)
def test_every_library_s_way_to_say_it_is_one_error(error: Exception, tmp_path: Path) -> None:
    words = r"(No space left on device|Disk quota exceeded): 7 kB needed, .* free"
    with pytest.raises(DiskFull, match=words) as caught, disk_guard(tmp_path / "not" / "there", "7 kB needed"):
        raise error
    assert caught.value.where == str(tmp_path / "not" / "there")


def test_other_errors_pass(tmp_path: Path) -> None:
    for error in (ValueError("no"), PermissionError(13, "Permission denied"), JudgeSetupError("No space left on device")):
        assert not is_full(error)
        with pytest.raises(type(error)), disk_guard(tmp_path):
            raise error


def test_rebuild_is_not_advised_where_the_disk_is_full(tmp_path: Path) -> None:
    full = damaged(tmp_path / "r.duckdb", duckdb.IOException("IO Error: No space left on device"))
    assert isinstance(full, DiskFull) and "rebuild" not in full.what + full.fix
    assert "rebuild" in str(damaged(tmp_path / "r.duckdb", duckdb.IOException("IO Error: not a valid DuckDB file")))


def test_a_mapped_file_is_what_numpy_reads(tmp_path: Path) -> None:
    made = mapped_array((3, 4, 5), tmp_path / "x.npy")
    assert not made.any()
    made[:] = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    del made
    expected = tmp_path / "y.npy"
    np.save(expected, np.arange(60, dtype=np.float32).reshape(3, 4, 5))
    assert (tmp_path / "x.npy").read_bytes() == expected.read_bytes()
    mapped_array((0, 4), tmp_path / "z.npy")
    assert np.load(tmp_path / "z.npy").shape == mapped_array((0, 4)).shape == (0, 4)


def no_call(*_: object) -> None:
    raise OSError(95, "Operation not supported")


@pytest.fixture(params=["reserved by the system", "no such call", "not on this file system"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no such call":
        monkeypatch.delattr(os, "posix_fallocate")
    elif request.param == "not on this file system":
        monkeypatch.setattr(os, "posix_fallocate", no_call)
    return str(request.param)


def test_the_space_is_there_before_the_first_value_is_written(way: str, tmp_path: Path) -> None:
    mapped_array((1000, 1000), tmp_path / "x.npy")
    found = (tmp_path / "x.npy").stat()
    assert found.st_blocks * 512 >= found.st_size == 4_000_128


@pytest.mark.parametrize("named", [True, False])
def test_a_mapped_file_that_does_not_fit_is_an_error_and_no_signal(
    way: str, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.tempfile, "tempdir", str(tmp_path))
    said: list[str] = []
    with largest_file(1 << 20), pytest.raises(DiskFull, match="80.0 MB needed, .* free") as caught:
        mapped_array((20_000, 1000), tmp_path / "x.npy" if named else None, said.append)
    assert str(tmp_path) in caught.value.where
    assert said == [] if named else [f"a temporary file of 80.0 MB in {tmp_path} (TMPDIR chooses the place)"]


def test_more_than_there_is_is_refused_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", no_call)
    monkeypatch.setattr(os, "pwrite", None)  # nothing is written
    with pytest.raises(DiskFull, match="No space left on device: 4,000,000.0 GB needed"):
        mapped_array((10**9, 10**6), tmp_path / "x.npy")


@pytest.mark.parametrize(("size", "words"), [(900, "1 kB"), (12_345_678, "12.3 MB"), (3_500_000_000, "3.5 GB")])
def test_sizes_are_said_as_people_do(size: int, words: str) -> None:
    assert size_text(size) == words
