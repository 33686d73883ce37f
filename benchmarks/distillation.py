"""Distil sparse models as a whole, and judge them beside the undistilled ones.

    python benchmarks/distillation.py --task resnet20 --sparsity 2:4 --steps 400

Each call prints one line of JSON: figures of the dense, the sparse and the distilled model, steps,
rows (tokens, images) and CPU seconds. A sparse model is pruned once, with the default options.
No text, story or image that is trained on judges; see `quality_tasks.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_tasks import TASKS, Task, found, perplexity

import iobs_onnx
from iobs_onnx.passes import find_sites, load_model, rewrite, save_model
from iobs_onnx.pruning.distil import DistilSettings, distil, endless, kept_masks, mirrored, varied

ROOT = Path(__file__).resolve().parents[1]
Feed = dict[str, Any]


def main() -> None:
    """Prune, distil and judge one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--sparsity", default="2:4")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--batch", type=int, help="samples in a step")
    parser.add_argument("--loss", default="auto")
    parser.add_argument("--embeddings", action="store_true")
    parser.add_argument("--only-weights", action="store_true")
    parser.add_argument("--text", default="mixed", choices=("mixed", "docstrings"), help="minilm")
    parser.add_argument("--texts", type=int, default=1280, help="stories15m: texts it writes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--made", type=Path, default=ROOT / "build" / "models")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = TASKS[options.task](options.made, options.shared)
    name = f"{options.task}-{options.sparsity.replace(':', '').replace('%', '')}"
    sparse = options.made / f"{name}.onnx"
    if not sparse.exists():
        calibration = task.calibration(task.count)
        iobs_onnx.prune(
            task.model, sparsity=options.sparsity, calibration=calibration, output=str(sparse)
        )
    feeds, held_out = DATA[options.task](task, options)
    row = run(task, sparse, feeds, held_out, options)
    print(json.dumps({"task": options.task, "sparsity": options.sparsity, **row}), flush=True)


