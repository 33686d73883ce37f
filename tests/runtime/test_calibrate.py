import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

from iobs_onnx.errors import DataError, ModelError
from iobs_onnx.hessian import Hessian, combine
from iobs_onnx.passes import find_sites, instrument
from iobs_onnx.runtime import calibrate as calibrate_batches
from iobs_onnx.runtime.calibrate import Sums, collect
from iobs_onnx.runtime.padding import Padding
from iobs_onnx.runtime.session import open_session
from iobs_onnx.runtime.stream import Batch, Store, Stream
from iobs_onnx.site import Patches, Rows, Tap

H = Tap("h", Rows(-1), 6)


def calibrate(session, taps, feeds, *, padding=None, progress=None):
    """Run a whole model, as one segment, over the feeds."""
    stream = Stream(feeds, Store(Path(), 1 << 30), padding=padding)
    fetch = {tap.value: None for tap in taps}
    return calibrate_batches(taps, stream.run(session, fetch=fetch), progress=progress)


def gram(rows):
    rows = rows.astype(np.float64)
    return rows.T @ rows / len(rows)


def relative(hessian, expected):
    return np.linalg.norm(hessian.matrix[0].numpy() - expected) / np.linalg.norm(expected)


@pytest.fixture
def session(linear):
    return open_session(linear, "cpu")


def batches(count, seed=0):
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((5 + i, 6)).astype(np.float32)} for i in range(count)]


def test_equals_numpy_float64(session):
    feeds = batches(9)
    done = []
    result = calibrate(session, [H], iter(feeds), progress=lambda: done.append(1))
    rows = np.maximum(np.concatenate([feed["x"] for feed in feeds]), 0)
    assert relative(result.hessians[H], gram(rows)) < 1e-5
    assert result.hessians[H].rows == len(rows)
    assert result.batches == 9
    assert len(done) == 9
    assert not result.padding_excluded
    assert result.padding_kept == ()


def test_taps_of_one_value_in_several_forms(build):
    kind = (TensorProto.FLOAT, [2, 4, 6])
    model = build([helper.make_node("Relu", ["x"], ["h"])], {"x": kind}, {"h": kind})
    x = np.random.default_rng(0).standard_normal((2, 4, 6)).astype(np.float32)
    taps = [
        Tap("h", Rows(-1), 6),
        Tap("h", Rows(-2), 4),
        Tap("h", Patches((3,), (1,), (1,), (0, 0), groups=2), 6),
    ]
    result = calibrate(open_session(model, "cpu"), taps, [{"x": x}])
    h = np.maximum(x, 0)
    assert relative(result.hessians[taps[0]], gram(h.reshape(-1, 6))) < 1e-5
    assert relative(result.hessians[taps[1]], gram(h.transpose(0, 2, 1).reshape(-1, 4))) < 1e-5
    patches = np.stack([h[:, 2:, i : i + 3] for i in range(4)], axis=1)  # second group
    rows = patches.transpose(0, 1, 3, 2).reshape(-1, 6)
    second = result.hessians[taps[2]].matrix[1].numpy()
    assert np.linalg.norm(second - gram(rows)) < 1e-5 * np.linalg.norm(second)


def test_a_large_tap_is_split_among_workers(build):
    kind = (TensorProto.FLOAT, ["n", 700])
    model = build([helper.make_node("Relu", ["x"], ["h"])], {"x": kind}, {"h": kind})
    x = np.random.default_rng(0).standard_normal((50, 700)).astype(np.float32)
    tap = Tap("h", Rows(), 700)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        result = calibrate(open_session(model, "cpu"), [tap], [{"x": x}, {"x": x[:20]}])
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)
    rows = np.maximum(np.concatenate([x, x[:20]]), 0)
    assert relative(result.hessians[tap], gram(rows)) < 1e-5
    assert result.hessians[tap].rows == 70


def test_an_activation_that_is_a_graph_input(build):
    kind = (TensorProto.FLOAT, ["n", 6])
    model = build([helper.make_node("Relu", ["x"], ["y"])], {"x": kind}, {"y": kind})
    tapped = instrument(ir.from_proto(model), ["x"])
    x = batches(1)[0]["x"]
    tap = Tap("x", Rows(), 6)
    result = calibrate(open_session(tapped, "cpu"), [tap], [{"x": x}])
    assert relative(result.hessians[tap], gram(x)) < 1e-5


