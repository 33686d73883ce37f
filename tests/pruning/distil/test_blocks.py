"""Training block by block: known optima, what is kept, what is left, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from pruning.distil.small_models import Arrays, build, encoder, token_feeds, two_of_four

import iobs_onnx
from iobs_onnx.engine import Engine
from iobs_onnx.errors import DataError
from iobs_onnx.passes import find_sites, rewrite, save_model
from iobs_onnx.pruning.checkpoint import Checkpoint
from iobs_onnx.pruning.distil import DistilSettings, kept_masks
from iobs_onnx.pruning.distil.blocks import BlocksDistilled, distil_blocks

WIDTH = 16


def chain(weights: Arrays) -> ir.Model:
    """One product after the other: two make a block."""
    values = ["x", *(f"{name}.out" for name in weights)]
    values[-1] = "y"
    nodes = [
        helper.make_node("MatMul", [values[index], name], [values[index + 1]])
        for index, name in enumerate(weights)
    ]
    shape = {"x": (TensorProto.FLOAT, ["n", WIDTH])}
    return build(nodes, weights, shape, {"y": (TensorProto.FLOAT, ["n", WIDTH])})


def pruned(weights: Arrays, only: tuple[str, ...]) -> Arrays:
    return {
        name: weight * two_of_four(weight) if name in only else weight
        for name, weight in weights.items()
    }


def random_weights(count: int = 4, seed: int = 0) -> Arrays:
    random = np.random.default_rng(seed)
    scale = WIDTH**-0.5
    return {
        f"w{i}": (scale * random.normal(size=(WIDTH, WIDTH))).astype(np.float32)
        for i in range(count)
    }


def rows(count: int, seed: int) -> list[Arrays]:
    """Feeds whose inputs go together, so that the kept weights can make up for the others."""
    mixing = np.random.default_rng(7).normal(size=(WIDTH, WIDTH))
    random = np.random.default_rng(seed)
    return [
        {"x": (random.normal(size=(64, WIDTH)) @ mixing).astype(np.float32)} for _ in range(count)
    ]


def run(
    folder: Path,
    dense: ir.Model,
    sparse: ir.Model,
    feeds: list[Arrays],
    held_out: list[Arrays],
    budget: int = 1 << 30,
    **settings: Any,
) -> BlocksDistilled:
    folder.mkdir(exist_ok=True)
    sites = find_sites(dense).sites
    return distil_blocks(
        dense,
        sparse,
        sites,
        feeds,
        held_out,
        kept=kept_masks(sparse, sites),
        engine=Engine("cpu", budget, folder),
        checkpoint=Checkpoint(folder),
        settings=DistilSettings(**settings),
    )


def least_squares(x: np.ndarray, mask: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The best weights on a support, output by output."""
    best = np.zeros(mask.shape)
    for column in range(mask.shape[1]):
        kept = mask[:, column]
        best[kept, column] = np.linalg.lstsq(x[:, kept], target[:, column], rcond=None)[0]
    return best


def test_each_block_reaches_the_least_squares_optimum_on_what_reaches_it(tmp_path: Path) -> None:
    """One sparse product in each block, the last of the first and the last of the second.

    The optimum of the first is that of its own output; that of the second is on the inputs which
    the first, trained, gives it.
    """
    weights = random_weights()
    dense, sparse = chain(weights), chain(pruned(weights, ("w1", "w3")))
    (feed,) = rows(1, 1)
    found = run(tmp_path, dense, sparse, [feed], [feed], steps=800, rate=0.03, loss="mse", clip=1e6)
    x = feed["x"].astype(np.float64)
    first, second = (two_of_four(weights[name]) for name in ("w1", "w3"))
    border = x @ weights["w0"] @ weights["w1"]
    target = border @ weights["w2"] @ weights["w3"]
    best = least_squares(x @ weights["w0"], first, border)
    for block, (inputs, mask, wanted, name) in zip(
        found.blocks,
        [
            (x @ weights["w0"], first, border, "w1"),
            (x @ weights["w0"] @ best @ weights["w2"], second, target, "w3"),
        ],
        strict=True,
    ):
        optimum = least_squares(inputs, mask, wanted)
        floor = np.square(inputs @ optimum - wanted).sum() / np.square(wanted).sum()
        assert block.sites == [name]
        assert block.accepted
        assert block.before is not None
        assert block.after is not None
        assert block.before > 1.2 * floor
        assert block.after == pytest.approx(floor, rel=0.02)
        assert not found.tensors[name][~mask].any()


