"""RNN, GRU and LSTM, step by step; the inputs of all steps are multiplied at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iobs_onnx.runtime.differentiable.activations import by_name
from iobs_onnx.runtime.differentiable.context import Context
from iobs_onnx.runtime.differentiable.linear import product

Activation = Callable[[Tensor], Tensor]

# Parameters that activations take where the node gives none; None for those that take none.
_PARAMETERS: dict[str, tuple[float | None, float | None]] = {
    "Affine": (1.0, 0.0),
    "Elu": (1.0, None),
    "HardSigmoid": (0.2, 0.5),
    "LeakyRelu": (0.01, None),
    "ScaledTanh": (1.0, 1.0),
    "ThresholdedRelu": (1.0, None),
}
_DEFAULTS = {
    "RNN": ("Tanh",),
    "GRU": ("Sigmoid", "Tanh"),
    "LSTM": ("Sigmoid", "Tanh", "Tanh"),
}
_NAMES = {name.lower(): name for name in (*_PARAMETERS, "Relu", "Sigmoid", "Softplus", "Softsign")}
_NAMES["tanh"] = "Tanh"


@dataclass(frozen=True)
class _Direction:
    """One direction of a node.

    Attributes:
        projected: `(seq, batch, gates · hidden)`, inputs times W with both biases where they add.
        recurrent: R, `(gates · hidden, hidden)`.
        bias: of R where it must not be added beforehand, `(gates · hidden,)`.
        peepholes: P, `(3 · hidden,)`.
        activations: in the order of the node.
    """

    projected: Tensor
    recurrent: Tensor
    bias: Tensor | None
    peepholes: Tensor | None
    activations: Sequence[Activation]
    clip: float | None


def rnn(
    context: Context,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """RNN."""
    y, h, _ = _run(context, _rnn_step, x, w, r, b, lengths, initial_h, None, None)
    return y, h


def gru(
    context: Context,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """GRU; gates in the order z, r, h."""
    step = _gru_reset_after if context.integer("linear_before_reset", 0) else _gru_reset_before
    y, h, _ = _run(context, step, x, w, r, b, lengths, initial_h, None, None)
    return y, h


def lstm(
    context: Context,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    peepholes: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """LSTM; gates in the order i, o, f, c."""
    step = _lstm_coupled if context.integer("input_forget", 0) else _lstm_step
    return _run(context, step, x, w, r, b, lengths, initial_h, initial_c, peepholes)


_Step = Callable[[_Direction, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _run(
    context: Context,
    step: _Step,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    lengths: Tensor | None,
    initial_h: Tensor | None,
    initial_c: Tensor | None,
    peepholes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch_first = bool(context.integer("layout", 0))
    if batch_first:
        x = x.transpose(0, 1)
        initial_h, initial_c = (
            None if state is None else state.transpose(0, 1) for state in (initial_h, initial_c)
        )
    name = context.text("direction", "forward")
    backwards = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[name]
    hidden = r.shape[-1]
    zeros = x.new_zeros(x.shape[1], hidden)
    found = []
    for index, reverse in enumerate(backwards):
        direction = _direction(
            context,
            index,
            x,
            w[index],
            r[index],
            None if b is None else b[index],
            None if peepholes is None else peepholes[index],
        )
        h = zeros if initial_h is None else initial_h[index]
        c = zeros if initial_c is None else initial_c[index]
        found.append(_walk(direction, step, h, c, lengths, reverse))
    y = torch.stack([one[0] for one in found], 1)
    h, c = (torch.stack([one[part] for one in found]) for part in (1, 2))
    if batch_first:
        return y.permute(2, 0, 1, 3), h.transpose(0, 1), c.transpose(0, 1)
    return y, h, c


def _direction(
    context: Context,
    index: int,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    peepholes: Tensor | None,
) -> _Direction:
    projected = product(x, w.t())
    rest = None
    if b is not None:
        bias, rest = b.chunk(2)
        projected = projected + bias
        if not (context.op_type == "GRU" and context.integer("linear_before_reset", 0)):
            projected, rest = projected + rest, None
    clip = context.number("clip", 0.0) or None
    return _Direction(projected, r, rest, peepholes, _activations(context, index), clip)


def _activations(context: Context, index: int) -> list[Activation]:
    """Return the activations of one direction; alphas and betas go to those that take them."""
    defaults = _DEFAULTS[context.op_type]
    names = context.attributes.get("activations") or defaults * 2
    alphas = iter(context.attributes.get("activation_alpha", ()))
    betas = iter(context.attributes.get("activation_beta", ()))
    made: list[Activation] = []
    for given in names:
        name = _NAMES.get(given.lower(), given)
        alpha, beta = _PARAMETERS.get(name, (None, None))
        alpha = next(alphas, alpha) if alpha is not None else None
        beta = next(betas, beta) if beta is not None else None
        made.append(_activation(context, name, [p for p in (alpha, beta) if p is not None]))
    return made[index * len(defaults) :][: len(defaults)]


def _activation(context: Context, name: str, parameters: Sequence[float]) -> Activation:
    return lambda x: by_name(context, name, x, *parameters)


def _walk(
    direction: _Direction,
    step: _Step,
    h: Tensor,
    c: Tensor,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the states `(seq, batch, hidden)` and the last two."""
    gates = direction.projected.unbind(0)
    order = range(len(gates))
    states: list[Tensor] = [h] * len(gates)
    for place in reversed(order) if reverse else order:
        new_h, new_c = step(direction, gates[place], h, c)
        if lengths is None:
            h, c, states[place] = new_h, new_c, new_h
            continue
        there = (lengths > place).to(h.device)[:, None]
        h, c = torch.where(there, new_h, h), torch.where(there, new_c, c)
        states[place] = torch.where(there, new_h, 0)
    y = torch.stack(states) if states else direction.projected.new_zeros(0, *h.shape)
    return y, h, c


