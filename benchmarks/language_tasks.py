"""What a causal language model of English knows: LAMBADA's last words and MMLU's questions."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from quality_tasks import found

SHOTS, QUESTIONS, PASSAGES, CONTEXT = 5, 10, 400, 2048
# Logits `(tokens, vocabulary)` of tokens, and the tokens of a text.
Logits = Callable[[list[int]], NDArray[np.float32]]
Encode = Callable[[str], list[int]]


def passages(shared: Path) -> list[str]:
    """Return LAMBADA's passages, from novels."""
    file = found(shared / "data/lambada/first_2500.jsonl")
    lines = file.read_text(encoding="utf8").splitlines()[:PASSAGES]
    return [json.loads(line)["text"].strip() for line in lines]


def lambada(logits: Logits, encode: Encode, shared: Path) -> float:
    """Return how often the last word, token for token, is the likeliest continuation, percent."""
    right = 0
    for text in passages(shared):
        passage, word = text.rsplit(" ", 1)
        before, after = encode(passage), encode(" " + word)
        guess = logits(before + after)[len(before) - 1 : -1].argmax(-1)
        right += guess.tolist() == after
    return 100 * right / PASSAGES


def mmlu(logits: Logits, encode: Encode, shared: Path) -> float:
    """Return how often the letter of the right choice is the likeliest of the four, in percent.

    Five examples stand before a question, or as many as fit 2,048 tokens.
    """
    right = asked = 0
    folder = found(shared / "data/mmlu")
    letters = [encode(f" {letter}")[-1] for letter in "ABCD"]
    for file in sorted((folder / "test").glob("*.csv")):
        subject = file.stem.removesuffix("_test")
        examples = [_question(row, True) for row in _rows(folder / f"dev/{subject}_dev.csv")]
        head = f"The following are multiple choice questions about {subject.replace('_', ' ')}.\n\n"
        for row in _rows(file)[:QUESTIONS]:
            shots = examples[:SHOTS]
            while len(ids := encode(head + "".join(shots) + _question(row, False))) > CONTEXT:
                shots = shots[1:]
            right += int(logits(ids)[-1][letters].argmax()) == int(row["answer"])
            asked += 1
    return 100 * right / asked


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf8", newline="") as file:
        return list(csv.DictReader(file))


def _question(row: Mapping[str, str], answered: bool) -> str:
    choices = "".join(f"{'ABCD'[i]}. {row[f'choice{i}']}\n" for i in range(4))
    answer = f" {'ABCD'[int(row['answer'])]}\n\n" if answered else ""
    return f"{row['question']}\n{choices}Answer:{answer}"
