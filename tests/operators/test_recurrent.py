"""LSTM, GRU and RNN beyond the table: states to start from, outputs left out, layouts, declines."""

import re

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from recurrent_reference import gru, lstm, previous_states, rnn

from iobs_onnx.errors import ModelError
from iobs_onnx.passes import find_sites, instrument, load_model, prepare
from iobs_onnx.runtime.rows import read_rows
from iobs_onnx.site import PreviousStates, Rows, Stacked

TIME, BATCH, INPUT, HIDDEN = 5, 3, 8, 4
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
FORWARD = {"LSTM": lstm, "GRU": gru, "RNN": rnn}
LENGTHS = np.array([5, 3, 1], np.int32)
RESET = {"GRU": {"linear_before_reset": 1}}
RNG = np.random.default_rng(0)


def uniform(*shape: int) -> np.ndarray:
    return RNG.uniform(-1, 1, shape).astype(np.float32)


def make(
    op_type="LSTM",
    direction="forward",
    outputs=("Y",),
    start=None,
    lengths=None,
    nodes=(),
    opset=17,
    **attributes,
):
    """A node on `x`; `start` names initial_h, an array makes an initializer of it."""
    ways = 2 if direction == "bidirectional" else 1
    weights = {
        "W": uniform(ways, GATES[op_type] * HIDDEN, INPUT),
        "R": uniform(ways, GATES[op_type] * HIDDEN, HIDDEN),
    }
    if isinstance(start, np.ndarray):
        weights["h0"] = start
    if lengths is not None:
        weights["lengths"] = lengths
    inputs = ["x", "W", "R", "", "lengths" if lengths is not None else ""]
    inputs.append("" if start is None else "h0")
    settings = {
        "direction": direction,
        "hidden_size": HIDDEN,
        **RESET.get(op_type, {}),
        **attributes,
    }
    main = helper.make_node(op_type, inputs, list(outputs), name="N", **settings)
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [TIME, BATCH, INPUT])]
    if isinstance(start, str) and start == "input":
        values.append(helper.make_tensor_value_info("h0", TensorProto.FLOAT, [ways, BATCH, HIDDEN]))
    graph = helper.make_graph(
        [*nodes, main],
        "g",
        values,
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs if n],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(
        graph, ir_version=8, opset_imports=[helper.make_opsetid("", opset)]
    ), weights


def sites_of(proto: onnx.ModelProto):
    return {site.initializer: site for site in find_sites(load_model(proto)).sites}


def rows_of(site, results):
    parts = []
    for tap in site.taps:
        parts += read_rows(torch.from_numpy(results[tap.value].copy()), tap, None)
    return np.concatenate([part.numpy() for part in parts], axis=1)


def tapped(proto: onnx.ModelProto, sites):
    copy = prepare(load_model(proto), sites.values())
    return instrument(copy, [tap.value for site in sites.values() for tap in site.taps])


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("op_type", GATES)
def test_states_start_from_initial_h(op_type, direction, run):
    proto, weights = make(op_type, direction, start="input")
    x, h0 = uniform(TIME, BATCH, INPUT), uniform(len(weights["W"]), BATCH, HIDDEN)
    sites = sites_of(proto)
    results = run(tapped(proto, sites), {"x": x, "h0": h0})
    found = rows_of(sites["R"], results)
    if direction == "reverse":  # the reference runs its second direction backwards
        y = FORWARD[op_type](x[::-1], weights["W"], weights["R"], h0=h0, **RESET.get(op_type, {}))
        expected = previous_states(y, h0)
    else:
        y = FORWARD[op_type](x, weights["W"], weights["R"], h0=h0, **RESET.get(op_type, {}))
        expected = previous_states(y, h0)
    gram = found.transpose(0, 2, 1) @ found
    np.testing.assert_allclose(gram, expected.transpose(0, 2, 1) @ expected, atol=1e-4)
    # Each start counts as a row of zeros too; the sum, which is what matters, has none of it.
    assert found.shape[1] == (TIME + 1) * BATCH
    assert sites["R"].groups == len(weights["R"])
    assert (sites["W"].groups, sites["W"].taps[0].form) == (1, Stacked((-1,)))


