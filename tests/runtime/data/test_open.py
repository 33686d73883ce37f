import itertools
import sys
import zipfile

import numpy as np
import pytest

from iobs_onnx.errors import DataError, OptionError
from iobs_onnx.runtime.data import feeds as feeds_module
from iobs_onnx.runtime.data.open import open_data
from iobs_onnx.runtime.session import InputSpec

F32 = np.dtype(np.float32)
X = (InputSpec("x", F32, (None, 3)),)
STATIC = (InputSpec("x", F32, (4, 3)),)


def rows(count):
    """Row i holds i, so that a sample can be told from its contents."""
    return {"x": np.repeat(np.arange(count, dtype=np.float32)[:, None], 3, axis=1)}


def feeds(count):
    return [{"x": np.full((2, 3), index, np.float32)} for index in range(count)]


def seen(batches):
    return [int(value) for feed in batches for value in feed["x"][:, 0]]


def split(source, inputs=X, **options):
    data = open_data(source, inputs, **options)
    calibration = seen(data.calibration)
    return data, calibration, seen(data.held_out)


class Reader:
    def __init__(self, items):
        self.items = iter(items)

    def get_next(self):
        return next(self.items, None)


# --- splitting rows


def test_a_tenth_is_held_out_by_seed_and_never_calibrated_on():
    data, calibration, held = split(rows(200), seed=1)
    assert (data.samples, data.held_out_samples, data.batches) == (180, 20, 12)
    assert sorted(calibration + held) == list(range(200))
    assert calibration == sorted(calibration)
    assert split(rows(200), seed=1)[2] == held
    assert split(rows(200), seed=2)[2] != held
    assert data.notes == []


@pytest.mark.parametrize(
    ("available", "options", "samples", "held"),
    [
        (1, {}, 1, 0),
        (2, {}, 1, 1),
        (9, {}, 8, 1),
        (1000, {}, 936, 64),
        (1000, {"holdout": 5}, 995, 5),
        (100, {"holdout": 0}, 100, 0),
        (100, {"samples": 30}, 30, 10),
        (100, {"samples": 95}, 95, 5),
        (100, {"samples": 100}, 90, 10),
    ],
)
def test_how_many(available, options, samples, held):
    data, calibration, out = split(rows(available), **options)
    assert (data.samples, data.held_out_samples) == (samples, held)
    assert (len(calibration), len(out)) == (samples, held)
    assert not set(calibration) & set(out)


def test_fewer_samples_than_asked_for_are_noted():
    data, calibration, _ = split(rows(20), samples=50)
    assert len(calibration) == 18
    (note,) = data.notes
    assert note == ("50 samples were asked for: 18 calibrate and 2 are held out; there are no more")


def test_batch_size():
    data = open_data(rows(50), X, batch_size=7, holdout=0)
    assert [len(feed["x"]) for feed in data.calibration] == [7] * 7 + [1]
    assert data.batches == 8
    assert [len(feed["x"]) for feed in open_data(rows(40), X, holdout=0).calibration] == [16, 16, 8]
    assert len(seen(data.calibration)) == 50, "rows can be read again"


def test_static_batch_size_of_the_model():
    data, calibration, held = split(rows(43), STATIC)
    assert (len(calibration), len(held)) == (36, 4)
    assert all(len(feed["x"]) == 4 for feed in (*data.calibration, *data.held_out))
    assert data.notes == ["3 samples were dropped: they do not fill a batch of 4"]
    assert split(rows(43), STATIC, batch_size=4)[1] == calibration
    assert len(split(rows(7), STATIC)[1]) == 4
    with pytest.raises(OptionError, match="batch size 8: the model is made for batches of 4"):
        open_data(rows(43), STATIC, batch_size=8)
    with pytest.raises(DataError, match="3 samples do not fill the model's batch of 4"):
        open_data(rows(3), STATIC)
    with pytest.raises(DataError, match="2 samples do not fill"):
        open_data(rows(43), STATIC, samples=2)
    with pytest.raises(DataError, match="a static first dimension of 0"):
        open_data(rows(3), (InputSpec("x", F32, (0, 3)),))
    two = (*STATIC, InputSpec("z", F32, (1, 3)))
    with pytest.raises(DataError, match=r"different static first dimensions \[1, 4\]"):
        open_data({**rows(4), "z": rows(4)["x"]}, two)


