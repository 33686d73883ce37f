"""Files that are whole or not there: the order on disk, what a failure leaves, what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from iobs_onnx.passes import replacing
from iobs_onnx.passes.files.atomic import replacing_all


def test_a_file_takes_its_place_at_the_end(tmp_path: Path) -> None:
    place = tmp_path / "a.json"
    place.write_text("old")
    with replacing(place) as beside:
        beside.write_text("new")
        assert place.read_text() == "old"
    assert place.read_text() == "new"
    assert list(tmp_path.iterdir()) == [place]


def test_a_relative_path_and_a_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with replacing("a.json") as beside:
        beside.write_text("new")
    assert Path("a.json").read_text() == "new"


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    place = tmp_path / "a.json"
    place.write_text("old")

    def fail() -> None:
        with replacing(place) as beside:
            beside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert place.read_text() == "old"
    assert list(tmp_path.iterdir()) == [place]


def test_all_reach_the_disk_before_the_first_is_renamed_and_then_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []

    def name(handle: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{handle}")).name

    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        events.append(("flush", name(handle)))
        fsync(handle)

    def noted_replace(source: Any, target: Any) -> None:
        events.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    places = [tmp_path / name for name in ("data", "masks", "model")]
    (tmp_path / "masks").write_text("of an older model")
    with replacing_all(places) as folder:
        for file in ("model", "data", "scratch"):
            (folder / file).write_text("new")
    assert events == [
        ("flush", "data"),
        ("flush", "model"),
        ("rename", "data"),
        ("rename", "model"),
        ("flush", tmp_path.name),
    ]
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert left == {"data": "new", "model": "new", "masks": "of an older model"}


def test_a_folder_that_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def of_files_only(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(22, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", of_files_only)
    with replacing(tmp_path / "a.json") as beside:
        beside.write_text("new")
    assert (tmp_path / "a.json").read_text() == "new"


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "none" / "a.json"):
        pass