def test_float16_activations(build):
    kind = (TensorProto.FLOAT16, ["n", 6])
    model = build([helper.make_node("Relu", ["x"], ["h"])], {"x": kind}, {"h": kind})
    x = (np.random.default_rng(0).standard_normal((400, 6)) * 30).astype(np.float16)
    result = calibrate(open_session(model, "cpu"), [H], [{"x": x}])
    assert relative(result.hessians[H], gram(np.maximum(x, 0))) < 1e-5


def test_one_batch_is_alive_at_a_time(session, monkeypatch):
    module = sys.modules["iobs_onnx.runtime.stream"]
    seen: list[weakref.ref[torch.Tensor]] = []
    alive = []

    def watch(value):
        alive.append(sum(ref() is not None for ref in seen))
        tensor = torch.utils.dlpack.from_dlpack(value)
        seen.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(module, "from_dlpack", watch)
    calibrate(session, [H], batches(6))
    assert alive == [0] * 6


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "activation 'h', batch 2: holds NaN"),
        (np.inf, "activation 'h', batch 2: holds Inf"),
        (1e25, r"activation 'h', batch 2: values up to 1.0e\+25 overflow when squared"),
    ],
)
def test_activation_that_is_not_finite(session, value, message):
    feeds = batches(4)
    feeds[2]["x"][1, 3] = value
    with pytest.raises(DataError, match=message):
        calibrate(session, [H], feeds)


def test_what_cannot_be_calibrated(session):
    with pytest.raises(DataError, match="there are no feeds"):
        calibrate(session, [H], [])
    with pytest.raises(ModelError, match="activation 'lost' is neither fed nor computed"):
        calibrate(session, [Tap("lost", Rows(), 6)], batches(1))
    with pytest.raises(ModelError, match=r"'h' has shape .* 7 features along axis -1"):
        calibrate(session, [Tap("h", Rows(), 7)], batches(1))
    with pytest.raises(ModelError, match="ONNX Runtime cannot run the model on this feed"):
        calibrate(session, [H], [{"x": np.zeros((2, 5), np.float32)}])