# --- other forms


def test_npz(tmp_path):
    np.savez(tmp_path / "data.npz", **rows(30))
    _, calibration, held = split(tmp_path / "data.npz")
    assert sorted(calibration + held) == list(range(30))


def test_directory_of_feeds(tmp_path):
    for index in range(12):
        shape = (1, 3) if index % 2 else (2, 3)
        np.savez(tmp_path / f"{index:02d}.npz", x=np.full(shape, index, np.float32))
    (tmp_path / "notes.txt").write_text("not a feed")
    data, calibration, held = split(str(tmp_path), seed=3)
    assert (data.samples, data.held_out_samples, data.batches) == (11, 1, 11)
    assert sorted(set(calibration + held)) == list(range(12))
    assert calibration == sorted(calibration)
    assert len(split(tmp_path, samples=4)[0].notes) == 0
    assert split(tmp_path, samples=4)[0].samples == 4
    assert split(tmp_path, seed=4)[2] != held
    assert split(tmp_path, samples=40)[0].notes


def test_stream_holds_out_every_tenth():
    data = open_data(iter(feeds(45)), X)
    assert (data.batches, data.samples) == (None, 0)
    calibration = [int(feed["x"][0, 0]) for feed in data.calibration]
    assert [int(feed["x"][0, 0]) for feed in data.held_out] == [1, 11, 21, 31, 41]
    assert (data.samples, data.held_out_samples) == (40, 5)
    assert len(calibration) == 40


def test_stream_keeps_nothing_but_what_is_held_out():
    data = open_data((feed for feed in feeds(2000)), X)
    assert sum(1 for _ in data.calibration) == 2000 - 64
    assert data.held_out_samples == 64


@pytest.mark.parametrize(
    ("count", "options", "samples", "held"),
    [(1, {}, 1, 0), (2, {}, 1, 1), (50, {"samples": 20}, 20, 3), (50, {"samples": 1}, 1, 1)],
)
def test_stream_counts(count, options, samples, held):
    data = open_data(Reader(feeds(count)), X, **options)
    assert len(list(data.calibration)) == samples == data.samples
    assert len(list(data.held_out)) == held == data.held_out_samples
    assert data.notes == []


def test_stream_reads_no_further_than_asked():
    source = iter(feeds(50))
    list(open_data(source, X, samples=5, holdout=0).calibration)
    assert next(source)["x"][0, 0] == 5


def test_short_stream_is_noted():
    data = open_data(feeds(5), X, samples=9)
    assert len(list(data.calibration)) == 4
    assert data.notes == [
        "9 samples were asked for: 4 calibrate and 1 are held out; there are no more"
    ]


def test_module_callable(tmp_path, monkeypatch):
    (tmp_path / "calib_forms.py").write_text(
        "import numpy as np\n"
        "class Deep:\n"
        "    @staticmethod\n"
        "    def feeds():\n"
        "        return ({'x': np.full((1, 3), i, np.float32)} for i in range(5))\n"
        "def arrays():\n"
        "    return {'x': np.zeros((8, 3), np.float32)}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert split("calib_forms:Deep.feeds")[1] == [0, 2, 3, 4]
    assert split("calib_forms:arrays")[0].samples == 7


def test_what_numpy_understands_is_an_array():
    import torch

    data = open_data([{"x": torch.ones(2, 3)}], X)
    (feed,) = data.calibration
    assert isinstance(feed["x"], np.ndarray)


# --- what does not fit the model


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({}, "input 'x' is missing"),
        ({**rows(2), "y": np.zeros(2)}, "'y' is not an input of the model, which takes x"),
        (
            {"x": np.zeros((2, 3))},
            r"input 'x' is float64, the model takes float32: convert it with .astype\('float32'\)",
        ),
        ({"x": np.zeros((2, 3), np.int64)}, "input 'x' is int64, the model takes float32"),
        ({"x": np.zeros((2, 3, 1), F32)}, r"'x' has shape \(2, 3, 1\), .* takes 2 dimensions"),
        ({"x": np.zeros((2, 4), F32)}, r"'x' has shape \(2, 4\), .* takes 3 along axis 1"),
        ({"x": np.full((2, 3), np.nan, F32)}, "input 'x' holds NaN or Inf"),
        ({"x": np.full((2, 3), np.inf, F32)}, "input 'x' holds NaN or Inf"),
        ({"x": np.zeros((0, 3), F32)}, r"input 'x' is empty: shape \(0, 3\)"),
        ({"x": [[1], [1, 2]]}, "input 'x' is not an array"),
    ],
)
def test_feed_that_does_not_fit(feed, message):
    with pytest.raises(DataError, match=f"calibration data: .*{message}"):
        open_data(feed, X)
    good = feeds(1)[0]
    data = open_data([good, good, feed], X)
    with pytest.raises(DataError, match=f"calibration data: feed 2: .*{message}"):
        list(data.calibration)


