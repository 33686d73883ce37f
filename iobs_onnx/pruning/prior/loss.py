"""What changes of single sites cost the whole model, by the gradient of its own loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iobs_onnx.errors import ModelError
from iobs_onnx.pruning.distil.curvature import root
from iobs_onnx.pruning.distil.losses import Target, find_targets
from iobs_onnx.pruning.distil.model import evaluator
from iobs_onnx.pruning.records import Run
from iobs_onnx.runtime import Feed
from iobs_onnx.runtime.data.open import PAD_MASK
from iobs_onnx.runtime.differentiable import Evaluator
from iobs_onnx.site import Site

# Gradients that costs are the mean over. Costs at three fractions from 128 are off by a sixth on
# ResNet-20, which moves a fraction by two hundredths.
DRAWS = 128


@dataclass(frozen=True)
class ModelLoss:
    """The loss that distillation minimises, near the dense model where it is 0.

    Attributes:
        evaluator: of the dense model.
        targets: its outputs, each with its loss.
        feeds: as they calibrate, spread evenly over the data where there are more than `DRAWS`.
        seed: of what is drawn.
    """

    evaluator: Evaluator
    targets: Sequence[Target]
    feeds: Sequence[Feed]
    seed: int

    @classmethod
    def of(cls, run: Run) -> ModelLoss:
        """Return the loss of a run's dense model.

        Raises:
            ModelError: torch cannot evaluate the model, or evaluates it otherwise than ONNX
                Runtime, or it has no output to match.
        """
        feeds = list(run.data.calibration)
        chosen = feeds[:: -(-len(feeds) // DRAWS)]
        try:
            targets = find_targets(run.dense, "auto")
            return cls(evaluator(run.dense, chosen[0], "dense"), targets, chosen, run.config.seed)
        except ModelError as error:
            why = str(error).removeprefix("distillation: ")
            raise ModelError(f"allocate loss: {why}; give allocate error or uniform") from error

    def costs(self, changes: Mapping[Site, NDArray[np.float32]]) -> dict[Site, NDArray[np.float64]]:
        """Return how much the loss rises where one site changes and all others stay dense.

        `½ ⟨ΔW, G ΔW⟩` with the Gauss-Newton matrix `G` of the loss, as the mean of `⟨∇φ, ΔW⟩²` over
        feeds and over random roots `φ` (:func:`iobs_onnx.pruning.distil.curvature.root`). It takes
        one forward pass a feed and one backward pass a root.

        Args:
            changes: `ΔW` of each site, one or more: `(changes, *stored shape)`, in the numbers that
                are stored.

        Returns:
            `(changes,)` of each site: nats a row for logits, relative squared errors else; 0 for a
            site on which no matched output depends.
        """
        leaves = {
            site.initializer: self.evaluator.weight(site.initializer).float().clone()
            for site in changes
        }
        for leaf in leaves.values():
            leaf.requires_grad_()
        moves = [torch.from_numpy(change).flatten(1) for change in changes.values()]
        sums = [np.zeros(len(move)) for move in moves]
        random = torch.Generator().manual_seed(self.seed)
        repeats = -(-DRAWS // len(self.feeds))
        for feed in self.feeds:
            for gradients in self._gradients(feed, leaves, repeats, random):
                for index, (move, gradient) in enumerate(zip(moves, gradients, strict=True)):
                    sums[index] += (move @ gradient.flatten()).double().square().numpy()
        count = repeats * len(self.feeds)
        return {site: total / count for site, total in zip(changes, sums, strict=True)}

    def _gradients(
        self, feed: Feed, leaves: Mapping[str, Tensor], repeats: int, random: torch.Generator
    ) -> Iterator[tuple[Tensor, ...]]:
        inputs = {name: torch.from_numpy(np.asarray(array)) for name, array in feed.items()}
        values = [target.value for target in self.targets]
        outputs = self.evaluator(inputs, weights=leaves, outputs=values)
        for left in range(repeats - 1, -1, -1):
            drawn = root(self.targets, outputs, inputs.get(PAD_MASK), random)
            if not drawn.requires_grad:
                raise ModelError(
                    "allocate loss: no output that could be matched depends on the weights by a "
                    "gradient; give allocate error or uniform"
                )
            yield torch.autograd.grad(
                drawn,
                list(leaves.values()),
                retain_graph=left > 0,
                allow_unused=True,
                materialize_grads=True,
            )
