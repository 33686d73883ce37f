"""`module:callable`: what is found, and what is not."""

import os
import sys

import pytest

from iobs_onnx.runtime import NoCallable, find_callable


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "named_here.py").write_text(
        "value = 3\ndef double(x): return 2 * x\nclass Thing:\n    triple = lambda x: 3 * x\n"
    )
    (tmp_path / "named_broken.py").write_text("raise RuntimeError('at import')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.usefixtures("module")
def test_found_in_the_working_directory_and_inside_a_class():
    assert find_callable("named_here:double")(2) == 4
    assert find_callable("named_here:Thing.triple")(2) == 6
    assert find_callable("os.path:join") is os.path.join


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("named_here:other", NoCallable, "^module 'named_here' has no 'other'$"),
        ("named_here:Thing.other", NoCallable, "^module 'named_here' has no 'Thing.other'$"),
        ("named_here", NoCallable, "^module 'named_here' has no ''$"),
        ("named_here:value", NoCallable, "^'value' is not callable$"),
        ("named_nowhere:f", ImportError, "No module named"),
        (":f", ValueError, "[Ee]mpty module name"),
        ("named_broken:f", RuntimeError, "at import"),
    ],
)
def test_not_found(name, kind, message):
    with pytest.raises(kind, match=message):
        find_callable(name)