def test_static_first_dimension_of_a_ready_made_feed():
    data = open_data([rows(3)], STATIC)
    with pytest.raises(DataError, match=r"'x' has shape \(3, 3\), the model takes 4 along axis 0"):
        list(data.calibration)


def test_an_input_of_unknown_rank_takes_any():
    data = open_data([{"x": np.float32(1)}], (InputSpec("x", F32, None),))
    assert list(data.calibration)[0]["x"].shape == ()  # noqa: RUF015


def test_optional_inputs_may_be_missing():
    optional = InputSpec("scale", F32, (1,), optional=True)
    assert split(rows(4), (*X, optional))[0].samples == 3
    assert list(open_data([{**feeds(1)[0], "scale": np.ones(1, F32)}], (*X, optional)).calibration)


def test_first_axes_that_differ():
    inputs = (*X, InputSpec("z", F32, None))
    message = r"first axes \(samples\) differ or are empty: 'x' 4, 'z' "
    with pytest.raises(DataError, match=f"{message}5"):
        open_data({**rows(4), "z": np.zeros((5, 1), F32)}, inputs)
    with pytest.raises(DataError, match=f"{message}0"):
        open_data({**rows(4), "z": np.float32(1)}, inputs)


def test_no_feeds():
    for source in ([], Reader([])):
        with pytest.raises(DataError, match="calibration data: there are no feeds in it"):
            list(open_data(source, X).calibration)


def test_feeds_that_are_none():
    for source in ([None], [(1, 2)], [np.zeros((2, 3), F32)]):
        with pytest.raises(DataError, match="feed 0: expected a dict of arrays, found "):
            list(open_data(source, X).calibration)


def test_source_of_another_kind():
    with pytest.raises(DataError, match="calibration data: int is neither a dict of arrays"):
        open_data(3, X)


def test_paths_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"none\.npz: no such file .*, and not of the form"):
        open_data(tmp_path / "none.npz", X)
    with pytest.raises(DataError, match=r"the directory holds no \.npz file"):
        open_data(tmp_path, X)
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DataError, match=r"text\.npz: not a readable \.npz of plain arrays"):
        open_data(tmp_path / "text.npz", X)
    np.savez(tmp_path / "pickled.npz", x=np.array([{}, 1], dtype=object))
    with pytest.raises(DataError, match=r"pickled\.npz: array 'x\.npy' is pickled"):
        open_data(tmp_path / "pickled.npz", X)
    np.save(tmp_path / "lone.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"lone\.npy: a lone array; save an \.npz"):
        open_data(tmp_path / "lone.npy", X)


def archive(path, member, name="x.npy", copies=1):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for _ in range(copies):
            file.writestr(name, member)
    return path


def member(shape, descr="'<f4'", data=b""):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (member((2**40, 3)), r"'x\.npy' does not fit its shape \(1099511627776, 3\)"),
        (member((-1, 3)), r"does not fit its shape \(-1, 3\)"),
        (member((2, 3), data=bytes(20)), "does not fit its shape"),
        (member((2,), "'|O'", data=bytes(16)), "is pickled, and loading it could run code"),
        (member((2,), "()"), "not a readable .npz of plain arrays"),
        (b"\x93NUMPY\x09\x00", "stored in format .9, 0."),
        (b"\x93NUMPY\x01\x00\x05\x00{'a':", "not a readable .npz"),
        (b"hello", "not a readable .npz of plain arrays: EOF: reading magic string"),
    ],
)
def test_arrays_that_lie(tmp_path, content, message):
    path = archive(tmp_path / "a.npz", content)
    with pytest.raises(DataError, match=message) as caught:
        open_data(path, X)
    assert "\n" not in str(caught.value)