def test_a_block_whose_held_out_error_rises_keeps_what_the_solver_gave(tmp_path: Path) -> None:
    """The held-out inputs lie where pruning changed least, the others anywhere."""
    weights = random_weights(seed=1)
    dense, sparse = chain(weights), chain(pruned(weights, ("w1", "w3")))
    lost = (weights["w1"] - weights["w1"] * two_of_four(weights["w1"])).astype(np.float64)
    null = np.linalg.svd(lost.T)[2][-1]  # the direction that pruning changes least
    x = np.linalg.solve(weights["w0"].T.astype(np.float64), null)[None]
    held_out = [{"x": np.repeat(x, 4, 0).astype(np.float32)}]
    found = run(tmp_path, dense, sparse, rows(4, 1), held_out, steps=200, rate=0.05, loss="mse")
    first = found.blocks[0]
    assert not first.accepted
    assert first.after == first.before
    assert first.reason == "the held-out loss did not fall"
    assert first.steps > 0
    assert "w1" not in found.tensors


def test_one_block_that_torch_cannot_evaluate_leaves_the_others_to_be_trained(
    tmp_path: Path,
) -> None:
    weights = random_weights(6)
    nodes, value = [], "x"
    for name in weights:
        nodes.append(helper.make_node("MatMul", [value, name], [f"{name}.out"]))
        value = f"{name}.out"
        if name == "w2":  # within the second block: times the number 1, in a sequence
            nodes += [
                helper.make_node("SequenceConstruct", ["one"], ["several"]),
                helper.make_node("SequenceAt", ["several", "zero"], ["first"]),
                helper.make_node("Mul", [value, "first"], ["scaled"]),
            ]
            value = "scaled"
    nodes[-1].output[0] = "y"

    def model(stored: Arrays) -> ir.Model:
        single = {"one": np.ones(1, np.float32), "zero": np.zeros((), np.int64)}
        shape = (TensorProto.FLOAT, ["n", WIDTH])
        return build(nodes, {**stored, **single}, {"x": shape}, {"y": shape})

    feeds, sparse = rows(3, 1), model(pruned(weights, tuple(weights)))
    found = run(tmp_path, model(weights), sparse, feeds[:2], feeds[2:], steps=90, loss="mse")
    assert [bool(block.reason) for block in found.blocks] == [False, True, False]
    assert "Sequence" in found.blocks[1].reason
    assert found.blocks[1].before is None
    assert set(found.tensors) == {"w0", "w1", "w4", "w5"}


def test_padding_has_no_influence(tmp_path: Path) -> None:
    dense, _ = encoder(prune=False)
    sparse, _ = encoder(prune=True)
    results = []
    for filler in (0, 17):
        feeds = token_feeds(6, seed=1, filler=filler)
        held_out = token_feeds(2, seed=2, filler=filler)
        folder = tmp_path / str(filler)
        results.append(run(folder, dense, sparse, feeds, held_out, steps=40, rate=0.01))
    first, second = results
    assert first.tensors
    assert [block.before for block in first.blocks] == [block.before for block in second.blocks]
    assert all(np.array_equal(first.tensors[name], second.tensors[name]) for name in first.tensors)


def test_a_model_of_one_block_is_trained_as_one_and_says_so(tmp_path: Path) -> None:
    dense, _ = encoder(prune=False)
    sparse, _ = encoder(prune=True)
    found = run(tmp_path, dense, sparse, token_feeds(6, 1), token_feeds(2, 2), steps=40, rate=0.01)
    (block,) = found.blocks
    assert block.outputs == ["last_hidden_state"]
    assert block.accepted
    assert set(found.tensors) == {"up", "down", "bias", "scale", "offset"}
    assert found.notes == ["no place between two sites is narrow: the model is one block"]


def test_what_two_blocks_share_is_not_trained(tmp_path: Path) -> None:
    weights = random_weights(5)
    order = ["w0", "w1", "w2", "w3", "w1", "w4"]

    def model(stored: Arrays) -> ir.Model:
        names = ["x", "a", "b", "c", "d", "e", "y"]
        nodes = [helper.make_node("MatMul", [names[i], order[i]], [names[i + 1]]) for i in range(6)]
        shape = (TensorProto.FLOAT, ["n", WIDTH])
        return build(nodes, stored, {"x": shape}, {"y": shape})

    sparse = model(pruned(weights, tuple(weights)))
    feeds = rows(3, 1)
    found = run(tmp_path, model(weights), sparse, feeds[:2], feeds[2:], steps=40, loss="mse")
    assert len(found.blocks) == 2
    assert set(found.tensors) == {"w0", "w2", "w3", "w4"}
    assert found.notes == ["not trained: 1 stored tensors that several blocks read"]


