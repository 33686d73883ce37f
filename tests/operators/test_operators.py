"""Every operator, weight form and pattern of the table: the Hessian, and what pruning does."""

from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from operator_cases import (
    FORMS,
    OPERATORS,
    PATTERNS,
    Operator,
    Stored,
    declined_table,
    extras_of,
    feed_of,
    model_of,
    table,
    weight_of,
)
from recurrent_reference import previous_states

from iobs_onnx.layer import solve_layer
from iobs_onnx.passes import (
    check_pattern,
    find_sites,
    instrument,
    load_model,
    rewrite,
    stored_slots,
)
from iobs_onnx.passes.ops import OP_HANDLERS
from iobs_onnx.runtime.rows import read_rows
from iobs_onnx.site import Site
from iobs_onnx.sparsity import NM, parse_sparsity

DOCS = Path(__file__).resolve().parents[2] / "docs" / "operators.md"


def the_site(model: ir.Model) -> Site:
    """The one site behind operand `w`: recurrent nodes have another weight."""
    return next(s for s in find_sites(model).sites if s.initializer in ("w", "w0"))


def hessian_of(site: Site, results: dict[str, np.ndarray]) -> np.ndarray:
    """Sum over taps of XᵀX / n, float64."""
    total, count = 0.0, 0
    for tap in site.taps:
        for chunk in read_rows(torch.from_numpy(results[tap.value].copy()), tap, None):
            rows = chunk.double().numpy()
            assert rows.shape[::2] == (site.groups, site.in_features)
            total = total + rows.transpose(0, 2, 1) @ rows
            count += rows.shape[1]
    return total / count


def operator_hessian(operator: Operator, site: Site, run) -> np.ndarray:
    """The Hessian as the operator itself defines it.

    The output of a linear operator whose weight is 1 at one input of one output, and 0 elsewhere,
    is that input's column of the regression; of what is not linear the columns are known.
    """
    feed = feed_of(operator)
    if operator.op_type in ("LSTM", "GRU", "RNN") and operator.index == 2:
        rows = previous_states(forward(operator, weight_of(operator)))
    elif operator.forward:
        rows = feed["x"].reshape(1, -1, operator.x[-1]).astype(float)
    else:
        dtype = np.dtype(np.float32)
        rows = []
        for group in range(site.groups):
            columns = []
            for column in range(site.in_features):
                unit = np.zeros((site.groups, site.out_features, site.in_features), np.float32)
                unit[group, 0, column] = 1
                proto = model_of(
                    operator,
                    FORMS["initializer"](site.to_stored(unit, dtype), operator),
                    runnable=True,
                )
                y = run(proto, feed)["y"].astype(float)
                columns.append(y.ravel())
            rows.append(np.stack(columns, axis=1))
        rows = np.stack(rows)
        # Only one of all outputs is not zero.
        gram = rows.transpose(0, 2, 1) @ rows
        return gram / (rows.shape[1] / (site.groups * site.out_features))
    return rows.transpose(0, 2, 1) @ rows / rows.shape[1]


def forward(operator: Operator, weight: np.ndarray) -> np.ndarray:
    inputs = {operator.index: weight, **extras_of(operator)}
    ordered = [inputs.get(place) for place in range(1, max(inputs) + 1)]
    assert operator.forward is not None
    return operator.forward(feed_of(operator)["x"], *ordered, **operator.attributes)


def test_the_documents_hold_the_table():
    text = DOCS.read_text(encoding="utf-8")
    assert table() in text
    assert declined_table() in text
    assert all(pattern in text for pattern in PATTERNS)


def test_every_handler_is_in_the_table():
    # Weights that a node unpacks itself come in one form: test_packed.py.
    plain = {key for key, handler in OP_HANDLERS.items() if not handler.packed}
    assert {(o.domain, o.op_type) for o in OPERATORS.values()} == plain


