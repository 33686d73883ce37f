"""Sparse recovery with second-order information, on any twice-differentiable objective.

Find a vector `w`, `(d,)`, with at most `k` non-zeros that makes `f(w)` small. Three
algorithms share one loop, one set of options and one trace:

* :func:`k_iht`: gradient step of length 1/L, then the `k` largest;
* :func:`topk_iobs`: Newton step, then the `k` largest;
* :func:`iobs`: Newton step, then the projection in the metric of the Hessian: the removed
  set by its Optimal Brain Surgeon cost, the kept weights moved to make up for it.

They are the algorithms of D. Wu, I.-V. Modoranu, M. Safaryan, D. Kuznedelev, D. Alistarh,
"The Iterative Optimal Brain Surgeon: Faster Sparse Recovery by Leveraging Second-Order
Information", NeurIPS 2024 (arXiv:2408.17163), which calls them k-IHT, Topk-I-OBS and I-OBS.
`examples/sparse_recovery.py` repeats its synthetic study.
"""

from iobs_onnx.recovery.algorithms import iobs, k_iht, topk_iobs
from iobs_onnx.recovery.objective import (
    Objective,
    least_squares,
    logistic,
    quadratic,
    quadratic_regression,
)
from iobs_onnx.recovery.run import Iterate, Options, Recovery, Status, Trace

__all__ = [
    "Iterate",
    "Objective",
    "Options",
    "Recovery",
    "Status",
    "Trace",
    "iobs",
    "k_iht",
    "least_squares",
    "logistic",
    "quadratic",
    "quadratic_regression",
    "topk_iobs",
]