def test_states_that_the_node_leaves_out_are_named_in_the_tapped_copy_only(run):
    proto, weights = make(outputs=("", "Y_h"))
    model = load_model(proto)
    [states] = sites_of(proto)["R"].taps
    assert states.value == "Y_h/output_0"
    with pytest.raises(ModelError, match="no such value"):
        instrument(model, [states.value])
    x = uniform(TIME, BATCH, INPUT)
    results = run(tapped(proto, sites_of(proto)), {"x": x})
    expected = lstm(x, weights["W"], weights["R"])
    np.testing.assert_allclose(results["Y_h/output_0"], expected, atol=1e-5)
    assert model.graph.node(0).outputs[0].name == ""


def test_a_name_that_is_taken_is_refused():
    nodes = [helper.make_node("Relu", ["x"], ["Y_h/output_0"])]
    model = load_model(make(outputs=("", "Y_h"), nodes=nodes)[0])
    with pytest.raises(ModelError, match="'Y_h/output_0': the name is needed for a tap"):
        prepare(model, [])


@pytest.mark.parametrize("kind", ["initializer", "Constant"])
def test_a_start_of_zeros_is_no_tap(kind):
    zeros = np.zeros((1, BATCH, HIDDEN), np.float32)
    if kind == "initializer":
        proto, _ = make(start=zeros)
    else:
        constant = helper.make_node("Constant", [], ["h0"], value=numpy_helper.from_array(zeros))
        proto, _ = make(start="computed", nodes=[constant])
    assert [tap.value for tap in sites_of(proto)["R"].taps] == ["Y"]


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("op_type", GATES)
@pytest.mark.parametrize("start", [None, "input"])
def test_padding_is_left_out(op_type, direction, start, run):
    proto, weights = make(op_type, direction, start=start, lengths=LENGTHS)
    x, h0 = uniform(TIME, BATCH, INPUT), uniform(len(weights["W"]), BATCH, HIDDEN)
    sites = sites_of(proto)
    feeds = {"x": x, "h0": h0} if start else {"x": x}
    results = run(tapped(proto, sites), feeds)
    states, steps = [], []
    for place, length in enumerate(LENGTHS):  # each sequence on its own, without padding
        part = x[:length, place : place + 1]
        own = h0[:, place : place + 1] if start else None
        ordered = part[::-1] if direction == "reverse" else part
        given = (weights["W"], weights["R"])
        y = FORWARD[op_type](ordered, *given, h0=own, **RESET.get(op_type, {}))
        states.append(previous_states(y, own))
        steps.append(part.reshape(1, -1, INPUT))
    for name, rows in (("R", states), ("W", steps)):
        expected = np.concatenate(rows, axis=1)
        found = rows_of(sites[name], results)
        gram = found.transpose(0, 2, 1) @ found
        np.testing.assert_allclose(gram, expected.transpose(0, 2, 1) @ expected, atol=1e-4)


def test_layout_batch_first():
    # ONNX Runtime has no kernel for it; tests/runtime/test_rows.py reads such states.
    proto, _ = make(start="input", layout=1)
    assert sites_of(proto)["W"].taps[0].form == Rows(-1)
    states, start = sites_of(proto)["R"].taps
    assert states.form == PreviousStates((False,), batch_first=True)
    assert start.form == Stacked((-1,), (-2,), (1,))


@pytest.mark.parametrize(
    ("given", "initializer", "reason"),
    [
        ({"op_type": "GRU", "linear_before_reset": 0}, "R", "reset states, which no tap reads"),
        ({"lengths": LENGTHS, "layout": 1}, "R", "sequence_lens is given: supported with layout 0"),
        ({"lengths": LENGTHS, "opset": 10}, "W", "sequence_lens is given: .* opset 11"),
        ({"outputs": ("", "")}, "W", "no output of the node is used"),
        ({"start": uniform(1, BATCH, HIDDEN)}, "R", "initial_h is a stored tensor"),
        ({"direction": "sideways"}, "R", "direction 'sideways' does not fit 1 matrices"),
    ],
)
def test_declined(given, initializer, reason):
    [declined] = [
        d for d in find_sites(load_model(make(**given)[0])).declined if d.initializer == initializer
    ]
    assert re.search(reason, declined.reason)