@pytest.mark.parametrize("name", OPERATORS)
def test_hessian_is_that_of_the_operator(name, run):
    operator = OPERATORS[name]
    stored = FORMS["initializer"](weight_of(operator), operator)
    site = the_site(load_model(model_of(operator, stored)))
    runnable = load_model(model_of(operator, stored, runnable=True))
    results = run(instrument(runnable, [tap.value for tap in site.taps]), feed_of(operator))
    expected = operator_hessian(operator, site, run)
    if operator.attributes.get("alpha"):
        expected = expected / operator.attributes["alpha"] ** 2
    found = hessian_of(site, results)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert site.shape[site.axis] == operator.weight[operator.reduce]
    assert site.axis == operator.reduce


@cache
def dense_run(name: str, form: str, run) -> tuple[Operator, Stored, Site, dict[str, np.ndarray]]:
    """The dense model's taps, output and weight operand; patterns share it."""
    operator = OPERATORS[name]
    stored = FORMS[form](weight_of(operator), operator)
    site = the_site(load_model(model_of(operator, stored)))
    model = with_operand(load_model(model_of(operator, stored, runnable=True)))
    values = [*(tap.value for tap in site.taps), "y", "operand"]
    return operator, stored, site, run(instrument(model, values), feed_of(operator))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPERATORS)
def test_pruned(name, form, pattern, run):
    operator, stored, site, dense = dense_run(name, form, run)
    hessian = hessian_of(site, dense)
    model = load_model(model_of(operator, stored, runnable=True))
    before = stored_slots(model)[site.initializer].tensor.numpy()
    matrices = site.to_matrices(before)
    solved = np.stack(
        [
            solve_layer(w, h.astype(np.float32), sparsity=pattern, solver="sparsegpt").weight
            for w, h in zip(matrices, hessian, strict=True)
        ]
    )
    after = site.to_stored(solved, before.dtype)
    rewrite(model, {site.initializer: after})
    assert check_pattern(model, [site], {site.name: parse_sparsity(pattern)}) == []
    sparse = run(with_operand(model), feed_of(operator))
    assert_sparse(sparse["operand"], operator, pattern)

    if operator.forward:
        expected = forward(operator, sparse["operand"])
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(sparse["y"].ravel(), expected.ravel(), atol=1e-5 * scale)
        return
    change = site.to_matrices(after) - matrices
    if form == "Quantize, Dequantize":  # the graph rounds the weights that are stored
        change = operand_matrices(site, sparse) - operand_matrices(site, dense)
    alpha = operator.attributes.get("alpha", 1.0)
    predicted = alpha**2 * np.einsum("goi,gij,goj->", change, hessian, change)
    y = sparse["y"].astype(float) - dense["y"]
    rows = y.size / (site.groups * site.out_features)
    # float32 sums of at most 100 terms.
    np.testing.assert_allclose((y**2).sum() / rows, predicted, rtol=1e-4)


def operand_matrices(site: Site, results: dict[str, np.ndarray]) -> np.ndarray:
    return site.to_matrices(results["operand"].reshape(site.shape)).astype(float)


def with_operand(model: ir.Model) -> ir.Model:
    """The model with its weight operand `w` as another output, by the name `operand`."""
    proto = ir.to_proto(model)
    proto.graph.node.add(op_type="Identity", input=["w"], output=["operand"])
    proto.graph.output.add(name="operand")
    return load_model(proto)


def assert_sparse(operand: np.ndarray, operator: Operator, pattern: str) -> None:
    """The operand as the node multiplies by it holds the pattern along the axis of reduction."""
    parsed = parse_sparsity(pattern)
    if isinstance(parsed, NM):
        groups = np.moveaxis(operand, operator.reduce, -1).reshape(-1, parsed.m)
        assert (np.count_nonzero(groups, axis=1) <= parsed.n).all()
        return
    assert 1 - np.count_nonzero(operand) / operand.size >= 0.6 - 0.02