def test_two_runs_give_the_same_bytes_and_activations_may_wait_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spilled: list[Path] = []
    save = np.save
    monkeypatch.setattr(
        np, "save", lambda path, *a, **k: (spilled.append(path), save(path, *a, **k))
    )
    weights = random_weights()
    dense, sparse = chain(weights), chain(pruned(weights, tuple(weights)))
    feeds = rows(4, 1)
    found = [
        run(tmp_path / str(i), dense, sparse, feeds[:3], feeds[3:], size, steps=40, loss="mse")
        for i, size in enumerate((1 << 30, 1 << 30, 20_000))
    ]
    assert spilled
    assert not any(path.exists() for path in spilled)  # dropped when read no more
    for other in found[1:]:
        assert [b.before for b in other.blocks] == [b.before for b in found[0].blocks]
        for name, array in found[0].tensors.items():
            assert other.tensors[name].tobytes() == array.tobytes()


def test_feeds_on_both_sides_are_needed(tmp_path: Path) -> None:
    weights = random_weights()
    dense, sparse = chain(weights), chain(pruned(weights, tuple(weights)))
    with pytest.raises(DataError, match="no held-out feeds"):
        run(tmp_path / "a", dense, sparse, rows(1, 1), [])
    with pytest.raises(DataError, match="no feeds to train on"):
        run(tmp_path / "b", dense, sparse, [], rows(1, 1))


def outputs(path: Path, data: Path) -> np.ndarray:
    with np.load(data) as stored:
        return ort.InferenceSession(path).run(None, {"x": stored["x"]})[0]


@pytest.mark.parametrize("distill", ["blocks", "both"])
def test_prune_trains_blocks_and_the_report_tells_of_them(
    residual: Path, tmp_path: Path, distill: str
) -> None:
    options = {"sparsity": "2:4", "preset": "fast", "batch_size": 32}
    data = residual / "a.npz"
    plain, trained = tmp_path / "plain.onnx", tmp_path / "trained.onnx"
    iobs_onnx.prune(residual / "mlp.onnx", calibration=data, output=plain, **options)
    result = iobs_onnx.prune(
        residual / "mlp.onnx",
        calibration=data,
        output=trained,
        distill=distill,
        distill_steps=120,
        **options,
    )
    found = result.report.distillation
    assert found is not None
    blocks = found["blocks"]
    assert blocks["accepted"]
    assert blocks["after"] < blocks["before"]
    assert [block["outputs"] for block in blocks["each"]] == [["block0"], ["block1"], ["block2"]]
    assert [block["sites"] for block in blocks["each"]] == [[f"u{i}", f"v{i}"] for i in range(3)]
    assert ("curve" in found) == (distill == "both")
    json.loads(result.report.to_json())
    dense = outputs(residual / "mlp.onnx", residual / "b.npz")
    errors = [np.linalg.norm(outputs(p, residual / "b.npz") - dense) for p in (plain, trained)]
    assert errors[1] < errors[0]
    assert iobs_onnx.verify(trained, sparsity="2:4").ok


def test_rewritten_blocks_are_the_model_that_was_judged(tmp_path: Path) -> None:
    """The last block's held-out loss is that of the whole new model in ONNX Runtime."""
    weights = random_weights()
    dense, sparse = chain(weights), chain(pruned(weights, tuple(weights)))
    feeds = rows(4, 1)
    found = run(tmp_path, dense, sparse, feeds[:3], feeds[3:], steps=80, loss="mse")
    rewrite(sparse, found.tensors)
    results = []
    for name, model in (("dense", dense), ("sparse", sparse)):
        save_model(model, tmp_path / f"{name}.onnx")
        results.append(ort.InferenceSession(tmp_path / f"{name}.onnx").run(None, feeds[3])[0])
    loss = np.square(results[1] - results[0]).sum() / np.square(results[0]).sum()
    assert found.blocks[-1].after == pytest.approx(loss, rel=1e-4)
