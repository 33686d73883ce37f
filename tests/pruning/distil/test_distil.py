"""Training towards the dense model: what moves, what stays, and when nothing is returned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from pruning.distil.small_models import build, encoder, linear, token_feeds, two_of_four

from iobs_onnx.errors import DataError, ModelError, OptionError
from iobs_onnx.passes import find_sites, rewrite, stored_slots
from iobs_onnx.pruning.distil import (
    Distilled,
    DistilSettings,
    distil,
    endless,
    kept_masks,
    memory,
    training,
)
from iobs_onnx.pruning.distil import model as model_of_distil
from iobs_onnx.pruning.distil.trained import masters
from iobs_onnx.runtime import Feed


def values(model: ir.Model, name: str) -> np.ndarray:
    return stored_slots(model)[name].tensor.numpy()


def distilled_encoder(**settings: object) -> tuple[Distilled, ir.Model, dict[str, np.ndarray]]:
    dense, _ = encoder(prune=False)
    sparse, masks = encoder(prune=True)
    chosen = DistilSettings(**{"steps": 120, "rate": 0.01, **settings})  # type: ignore[arg-type]
    feeds = endless(token_feeds(8, seed=1))
    found = distil(dense, sparse, feeds, token_feeds(2, seed=2), kept=masks, settings=chosen)
    return found, sparse, masks


def test_the_error_falls_and_zeros_stay_zeros() -> None:
    found, sparse, masks = distilled_encoder()
    assert found.accepted
    assert found.after < 0.5 * found.before
    assert found.losses == {"last_hidden_state": "embedding"}
    assert found.steps == found.feeds == 120
    assert found.rows == 120 * 4 * 7  # tokens that are no padding
    for name, mask in masks.items():
        assert found.tensors[name].dtype == np.float32
        assert not found.tensors[name][~mask].any()
        assert (np.count_nonzero(found.tensors[name].reshape(-1, 4, mask.shape[1]), 1) <= 2).all()
    rewrite(sparse, found.tensors)
    kept = kept_masks(sparse, find_sites(sparse).sites)
    assert all((kept[name] == mask).all() for name, mask in masks.items())


def test_biases_and_norms_are_trained_tables_and_single_numbers_are_not() -> None:
    found, sparse, masks = distilled_encoder(steps=20)
    assert set(found.tensors) == {"up", "down", "bias", "scale", "offset"}
    assert not np.array_equal(found.tensors["bias"], values(sparse, "bias"))
    assert found.trained == sum(mask.sum() for mask in masks.values()) + 32 + 16 + 16
    assert set(distilled_encoder(steps=20, small=False)[0].tensors) == {"up", "down"}
    assert "table" in distilled_encoder(steps=20, embeddings=True)[0].tensors


def test_the_curve_ends_in_the_best_state_and_weights_are_those_judged() -> None:
    found, sparse, _ = distilled_encoder(steps=40, checks=4)
    assert [point[0] for point in found.curve] == [0, 10, 20, 30, 40]
    assert found.curve[0] == (0, None, found.before)
    assert found.after == min(point[2] for point in found.curve)
    rewrite(sparse, found.tensors)
    dense, masks = encoder(prune=False)[0], encoder(prune=True)[1]
    again = distil(
        dense,
        sparse,
        token_feeds(1),
        token_feeds(2, seed=2),
        kept=masks,
        settings=DistilSettings(steps=1, rate=1e-9),
    )
    assert again.before == pytest.approx(found.after, rel=1e-6)


def test_the_same_seed_gives_the_same_bytes() -> None:
    first, second = distilled_encoder(rate=None)[0], distilled_encoder(rate=None)[0]
    assert first.curve == second.curve
    assert first.rate == second.rate
    for name, array in first.tensors.items():
        assert array.tobytes() == second.tensors[name].tobytes()


def test_a_rate_that_harms_is_refused_and_the_weights_stay() -> None:
    found, _, _ = distilled_encoder(rate=30.0, steps=30)
    assert not found.accepted
    assert not found.tensors
    assert found.after == found.before
    assert found.notes[0].startswith("stopped at step")


def test_padding_has_no_influence() -> None:
    dense, _ = encoder(prune=False)
    sparse, masks = encoder(prune=True)
    results = []
    for filler in (0, 17):
        feeds = token_feeds(6, seed=1, filler=filler)
        held_out = token_feeds(2, seed=2, filler=filler)
        settings = DistilSettings(steps=6, rate=1e-2)
        results.append(distil(dense, sparse, feeds, held_out, kept=masks, settings=settings))
    first, second = results
    assert first.before == second.before
    assert all(np.array_equal(first.tensors[name], second.tensors[name]) for name in first.tensors)


def test_it_reaches_the_least_squares_refit_on_the_support() -> None:
    """On one batch the optimum is known: for each output, least squares over its kept inputs."""
    random = np.random.default_rng(0)
    weight = random.normal(size=(16, 8)).astype(np.float32)
    # Inputs that go together, so that the kept weights can make up for the others.
    x = (random.normal(size=(256, 16)) @ random.normal(size=(16, 16))).astype(np.float32)
    mask = two_of_four(weight)
    target = x.astype(np.float64) @ weight
    best = np.zeros_like(weight, dtype=np.float64)
    for column in range(8):
        kept = mask[:, column]
        best[kept, column] = np.linalg.lstsq(x[:, kept], target[:, column], rcond=None)[0]
    floor = np.square(x @ best - target).sum() / np.square(target).sum()

    feed = {"x": x}
    found = distil(
        linear(weight),
        linear(weight * mask),
        cycle([feed]),
        [feed],
        kept={"w": mask},
        settings=DistilSettings(steps=500, rate=0.05, loss="mse", clip=1e6),
    )
    assert found.before > 1.5 * floor
    assert floor <= found.after * (1 + 1e-4)
    assert found.after <= floor * 1.01
    assert np.abs(found.tensors["w"] - best).max() < 0.05 * np.abs(best).max()


def test_half_types_are_trained_in_float32_and_stored_as_they_were() -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(16, 8)).astype(np.float16)
    mask = two_of_four(weight)
    feeds = [{"x": random.normal(size=(32, 16)).astype(np.float16)} for _ in range(4)]
    found = distil(
        linear(weight, np.float16),
        linear(weight * mask, np.float16),
        cycle(feeds),
        feeds[:1],
        kept={"w": mask},
        settings=DistilSettings(steps=60, rate=0.01, loss="mse"),
    )
    assert found.accepted
    assert found.tensors["w"].dtype == np.float16
    assert not found.tensors["w"][~mask].any()


def test_bfloat16_is_rounded_as_it_is_stored() -> None:
    """ONNX Runtime multiplies no bfloat16 on a CPU, so only the masters are looked at."""
    weight = np.array([[1.0, 0.0], [0.0, 3.0]], ml_dtypes.bfloat16)
    model = linear(weight, ml_dtypes.bfloat16)
    (master,) = masters(model, {"w": weight != 0}, small=True, embeddings=False)
    assert master.value.dtype == torch.float32
    with torch.no_grad():
        master.value.add_(1.003)
    assert master.stored().dtype == ml_dtypes.bfloat16
    assert np.array_equal(master.stored().astype(np.float32), [[2.0, 0.0], [0.0, 4.0]])
    assert np.array_equal(master.rounded()[0, 0], 2.0)


def test_errors_are_told_in_one_line() -> None:
    dense, masks = encoder(prune=False)
    sparse, _ = encoder(prune=True)
    feeds = token_feeds(2)
    with pytest.raises(DataError, match="no feeds to train on"):
        distil(dense, sparse, [], feeds, kept=masks)
    with pytest.raises(DataError, match="no held-out feeds"):
        distil(dense, sparse, feeds, [], kept=masks)
    with pytest.raises(ModelError, match="stores no tensor 'missing'"):
        distil(dense, sparse, feeds, feeds, kept={"missing": masks["up"]})
    with pytest.raises(ModelError, match="is not zero where its mask removes it"):
        distil(dense, dense, feeds, feeds, kept=masks)
    with pytest.raises(ModelError, match="has shape"):
        distil(dense, sparse, feeds, feeds, kept={"up": masks["down"]})
    for wrong in ({"steps": 0}, {"rate": -1.0}, {"loss": "l1"}, {"seconds": 0.0}):
        with pytest.raises(OptionError, match="distillation"):
            DistilSettings(**wrong)  # type: ignore[arg-type]


def test_integer_weights_and_unknown_operators_are_declined_with_the_reason() -> None:
    model = build(
        [
            helper.make_node("DequantizeLinear", ["q", "s"], ["w"]),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        {"q": np.eye(8, dtype=np.int8), "s": np.array(0.1, np.float32)},
        {"x": (TensorProto.FLOAT, ["n", 8])},
        {"y": (TensorProto.FLOAT, ["n", 8])},
    )
    feeds = [{"x": np.ones((2, 8), np.float32)}]
    with pytest.raises(ModelError, match="'q' is stored as INT8; only float"):
        distil(model, model, feeds, feeds, kept={"q": np.eye(8, dtype=bool)})
    unknown = linear(np.eye(8))
    unknown.graph[0].domain = "com.example"
    with pytest.raises(ModelError, match=r"dense model cannot be evaluated in torch.*no such"):
        distil(unknown, unknown, feeds, feeds, kept={"w": np.eye(8, dtype=bool)})


@pytest.mark.parametrize("keeps", [True, False])
def test_an_interrupt_ends_the_training_or_the_run(keeps: bool) -> None:
    dense, _ = encoder(prune=False)
    sparse, masks = encoder(prune=True)

    def told(step: int, _steps: int, _loss: float) -> None:
        if step == 90:
            raise KeyboardInterrupt

    def run() -> Distilled:
        settings = DistilSettings(steps=120, rate=0.01, checks=12, keeps=keeps)
        feeds = endless(token_feeds(8, seed=1))
        held_out = token_feeds(2, seed=2)
        return distil(dense, sparse, feeds, held_out, kept=masks, settings=settings, told=told)

    if not keeps:
        with pytest.raises(KeyboardInterrupt):
            run()
        return
    found = run()
    assert found.accepted
    assert found.steps == 90
    assert found.after == min(point[2] for point in found.curve) < found.before
    assert found.notes == ("interrupted at step 90: what was best until then is kept",)


def test_many_held_out_feeds_judge_the_best_state_and_a_part_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(16, 16)).astype(np.float32)
    mask = two_of_four(weight)
    dense, sparse = deep(weight), deep(weight * mask)
    feeds = [{"x": random.normal(size=(8, 16)).astype(np.float32)} for _ in range(50)]
    judged: list[int] = []
    judge = training.Pair.judge

    def counted(pair: training.Pair, feeds: Sequence[Feed]) -> float:
        judged.append(len(feeds))
        return judge(pair, feeds)

    monkeypatch.setattr(training.Pair, "judge", counted)
    settings = DistilSettings(steps=40, rate=0.003)
    found = distil(dense, sparse, cycle(feeds), feeds, kept={"w": mask}, settings=settings)
    # Four checks of five feeds each, and of all before and after; spread over all of them.
    assert judged == [50, 5, 5, 5, 5, 5, 50]
    trained = deep(found.tensors["w"])
    pair, _ = model_of_distil._pair(dense, trained, feeds[0], {"w": mask}, settings)
    assert found.after == pytest.approx(judge(pair, feeds), rel=1e-6)
    assert found.after < found.before


def deep(weight: np.ndarray) -> ir.Model:
    """A product and 36 activations, which each keep what they computed."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["v0"])]
    nodes += [helper.make_node("Tanh", [f"v{i}"], [f"v{i + 1}"]) for i in range(36)]
    shape = (TensorProto.FLOAT, ["n", weight.shape[1]])
    return build(nodes, {"w": weight}, {"x": shape}, {"v36": shape})