def test_an_archive_that_expands_beyond_bounds(tmp_path, monkeypatch):
    """Ten thousand rows of zeros take 300 bytes; judged by what they declare."""
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, x=np.zeros((10_000, 3), np.float32))
    monkeypatch.setattr(feeds_module, "_MAX_EXPANDED_BYTES", 100_000)
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    with pytest.raises(DataError, match="bytes that expand to 120128; save it uncompressed"):
        open_data(path, X)
    monkeypatch.undo()
    assert open_data(path, X).samples == 9936
    # What is not compressed is as large as it says, and no bomb.
    np.savez(path, x=np.zeros((10_000, 3), np.float32))
    monkeypatch.setattr(feeds_module, "_MAX_EXPANDED_BYTES", 1000)
    assert open_data(path, X).samples == 9936


def test_archives_of_other_kinds(tmp_path):
    good = member((2, 3), data=bytes(24))
    assert open_data(archive(tmp_path / "a.npz", good), X).samples == 1
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive(tmp_path / "a.npz", good, copies=2)
    with pytest.raises(DataError, match="it holds two arrays of one name"):
        open_data(tmp_path / "a.npz", X)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_LZMA) as file:
        file.writestr("x.npy", good)
    with pytest.raises(DataError, match="compressed in an unknown way"):
        open_data(tmp_path / "a.npz", X)
    content = bytearray(archive(tmp_path / "a.npz", good).read_bytes())
    content[60] ^= 0xFF
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"not a readable \.npz of plain arrays: "):
        open_data(tmp_path / "a.npz", X)


def test_file_of_a_directory_that_does_not_fit(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((1, 4), F32))
    with pytest.raises(DataError, match=r"a\.npz: input 'x' has shape \(1, 4\)"):
        list(open_data(tmp_path, X).calibration)


def test_callables_at_fault(tmp_path, monkeypatch):
    (tmp_path / "calib_faults.py").write_text(
        "value = 3\n"
        "def fails():\n"
        "    raise KeyError('lost')\n"
        "def later():\n"
        "    import numpy as np\n"
        "    yield {'x': np.zeros((1, 3), np.float32)}\n"
        "    raise OSError('disk')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for source, message in (
        ("no_such_module_here:f", "it raised ModuleNotFoundError: No module named"),
        ("calib_faults:nothing", "module 'calib_faults' has no 'nothing'"),
        ("calib_faults:value", "'value' is not callable"),
        ("calib_faults:fails", "calib_faults:fails: it raised KeyError: 'lost'"),
    ):
        with pytest.raises(DataError, match=message):
            open_data(source, X)
    data = open_data("calib_faults:later", X)
    with pytest.raises(DataError, match="it raised OSError: disk") as caught:
        list(data.calibration)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples 0: must be at least 1"),
        ({"batch_size": 0}, "batch size 0: must be at least 1"),
        ({"holdout": -1}, "holdout -1: must be at least 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(OptionError, match=message):
        open_data(rows(4), X, **options)


def test_batch_size_of_ready_made_feeds(tmp_path):
    np.savez(tmp_path / "a.npz", **rows(2))
    for source in (tmp_path, feeds(3), Reader(feeds(3))):
        with pytest.raises(OptionError, match=r"batch size 8: .* holds ready-made feeds"):
            open_data(source, X, batch_size=8)


def test_a_generator_is_not_read_before_it_is_needed():
    open_data(itertools.repeat(feeds(1)[0]), X)
