"""Recurrent operators and attention written from their definitions, in NumPy, float64."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def lstm(x: Array, w: Array, r: Array, b: Array | None = None, h0=None, c0=None, **_) -> Array:
    def step(xt, state, w, r, bias):
        h, c = state
        i, o, f, g = np.split(xt @ w.T + h @ r.T + sum(np.split(bias, 2)), 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c

    return walk(step, x, w, r, b, (h0, c0))


def gru(
    x: Array, w: Array, r: Array, b: Array | None = None, h0=None, *, linear_before_reset=0, **_
):
    def step(xt, state, w, r, bias):
        [h] = state
        wb, rb = np.split(bias, 2)
        wz, wr, wh = np.split(xt @ w.T + wb, 3, axis=-1)
        rz, rr, rh = np.split(h @ r.T + rb, 3, axis=-1)
        z, reset = sigmoid(wz + rz), sigmoid(wr + rr)
        if linear_before_reset:
            new = np.tanh(wh + reset * rh)
        else:
            new = np.tanh(wh + (reset * h) @ r[len(r) // 3 * 2 :].T + rb[len(rb) // 3 * 2 :])
        return ((1 - z) * new + z * h,)

    return walk(step, x, w, r, b, (h0,))


def rnn(x: Array, w: Array, r: Array, b: Array | None = None, h0=None, **_) -> Array:
    def step(xt, state, w, r, bias):
        return (np.tanh(xt @ w.T + state[0] @ r.T + sum(np.split(bias, 2))),)

    return walk(step, x, w, r, b, (h0,))


def walk(step, x, w, r, b, start) -> Array:
    """Run both directions; returns (time, directions, batch, hidden)."""
    time, batch, _ = x.shape
    directions, gates, hidden = r.shape
    b = np.zeros((directions, 2 * gates)) if b is None else b
    result = np.zeros((time, directions, batch, hidden))
    for d in range(directions):
        state = tuple(np.zeros((batch, hidden)) if s is None else s[d].astype(float) for s in start)
        for t in range(time) if d == 0 else reversed(range(time)):
            state = step(x[t].astype(float), state, w[d], r[d], b[d])
            result[t, d] = state[0]
    return result


def previous_states(y: Array, h0: Array | None = None) -> Array:
    """Return the state before each step, (directions, time * batch, hidden), step by step."""
    time, directions, batch, hidden = y.shape
    rows = np.zeros((directions, time, batch, hidden))
    for d in range(directions):
        last = np.zeros((batch, hidden)) if h0 is None else h0[d]
        for t in range(time) if d == 0 else reversed(range(time)):
            rows[d, t] = last
            last = y[t, d]
    return rows.reshape(directions, -1, hidden)


def attention(x: Array, w: Array, b: Array, **_) -> Array:
    """One head."""
    q, k, v = np.split(x.astype(float) @ w + b, 3, axis=-1)
    scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]))
    return scores / scores.sum(-1, keepdims=True) @ v