def test_the_drift_of_a_convolution_holds_a_chunk_of_patches_and_not_all(monkeypatch):
    """3 × 3 patches are nine times the activation; the sums are those of all patches at once."""
    module = sys.modules["iobs_onnx.runtime.calibrate"]  # the package shows the function
    rows_module = sys.modules["iobs_onnx.runtime.rows"]
    form = Patches((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    tap = Tap("h", form, 36)
    monkeypatch.setattr(rows_module, "_CHUNK_BYTES", 9 * 4 * 4 * 8 * 8)  # an image's patches
    read_rows, alive, most = module.read_rows, weakref.WeakSet(), [0]

    def watched(*arguments):
        for chunk in read_rows(*arguments):
            alive.add(chunk)
            most[0] = max(most[0], len(alive))
            yield chunk

    monkeypatch.setattr(module, "read_rows", watched)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    draw = torch.Generator().manual_seed(0)
    sparse, dense = (torch.randn(20, 4, 8, 8, generator=draw) for _ in range(2))
    found = collect([tap], [Batch({"h": sparse})], [Batch({"h": dense})])
    assert most[0] <= 4  # of 40: one of each stream, and the next of each
    x, d = (
        torch.nn.functional.unfold(each.double(), 3, padding=1)
        .unflatten(1, (4, 9))
        .permute(0, 3, 2, 1)
        .reshape(-1, 36)
        for each in (sparse, dense - sparse)
    )
    drift = found.finish().hessians[tap].drift
    expected = (d.T @ x / len(x)).numpy()
    assert np.linalg.norm(drift.matrix[0].numpy() - expected) < 1e-4 * np.linalg.norm(expected)


# --- padding


@pytest.fixture(scope="module")
def attention_model(build):
    """Embedding, masked self-attention, and taps in shapes with and without (batch, seq)."""
    d, heads = 8, 2
    rng = np.random.default_rng(0)
    weights = {
        "table": rng.standard_normal((50, d)).astype(np.float32),
        "one": np.array(1, np.float32),
        "big": np.array(-1e9, np.float32),
        "axes": np.array([1], np.int64),
        "flat": np.array([-1, d], np.int64),
        "heads": np.array([0, 0, heads, d // heads], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["emb"]),
        helper.make_node("Transpose", ["emb"], ["emb_t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["emb", "emb_t"], ["scores"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["one", "mask"], ["off"]),
        helper.make_node("Mul", ["off", "big"], ["bias_"]),
        helper.make_node("Unsqueeze", ["bias_", "axes"], ["bias"]),
        helper.make_node("Add", ["scores", "bias"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "emb"], ["context"]),
        helper.make_node("Reshape", ["context", "flat"], ["tokens"]),
        helper.make_node("Reshape", ["context", "heads"], ["by_head"]),
        helper.make_node("ReduceMax", ["context"], ["pooled"], axes=[1], keepdims=0),
    ]
    ids = (TensorProto.INT64, ["b", "s"])
    outputs = {
        "context": (TensorProto.FLOAT, ["b", "s", d]),
        "tokens": (TensorProto.FLOAT, ["t", d]),
        "by_head": (TensorProto.FLOAT, ["b", "s", heads, d // heads]),
        "pooled": (TensorProto.FLOAT, ["b", d]),
    }
    return build(nodes, {"input_ids": ids, "attention_mask": ids}, outputs, weights)


@pytest.fixture(scope="module")
def attention(attention_model):
    return open_session(attention_model, "cpu")


@pytest.fixture(scope="module")
def padding(attention_model):
    return Padding(ir.from_proto(attention_model))


CONTEXT, TOKENS = Tap("context", Rows(-1), 8), Tap("tokens", Rows(-1), 8)
BY_HEAD, POOLED = Tap("by_head", Rows(3), 4), Tap("pooled", Rows(-1), 8)
SIDEWAYS = Tap("context", Rows(0), 3)
LENGTHS = (5, 2, 9)


def padded(sentences):
    longest = max(map(len, sentences))
    ids = np.zeros((len(sentences), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, sentence in enumerate(sentences):
        ids[row, : len(sentence)] = sentence
        mask[row, : len(sentence)] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def sentences():
    rng = np.random.default_rng(1)
    return [rng.integers(1, 50, length) for length in LENGTHS]


def test_padding_is_excluded(attention, padding, sentences):
    taps = [CONTEXT, TOKENS, BY_HEAD]
    batch = calibrate(attention, taps, [padded(sentences)], padding=padding)
    each = [padded([sentence]) for sentence in sentences]
    alone = calibrate(attention, taps, each, padding=padding)
    assert batch.padding_excluded
    assert batch.padding_kept == ()
    assert not alone.padding_excluded
    for tap in taps:
        assert batch.hessians[tap].rows == alone.hessians[tap].rows
        assert relative(batch.hessians[tap], alone.hessians[tap].matrix[0].numpy()) < 1e-5
    assert batch.hessians[CONTEXT].rows == sum(LENGTHS)
    assert batch.hessians[BY_HEAD].rows == 2 * sum(LENGTHS)


def test_padding_is_included_on_request(attention, padding, sentences):
    with_padding = calibrate(attention, [CONTEXT], [padded(sentences)])
    without = calibrate(attention, [CONTEXT], [padded(sentences)], padding=padding)
    assert with_padding.hessians[CONTEXT].rows == 3 * max(LENGTHS)
    assert not with_padding.padding_excluded
    reference = without.hessians[CONTEXT].matrix[0].numpy()
    assert relative(with_padding.hessians[CONTEXT], reference) > 1e-2


def test_taps_that_the_mask_does_not_fit_are_named(attention, padding, sentences):
    taps = [CONTEXT, POOLED, SIDEWAYS]
    result = calibrate(attention, taps, [padded(sentences)], padding=padding)
    assert result.padding_kept == (POOLED, SIDEWAYS)
    assert result.padding_excluded
    assert result.hessians[POOLED].rows == 3
    alone = calibrate(attention, [POOLED], [padded(sentences[:1])], padding=padding)
    assert alone.padding_kept == ()


def test_nan_in_padding_does_no_harm(build):
    ids = (TensorProto.INT64, ["b", "s"])
    kind = (TensorProto.FLOAT, ["b", "s", 2])
    table = np.array([[np.nan, np.nan], [1, 2]], np.float32)
    model = build(
        [helper.make_node("Gather", ["table", "input_ids"], ["h"])],
        {"input_ids": ids, "attention_mask": ids},
        {"h": kind},
        {"table": table},
    )
    tap = Tap("h", Rows(), 2)
    feed = {"input_ids": np.array([[1, 0]]), "attention_mask": np.array([[1, 0]])}
    padding = Padding(ir.from_proto(model))
    result = calibrate(open_session(model, "cpu"), [tap], [feed], padding=padding)
    np.testing.assert_array_equal(result.hessians[tap].matrix[0].numpy(), [[1, 2], [2, 4]])


def test_nothing_but_padding(attention, padding):
    feed = {key: np.zeros((2, 3), np.int64) for key in ("input_ids", "attention_mask")}
    with pytest.raises(DataError, match="no rows reached the Hessian"):
        calibrate(attention, [CONTEXT], [feed], padding=padding)


# --- real models


def test_minilm_padding_and_float64(minilm_model, minilm_feeds):
    """24 taps of a real encoder: padded batches against sentences one by one."""
    model = ir.load(minilm_model)
    taps = list({tap: None for site in find_sites(model).sites for tap in site.taps})
    session = open_session(instrument(model, [tap.value for tap in taps]), "cpu")
    feed = {name: array[:8] for name, array in minilm_feeds[0].items()}
    lengths = feed["attention_mask"].sum(axis=1)
    assert lengths.min() < lengths.max(), "the feed holds padding"
    alone = [
        {name: array[row : row + 1, :length] for name, array in feed.items()}
        for row, length in enumerate(lengths)
    ]
    padding = Padding(model)
    batch, single = (calibrate(session, taps, f, padding=padding) for f in ([feed], alone))
    assert len(taps) == 24
    assert batch.padding_kept == ()
    for tap in taps:
        assert batch.hessians[tap].rows == lengths.sum()
        # float32 kernels differ with the shape of the batch; so do the activations, layer by layer
        assert relative(batch.hessians[tap], single.hessians[tap].matrix[0].numpy()) < 1e-4
    values = session.run([tap.value for tap in taps], feed)
    for tap, value in zip(taps, values, strict=True):
        rows = value[feed["attention_mask"] != 0]
        assert relative(batch.hessians[tap], gram(rows)) < 1e-5


def test_magika_hessian_gives_the_energy_of_every_output(magika_model):
    """For each site `diag(W H Wᵀ)` is the mean square of what its node computes."""
    model = ir.load(magika_model)
    sites = find_sites(model).sites
    assert any(site.op_type == "Conv" for site in sites)
    taps = list({tap: None for site in sites for tap in site.taps})
    nodes = {node.name: node for node in model.graph}
    results = [nodes[site.nodes[0]].outputs[0].name for site in sites]
    session = open_session(instrument(model, [tap.value for tap in taps] + results), "cpu")
    rng = np.random.default_rng(0)
    feed = {"bytes": rng.integers(0, 257, (8, 2048)).astype(np.int32)}
    hessians = calibrate(session, taps, [feed]).hessians
    for site, result in zip(sites, results, strict=True):
        node = nodes[site.nodes[0]]
        (y,) = session.run([result], feed)
        if len(node.inputs) == 3:
            bias = node.inputs[2].const_value.numpy()
            y = y - bias.reshape(1, -1, *[1] * (y.ndim - 2))
        y = np.moveaxis(y, 1 if site.op_type == "Conv" else -1, -1)
        energy = (y.reshape(-1, site.out_features).astype(np.float64) ** 2).mean(axis=0)
        stored = model.graph.initializers[site.initializer].const_value.numpy()
        weight = site.to_matrices(stored)[0]
        hessian = hessians[site.taps[0]].matrix[0].numpy()
        found = np.einsum("oi,ij,oj->o", weight, hessian, weight)
        np.testing.assert_allclose(found, energy, rtol=1e-3, atol=1e-3 * energy.max())


class Everywhere:
    """A mask that is for every value."""

    def over(self, mask, _value, _shape):
        return mask


@pytest.mark.parametrize("cut", [1, 2, 5, 6])
def test_any_split_of_the_batches_gives_the_sums_of_the_whole(cut: int) -> None:
    """Also where the parts hold different shares of rows that weigh more, or none of a tap."""
    random = np.random.default_rng(0)
    r = Tap("r", Rows(), 3)

    def batches(seed: int) -> list[Batch]:
        drawn = np.random.default_rng(seed)
        sizes, weights = [40, 3, 25, 1, 60, 9, 30], [1.0, 2.6, 1.0, 1.0, 0.4, 1.0, 2.6]
        return [
            Batch(
                {
                    "h": torch.from_numpy(drawn.normal(1, 1, (size, 6)).astype("f")),
                    "r": torch.from_numpy(drawn.normal(1, 1, (size, 3)).astype("f")),
                },
                None if index % 3 else random.random((size,)) < 0.7,
                weight,
                Everywhere(),
            )
            for index, (size, weight) in enumerate(zip(sizes, weights, strict=True))
        ]

    ours, theirs = batches(1), batches(2)
    theirs = [replace(b, mask=a.mask) for a, b in zip(ours, theirs, strict=True)]

    def sums(part: slice) -> Sums:
        return collect([H], iter(ours[part]), iter(theirs[part]), beside=[(H, r)])

    whole = sums(slice(None)).finish()
    merged = sums(slice(cut))
    merged.merge(sums(slice(cut, None)))
    found = merged.finish()
    assert found.batches == whole.batches == 7
    left, right = found.hessians[H], whole.hessians[H]
    assert (left.rows, left.weight) == (right.rows, pytest.approx(right.weight, rel=1e-12))
    weights = np.concatenate([np.full(len(b.values["h"]), b.weight) for b in ours])
    kept = np.concatenate(
        [np.ones(len(b.values["h"]), bool) if b.mask is None else b.mask for b in ours]
    )
    x = np.concatenate([b.values["h"].double().numpy() for b in ours])[kept]
    expected = (x * weights[kept, None]).T @ x / weights[kept].sum()
    # Both round each sum to float32 once.
    np.testing.assert_allclose(left.matrix[0], expected, rtol=1e-5)
    for a, b in (
        (left.matrix, right.matrix),
        (left.mean, right.mean),
        (left.drift.matrix, right.drift.matrix),
        (left.drift.mean, right.drift.mean),
        (found.residuals[H, r].matrix, whole.residuals[H, r].matrix),
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert_combines_like(
        whole.hessians[H], [sums(p).finish().hessians[H] for p in (slice(cut), slice(cut, None))]
    )


def assert_combines_like(whole: Hessian, parts: list[Hessian]) -> None:
    both = combine(parts)
    torch.testing.assert_close(both.matrix, whole.matrix, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both.mean, whole.mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", [0, 3, 6])
def test_a_tap_that_is_out_of_step_in_one_batch_has_no_drift_and_others_keep_theirs(where):
    """Wherever that batch stands, and in whichever share of the feeds."""
    drawn = np.random.default_rng(0)
    other, stream = Tap("g", Rows(-1), 4), Tap("r", Rows(-1), 3)
    pairs = [(H, stream), (other, stream)]

    def batch(size, length):
        shapes = {"h": (length, 6), "g": (size, 4), "r": (size, 3)}
        return Batch(
            {k: torch.from_numpy(drawn.normal(size=s).astype("f")) for k, s in shapes.items()}
        )

    ours = [batch(5 + i, 5 + i) for i in range(7)]
    theirs = [batch(5 + i, 5 + i - 2 * (i == where)) for i in range(7)]
    found = collect([H, other], ours, theirs, beside=pairs).finish()
    assert found.out_of_step == (H,)
    assert found.hessians[H].drift is None
    assert found.residuals.keys() == {(other, stream)}
    alone = collect([other], ours, theirs, beside=pairs[1:]).finish()
    plain = collect([H], ours).finish()
    assert (alone.out_of_step, plain.out_of_step) == ((), ())
    assert torch.equal(found.hessians[H].matrix, plain.hessians[H].matrix)
    for a, b in (
        (found.hessians[other].matrix, alone.hessians[other].matrix),
        (found.hessians[other].drift.matrix, alone.hessians[other].drift.matrix),
        (found.residuals[other, stream].matrix, alone.residuals[other, stream].matrix),
    ):
        assert torch.equal(a, b)
    for cut in (2, 5):
        left = collect([H, other], ours[:cut], theirs[:cut], beside=pairs)
        left.merge(collect([H, other], ours[cut:], theirs[cut:], beside=pairs))
        merged = left.finish()
        assert merged.out_of_step == (H,)
        assert merged.hessians[H].drift is None
        assert merged.hessians[other].drift is not None
        assert merged.residuals.keys() == {(other, stream)}


def test_a_tap_whose_stream_is_out_of_step_has_no_residual_and_no_drift():
    stream = Tap("r", Rows(-1), 3)
    ours = Batch({"h": torch.ones(5, 6), "r": torch.ones(5, 3)})
    theirs = Batch({"h": torch.zeros(5, 6), "r": torch.zeros(1, 3)})
    found = collect([H], [ours], [theirs], beside=[(H, stream)]).finish()
    assert (found.out_of_step, found.residuals, found.hessians[H].drift) == ((H,), {}, None)
