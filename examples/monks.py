"""MONK's problems: three small networks, trained, pruned by Optimal Brain Surgeon, exported.

    python examples/monks.py --output build/monks

Robots have six attributes of 3, 3, 2, 3, 4 and 2 values, 432 robots in all, coded as 17 inputs
of 0 and 1. Each problem is a rule, known completely (Thrun et al., "The MONK's Problems",
CMU-CS-91-197, 1991):

=======  ================================================================  ========  ======
problem  rule                                                              training  hidden
=======  ================================================================  ========  ======
1        a1 = a2, or a5 = 1                                                124       3
2        exactly two of the attributes are 1                               169       2
3        a5 = 3 and a4 = 1, or a5 is not 4 and a2 is not 3                 122       4
=======  ================================================================  ========  ======

5 % of the training labels of problem 3 are wrong. The published training subsets are not used:
subsets of their sizes, and the wrong labels, are drawn by `--seed`.

Pruning is that of Hassibi and Stork ("Second Order Derivatives for Network Pruning: Optimal
Brain Surgeon", NIPS 1992): one weight of the whole network after another, by the inverse
Hessian of the training loss over all weights, in the outer-product form of the paper. A step
of `iobs_onnx.recovery.iobs` to one weight fewer is just that; then the network is trained on.
The smallest network that still has the dense network's accuracy on its training cases is kept;
the other cases have no part in that choice. The paper reports 76 %, 62 % and 90 % of the weights
removed: its abstract lists the three without naming the problems, but 14 of 58 weights, for
problem 1, and 15 of 39, for problem 2, are the first two.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.func import jacrev
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from iobs_onnx.errors import CheckError, DependencyError, InputError, IobsError, OptionError
from iobs_onnx.recovery import Objective, Options, iobs

VALUES = (3, 3, 2, 3, 4, 2)
INPUTS = sum(VALUES)
# To the minimum of the quadratic model, and one weight fewer.
STEP = Options(damping=1e-4, max_steps=1, tolerance=None)


@dataclass(frozen=True)
class Task:
    """One problem: how it was trained, and what the paper's network lost.

    Weight decay is the ridge of the training loss; where labels are wrong it must be strong
    enough that they are not learned.
    """

    training: int
    hidden: int
    decay: float
    noise: float
    paper: float


TASKS = {
    1: Task(training=124, hidden=3, decay=1e-3, noise=0.0, paper=0.76),
    2: Task(training=169, hidden=2, decay=1e-4, noise=0.0, paper=0.62),
    3: Task(training=122, hidden=4, decay=2e-2, noise=0.05, paper=0.90),
}


@dataclass(frozen=True)
class Network:
    """`logit = v tanh(A x + b) + c`, its weights one vector `[A, b, v, c]`, float64.

    Attributes:
        hidden: number of hidden units.
        x: training cases, `(n, 17)`.
        y: their labels, `(n,)`, 0 or 1.
        decay: weight decay.
    """

    hidden: int
    x: Tensor
    y: Tensor
    decay: float

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.hidden * (INPUTS + 2) + 1

    def parts(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return `A`, `b`, `v`, `c`."""
        a, b, v, c = w.split([self.hidden * INPUTS, self.hidden, self.hidden, 1])
        return a.view(self.hidden, INPUTS), b, v, c

    def logits(self, w: Tensor, x: Tensor) -> Tensor:
        """Return the network's output before the sigmoid, `(n,)`."""
        a, b, v, c = self.parts(w)
        return (x @ a.T + b).tanh() @ v + c

    def loss(self, w: Tensor) -> Tensor:
        """Return mean cross-entropy on the training cases plus ½ decay ‖w‖²."""
        entropy = binary_cross_entropy_with_logits(self.logits(w, self.x), self.y)
        return entropy + self.decay / 2 * w.dot(w)

    def accuracy(self, w: Tensor, x: Tensor, y: Tensor) -> float:
        """Return the share of cases on the right side."""
        return float(((self.logits(w, x) > 0) == (y > 0.5)).double().mean())

    def objective(self, kept: Tensor) -> Objective:
        """Return the training loss as a function of the kept weights, `(kept.sum(),)`."""

        def whole(z: Tensor) -> Tensor:
            return torch.zeros(self.size, dtype=z.dtype).masked_scatter(kept, z)

        def evaluate(z: Tensor) -> tuple[Tensor, Tensor]:
            z = z.detach().requires_grad_()
            value = self.loss(whole(z))
            return value.detach(), torch.autograd.grad(value, z)[0]

        def hessian(z: Tensor) -> Tensor:
            jacobian = jacrev(lambda w: self.logits(w, self.x))(whole(z))[:, kept]
            p = self.logits(whole(z), self.x).sigmoid()
            outer = jacobian.T @ (jacobian * (p * (1 - p) / len(p))[:, None])
            return outer + self.decay * torch.eye(len(z), dtype=z.dtype)

        return Objective(evaluate, hessian)

    def train(self, w: Tensor, kept: Tensor, steps: int) -> Tensor:
        """Return the weights after so many steps of L-BFGS on the kept ones."""
        objective = self.objective(kept)
        z = w[kept].clone().requires_grad_()
        optimiser = torch.optim.LBFGS(
            [z], max_iter=steps, history_size=50, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            value, z.grad = objective.evaluate(z)
            return value

        optimiser.step(closure)
        return torch.zeros_like(w).masked_scatter(kept, z.detach())


@dataclass(frozen=True)
class Result:
    """What became of one network; accuracies are shares, `all` of the 432 robots."""

    problem: int
    weights: int
    kept: int
    removed: float
    paper: float
    dense_training: float
    dense_all: float
    training: float
    all: float


def robots() -> tuple[Tensor, dict[int, Tensor]]:
    """Return all cases, `(432, 17)` float64, and each problem's labels, `(432,)`."""
    cases = torch.tensor(list(product(*(range(1, count + 1) for count in VALUES))))
    a1, a2, _, a4, a5, _ = cases.T
    labels = {
        1: (a1 == a2) | (a5 == 1),
        2: (cases == 1).sum(1) == 2,
        3: ((a5 == 3) & (a4 == 1)) | ((a5 != 4) & (a2 != 3)),
    }
    coded = [one_hot(column - 1, count) for column, count in zip(cases.T, VALUES, strict=True)]
    return torch.cat(coded, 1).double(), {key: value.double() for key, value in labels.items()}


def trained(problem: int, seed: int, restarts: int, steps: int) -> tuple[Network, Tensor]:
    """Draw the training cases and return the network with the least loss of all restarts."""
    task = TASKS[problem]
    generator = torch.Generator().manual_seed(seed)
    x, labels = robots()
    drawn = torch.randperm(len(x), generator=generator)[: task.training]
    y = labels[problem][drawn]
    # `drawn` is in random order, so these are wrong at random.
    wrong = round(task.noise * task.training)
    y[:wrong] = 1 - y[:wrong]
    network = Network(task.hidden, x[drawn], y, task.decay)
    every = torch.ones(network.size, dtype=torch.bool)
    starts = [
        torch.randn(network.size, generator=generator, dtype=torch.float64) / 2
        for _ in range(restarts)
    ]
    found = [network.train(start, every, steps) for start in starts]
    return network, min(found, key=lambda w: float(network.loss(w)))


def prune(network: Network, w: Tensor, steps: int) -> Tensor:
    """Return the weights of the smallest network that is as accurate in training as `w`."""
    wanted = network.accuracy(w, network.x, network.y)
    best, kept = w, w != 0
    while int(kept.sum()) > 1:
        fewer = int(kept.sum()) - 1
        step = iobs(network.objective(kept), w[kept], fewer, exhaustive_up_to=0, options=STEP)
        w = torch.zeros_like(w).masked_scatter(kept, step.weight)
        kept = kept.masked_scatter(kept, step.support)
        w = network.train(w, kept, steps)
        if network.accuracy(w, network.x, network.y) >= wanted:
            best = w
    return best


def export(network: Network, w: Tensor, file: Path) -> None:
    """Write the network as ONNX: `robots` `(n, 17)` float32 to `yes`, `(n, 1)`, a probability."""
    a, b, v, c = (part.float().numpy() for part in network.parts(w))
    weights = {"A": a, "b": b, "v": v[None], "c": c}
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["robots", "A", "b"], ["sum"], "hidden", transB=1),
            helper.make_node("Tanh", ["sum"], ["hidden"]),
            helper.make_node("Gemm", ["hidden", "v", "c"], ["logit"], "output", transB=1),
            helper.make_node("Sigmoid", ["logit"], ["yes"]),
        ],
        file.stem,
        [helper.make_tensor_value_info("robots", TensorProto.FLOAT, ["n", INPUTS])],
        [helper.make_tensor_value_info("yes", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)


def check(network: Network, w: Tensor, file: Path) -> None:
    """Run the file in ONNX Runtime on all robots and compare it with torch.

    Raises:
        CheckError: it answers otherwise, or holds another number of weights.
        DependencyError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError("onnxruntime is missing: pip install iobs-onnx[cpu]") from error
    x, _ = robots()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"robots": x.float().numpy()})
    expected = network.logits(w, x).sigmoid().numpy()
    worst = float(np.abs(found[:, 0] - expected).max())
    if worst > 1e-4:
        raise CheckError(f"{file}: ONNX Runtime differs from torch by {worst:.2g}")
    stored = [numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer]
    count = sum(int(np.count_nonzero(array)) for array in stored)
    if count != int((w != 0).sum()):
        raise CheckError(f"{file}: holds {count} weights instead of {int((w != 0).sum())}")


def solve(problem: int, arguments: argparse.Namespace) -> Result:
    """Train, prune, export and check one network."""
    network, dense = trained(problem, arguments.seed, arguments.restarts, arguments.steps)
    sparse = prune(network, dense, arguments.retrain)
    file = arguments.output / f"monk{problem}.onnx"
    export(network, sparse, file)
    check(network, sparse, file)
    x, labels = robots()
    kept = int((sparse != 0).sum())
    return Result(
        problem=problem,
        weights=network.size,
        kept=kept,
        removed=1 - kept / network.size,
        paper=TASKS[problem].paper,
        dense_training=network.accuracy(dense, network.x, network.y),
        dense_all=network.accuracy(dense, x, labels[problem]),
        training=network.accuracy(sparse, network.x, network.y),
        all=network.accuracy(sparse, x, labels[problem]),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """A product of this size is done before a second thread has woken up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train three networks on MONK's problems and prune them by OBS."
    )
    parser.add_argument("--problems", type=int, nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seed", type=int, default=0, help="draws training cases and starts")
    parser.add_argument("--restarts", type=int, default=8, help="networks trained for each problem")
    parser.add_argument("--steps", type=int, default=500, help="training steps of each")
    parser.add_argument("--retrain", type=int, default=50, help="steps after each removal")
    parser.add_argument("--output", type=Path, default=Path(), metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return parser.parse_args(argv)


def _study(arguments: argparse.Namespace) -> None:
    for option in ("restarts", "steps"):
        if getattr(arguments, option) < 1:
            raise OptionError(f"--{option} {getattr(arguments, option)}: must be at least 1")
    if arguments.retrain < 0:
        raise OptionError(f"--retrain {arguments.retrain}: must be at least 0")
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise OptionError(f"{arguments.json}: the folder does not exist; make it first")
    arguments.output.mkdir(parents=True, exist_ok=True)
    sizes = "/".join(str(TASKS[problem].training) for problem in arguments.problems)
    print(
        f"The published training subsets are not used: {sizes} of the 432 robots drawn with "
        f"seed {arguments.seed}."
    )
    if 3 in arguments.problems:
        print("5 % of problem 3's training labels are wrong, drawn likewise.")
    print("problem  weights  left  removed  paper  training accuracy    accuracy on all 432")
    results = []
    with _one_thread():
        for problem in arguments.problems:
            results.append(result := solve(problem, arguments))
            print(
                f"{problem:<7}  {result.weights:>7}  {result.kept:>4}  {result.removed:>7.0%}"
                f"  {result.paper:>5.0%}  {result.dense_training:>6.1%} → {result.training:<6.1%}"
                f"      {result.dense_all:>6.1%} → {result.all:.1%}"
            )
    files = ", ".join(str(arguments.output / f"monk{p}.onnx") for p in arguments.problems)
    print(f"Written and checked in ONNX Runtime: {files}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; return 0, 2 for bad input or usage, 1 for what else went wrong."""
    arguments = _arguments(argv)
    try:
        _study(arguments)
    except IobsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