def run(
    task: Task, sparse: Path, feeds: Iterator[Feed], held_out: Sequence[Feed], options: Any
) -> dict[str, Any]:
    """Distil a model and return the figures."""
    dense, model = load_model(task.model), load_model(sparse)

    def told(step: int, steps: int, loss: float) -> None:
        if step % max(1, steps // 20) == 0:
            print(f"{step}/{steps} held-out {loss:.4f}", file=sys.stderr, flush=True)

    began = time.process_time()
    done = distil(
        dense,
        model,
        feeds,
        held_out,
        kept=kept_masks(model, find_sites(model).sites),
        settings=DistilSettings(
            steps=options.steps,
            rate=options.rate,
            loss=options.loss,
            embeddings=options.embeddings,
            small=not options.only_weights,
            checks=10,
            seed=options.seed,
        ),
        told=told,
    )
    spent = time.process_time() - began
    if done.accepted:
        rewrite(model, done.tensors)
    output = options.made / f"{sparse.stem}-distilled.onnx"
    save_model(model, output)
    judge = JUDGES.get(options.task, lambda task, _, path: task.judge(path))
    return {
        "dense": judge(task, options, task.model),
        "undistilled": judge(task, options, sparse),
        "distilled": judge(task, options, output),
        "cpu_seconds": round(spent),
        **done.as_dict(),
    }


def stories_data(task: Task, options: Any) -> tuple[Iterator[Feed], list[Feed]]:
    """Text that the dense model wrote itself; sixteen of the texts judge."""
    rows = own_text(options.shared, options.made, options.texts + 16, options.seed)
    batch = options.batch or 4
    feeds = [{"input_ids": rows[at : at + batch]} for at in range(16, len(rows), batch)]
    held_out = [{"input_ids": rows[at : at + 4]} for at in range(0, 16, 4)]
    return _read_again(
        endless(feeds, options.seed), len(feeds), rows[16:, 1:], options.seed
    ), held_out


def _read_again(
    feeds: Iterator[Feed], fresh: int, tokens: np.ndarray[Any, Any], seed: int
) -> Iterator[Feed]:
    """Yield each text as it is once, and then other versions of it, as `distil self` does."""
    random, pool = np.random.default_rng(seed), tokens.ravel()
    for index, feed in enumerate(feeds):
        yield feed if index < fresh else varied(feed, pool, random)


def own_text(shared: Path, made: Path, count: int, seed: int) -> np.ndarray[Any, Any]:
    """Return texts of 256 tokens, sampled from the softmax of stories15M; `(count, 256)`.

    The ONNX file has no cache of keys and values. The same weights in transformers have one, and
    need not compute a text anew for each of its tokens.
    """
    file = made / f"stories15m-text-{seed}-{count}.npy"
    if file.exists():
        return np.load(file).astype(np.int64)
    sys.path.insert(0, str(ROOT / "tests" / "integrations"))
    import llama
    from transformers import DynamicCache, LlamaForCausalLM

    folder = made / "stories15m-transformers"
    if not folder.exists():
        tokenizer = found(shared / "models/stories15M.tokenizer.model")
        llama.rebuild(found(shared / "models/stories15M.onnx"), tokenizer, folder)
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(seed)
    parts = []
    with torch.inference_mode():
        for _ in range(0, count, 128):
            past, columns = DynamicCache(), [torch.full((128, 1), 1)]
            for _ in range(255):
                logits = model(input_ids=columns[-1], past_key_values=past, use_cache=True).logits
                shares = torch.softmax(logits[:, -1].float(), -1)
                columns.append(torch.multinomial(shares, 1, generator=generator))
            parts.append(torch.cat(columns, 1).numpy().astype(np.uint16))
    rows = np.concatenate(parts)[:count]
    np.save(file, rows)
    return rows.astype(np.int64)


def stories_judge(task: Task, options: Any, model: Path) -> dict[str, float]:
    """Perplexity of stories, and of text of another kind that the model never met: WikiText-2."""
    from sentencepiece import SentencePieceProcessor

    tokenizer = SentencePieceProcessor(
        model_file=str(found(options.shared / "models/stories15M.tokenizer.model"))
    )
    text = found(options.shared / "data/wikitext2/valid.txt").read_text(encoding="utf8")
    lines = [line.strip() for line in text.splitlines() if len(line.split()) > 40][:24]
    ids = [np.array([tokenizer.bos_id(), *tokenizer.encode(line)][:256]) for line in lines]
    return {**task.judge(model), "WikiText-2": perplexity(model, ids)}


def minilm_data(task: Task, options: Any) -> tuple[Iterator[Feed], list[Feed]]:
    """Docstrings, with sentences of WikiText-2 among them or without; some of each judge."""
    import minilm

    texts = minilm.docstrings(2048)[:2048]
    folder = options.shared / "data/wikitext2"
    lines = found(folder / "train_5k_lines.txt").read_text(encoding="utf8").splitlines()
    sentences = [s.strip() for line in lines for s in line.split(" . ") if len(s.split()) > 6]
    random.Random(options.seed).shuffle(sentences)
    held = minilm.feeds([*texts[:32], *sentences[:32]])
    chosen = [*texts[32:], *(sentences[32:6032] if options.text == "mixed" else ())]
    return _batches(chosen, options.batch or 16, options.seed), held


def _batches(texts: list[str], size: int, seed: int) -> Iterator[Feed]:
    """Yield batches of texts, shuffled anew each epoch."""
    import minilm

    order = random.Random(seed)
    texts = list(texts)
    while True:
        order.shuffle(texts)
        for at in range(0, len(texts) - size + 1, size):
            yield from minilm.feeds(texts[at : at + size], batch=size)


def image_data(task: Task, options: Any) -> tuple[Iterator[Feed], list[Feed]]:
    """The images that it was calibrated on, mirrored by chance; a tenth of them judges."""
    images = task.calibration(task.count)["x"]
    held, size = len(images) // 10, options.batch or 32
    rows = [{"x": images[at : at + size]} for at in range(held, len(images), size)]
    judging = [{"x": images[at : at + 20]} for at in range(0, held, 20)]
    return mirrored(endless(rows, options.seed), options.seed), judging


DATA = {
    "stories15m": stories_data,
    "minilm": minilm_data,
    "resnet20": image_data,
    "efficientnet": image_data,
    "efficientnet-mixed": image_data,
}
JUDGES = {"stories15m": stories_judge}

if __name__ == "__main__":
    main()