def test_activations_are_computed_again_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(16, 16)).astype(np.float32)
    mask = two_of_four(weight)
    dense, sparse, kept = deep(weight), deep(weight * mask), {"w": mask}
    feed = {"x": random.normal(size=(64, 16)).astype(np.float32)}
    settings = DistilSettings(steps=4, rate=0.01)
    pair, _ = model_of_distil._pair(dense, sparse, feed, kept, settings)
    again = replace(pair, sparse=pair.sparse.recomputing())
    whole, less = (memory.kept_bytes(p, feed, math.inf) for p in (pair, again))
    assert whole is not None
    assert less is not None
    activation = feed["x"].nbytes
    assert 36 * activation <= whole < 44 * activation  # one each, and a few for product and loss
    assert 6 * activation <= less < 14 * activation  # one for each chunk of six
    assert memory.kept_bytes(pair, feed, whole - 1) is None

    def distilled(limit: float) -> Distilled:
        free = limit / 0.7 + 5 * weight.nbytes
        monkeypatch.setattr(memory, "available_memory", lambda: free)
        return distil(dense, sparse, cycle([feed]), [feed], kept=kept, settings=settings)

    plenty, short = distilled(whole + 1), distilled(less + 1)
    assert plenty.tensors.keys() == short.tensors.keys() == {"w"}
    np.testing.assert_allclose(short.tensors["w"], plenty.tensors["w"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match=r"GB that are free; make batches smaller .*--distill"):
        distilled(less - 1)