def _clipped(direction: _Direction, x: Tensor) -> Tensor:
    return x if direction.clip is None else x.clamp(-direction.clip, direction.clip)


def _rnn_step(d: _Direction, gates: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    (f,) = d.activations
    return f(_clipped(d, gates + torch.mm(h, d.recurrent.t()))), c


def _gru_reset_before(d: _Direction, gates: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    f, g = d.activations
    hidden = h.shape[-1]
    both = gates[:, : 2 * hidden] + torch.mm(h, d.recurrent[: 2 * hidden].t())
    z, r = f(_clipped(d, both)).chunk(2, -1)
    inner = gates[:, 2 * hidden :] + torch.mm(r * h, d.recurrent[2 * hidden :].t())
    n = g(_clipped(d, inner))
    return (1 - z) * n + z * h, c


def _gru_reset_after(d: _Direction, gates: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    f, g = d.activations
    hidden = h.shape[-1]
    own = torch.mm(h, d.recurrent.t())
    own = own if d.bias is None else own + d.bias
    z, r = f(_clipped(d, gates[:, : 2 * hidden] + own[:, : 2 * hidden])).chunk(2, -1)
    n = g(_clipped(d, gates[:, 2 * hidden :] + r * own[:, 2 * hidden :]))
    return (1 - z) * n + z * h, c


def _lstm_step(d: _Direction, gates: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return _lstm(d, gates, h, c, coupled=False)


def _lstm_coupled(d: _Direction, gates: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return _lstm(d, gates, h, c, coupled=True)


def _lstm(
    d: _Direction, gates: Tensor, h: Tensor, c: Tensor, coupled: bool
) -> tuple[Tensor, Tensor]:
    f, g, out = d.activations
    i, o, forget, cell = (gates + torch.mm(h, d.recurrent.t())).chunk(4, -1)
    p_i, p_o, p_f = (None,) * 3 if d.peepholes is None else d.peepholes.chunk(3)
    if p_i is not None and p_f is not None:
        i, forget = i + p_i * c, forget + p_f * c
    i = f(_clipped(d, i))
    keep = 1 - i if coupled else f(_clipped(d, forget))
    c = keep * c + i * g(_clipped(d, cell))
    if p_o is not None:
        o = o + p_o * c
    return f(_clipped(d, o)) * out(c), c
