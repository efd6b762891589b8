"""Pre-train `gpt2-mini`, the small base model that this repository carries.

Design choices:

* GPT-2 as `transformers` defines it, trained from scratch: the result loads with
  `GPT2LMHeadModel.from_pretrained`. 9.0 M parameters, 18 MB in fp16.
* Its own byte-level BPE, learnt on the same text with an equal share per language.
* One pass is a permutation of non-overlapping windows: no window comes twice in an epoch.
* Muon (Jordan 2024) on the matrices of the blocks, AdamW on everything else, bf16 autocast.
* The schedule follows the clock: warm-up, then linear decay to zero at `--hours`. On a shared
  machine this ends when it should; the number of steps it reached is written down.
* A checkpoint every few minutes, written to a side file and renamed. Starting again resumes.

The text is one xz-packed JSON-lines file per language with `text` (or `turns`) and `split`:

    python -m export.gpt2_mini.pretrain train --data DIR --work DIR --hours 8
    python -m export.gpt2_mini.pretrain publish --work DIR --lambada FILE --out export/gpt2_mini
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

LANGUAGES = ("en", "de", "fr", "it", "nl")
END = "<|endoftext|>"
VOCABULARY = 16_384
CONTEXT = 256  # positions
BATCH = 32  # windows per step
PEAK_LR = {"muon": 3e-3, "adamw": 2e-3}
WARMUP = 0.02  # share of the budget
CHECKPOINT_SECONDS = 300.0
TOKENIZER_CHARS_PER_LANGUAGE = 8_000_000


def read_works(data: Path, language: str, split: str) -> Iterator[str]:
    """The works of one language and split ("train" or "valid"); a role of a play is one work."""
    for path in sorted(data.glob(f"{language}*.jsonl.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                work: dict[str, Any] = json.loads(line)
                if work["split"] == split:
                    yield work["text"] if "text" in work else "\n".join(work["turns"])


def train_tokenizer(data: Path, work: Path) -> None:
    def sample() -> Iterator[str]:
        for language in LANGUAGES:
            left = TOKENIZER_CHARS_PER_LANGUAGE
            for text in read_works(data, language, "train"):
                # A slice of each work, so that no single author fills the share.
                piece = text[: min(left, 600_000)]
                left -= len(piece)
                yield piece
                if left <= 0:
                    break

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(sample(), vocab_size=VOCABULARY, min_frequency=2, special_tokens=[END])
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe._tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        model_max_length=CONTEXT,
    ).save_pretrained(work / "tokenizer")


def load_tokenizer(work: Path) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    return tokenizer


def tokenize(data: Path, work: Path) -> None:
    """Writes `train.bin` and `valid-<language>.bin`: uint16 ids, every work ended by END."""
    tokenizer = load_tokenizer(work)
    end = tokenizer.convert_tokens_to_ids(END)

    def write(name: str, works: Iterator[str]) -> None:
        partial = work / f"{name}.partial"
        with partial.open("wb") as out:
            for text in works:
                ids = tokenizer(text, verbose=False)["input_ids"]
                np.asarray([*ids, end], np.uint16).tofile(out)
        partial.rename(work / f"{name}.bin")

    for language in LANGUAGES:
        write(f"valid-{language}", read_works(data, language, "valid"))
    write("train", (text for lang in LANGUAGES for text in read_works(data, lang, "train")))


def new_model() -> GPT2LMHeadModel:
    end = 0  # the tokenizer's trainer numbers the special token first
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=CONTEXT,
            n_embd=256,
            n_layer=6,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=end,
            eos_token_id=end,
        )
    )


class Batches:
    """Windows of CONTEXT + 1 tokens in an order that depends only on the seed and the epoch."""

    def __init__(self, tokens: np.ndarray, seed: int) -> None:
        self.tokens, self.seed = tokens, seed
        self.windows = (len(tokens) - 1) // CONTEXT
        self.per_epoch = self.windows // BATCH

    def at(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, within = divmod(step, self.per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(self.windows)
        starts = order[within * BATCH : (within + 1) * BATCH] * CONTEXT
        ids = np.stack([self.tokens[s : s + CONTEXT + 1] for s in starts]).astype(np.int64)
        return torch.from_numpy(ids[:, :-1]), torch.from_numpy(ids[:, 1:])


def loss_of(model: GPT2LMHeadModel, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    hidden = model.transformer(tokens).last_hidden_state
    logits = F.linear(hidden, model.lm_head.weight)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def optimizers(model: GPT2LMHeadModel) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if ".h." in n and p.ndim == 2]
    rest = [p for n, p in model.named_parameters() if not (".h." in n and p.ndim == 2)]
    return [
        torch.optim.Muon(
            matrices, lr=PEAK_LR["muon"], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            rest, lr=PEAK_LR["adamw"], betas=(0.9, 0.95), weight_decay=0.01, fused=True
        ),
    ]


def learning_rate(progress: float) -> float:
    """Factor on the peak rate at a share `progress` of the budget."""
    return min(progress / WARMUP, (1.0 - progress) / (1.0 - WARMUP), 1.0)


def save(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def train(data: Path, work: Path, hours: float, seed: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer").exists():
        train_tokenizer(data, work)
    if not (work / "train.bin").exists():
        tokenize(data, work)
    batches = Batches(np.memmap(work / "train.bin", np.uint16, "r"), seed)
    print(f"{len(batches.tokens):,} tokens, {batches.per_epoch:,} steps an epoch", flush=True)

    torch.manual_seed(seed)
    model = new_model()
    optims = optimizers(model)
    checkpoint = work / "checkpoint.pt"
    step, elapsed = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optim, saved in zip(optims, state["optimizers"], strict=True):
            optim.load_state_dict(saved)
        step, elapsed = state["step"], state["elapsed"]
    compiled = torch.compile(loss_of)
    started = saved_at = time.monotonic() - elapsed
    log = (work / "log.jsonl").open("a", buffering=1)
    average = math.nan
    while (progress := (time.monotonic() - started) / (hours * 3600)) < 1.0:
        for optim, peak in zip(optims, PEAK_LR.values(), strict=True):
            optim.param_groups[0]["lr"] = peak * learning_rate(max(progress, 1e-4))
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(model, *batches.at(step))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad()
        step += 1
        average = loss.item() if math.isnan(average) else 0.98 * average + 0.02 * loss.item()
        if step % 50 == 0:
            seconds = time.monotonic() - started
            line = {"step": step, "loss": round(average, 4), "seconds": round(seconds)}
            log.write(json.dumps(line) + "\n")
            print(f"{progress:6.1%} {line}", flush=True)
        if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
            saved_at = time.monotonic()
            save_state(checkpoint, model, optims, step, saved_at - started)
    save_state(checkpoint, model, optims, step, time.monotonic() - started)


def save_state(
    path: Path,
    model: GPT2LMHeadModel,
    optims: list[torch.optim.Optimizer],
    step: int,
    elapsed: float,
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizers": [optim.state_dict() for optim in optims],
        "step": step,
        "elapsed": elapsed,
    }
    save(path, state)


@torch.no_grad()
def perplexity(model: GPT2LMHeadModel, tokens: np.ndarray) -> float:
    """Over the whole of `tokens`, windows of CONTEXT without overlap, each token predicted once."""
    windows = (len(tokens) - 1) // CONTEXT
    total = 0.0
    for first in range(0, windows, BATCH):
        starts = range(first * CONTEXT, min(first + BATCH, windows) * CONTEXT, CONTEXT)
        ids = torch.from_numpy(np.stack([tokens[s : s + CONTEXT + 1] for s in starts]).astype("i8"))
        total += loss_of(model, ids[:, :-1], ids[:, 1:]).item() * len(starts)
    return math.exp(total / windows)


@torch.no_grad()
def lambada_accuracy(model: GPT2LMHeadModel, tokenizer: Any, path: Path) -> float:
    """Share of passages whose last word is predicted greedily, token by token (Paperno 2016)."""
    passages = [json.loads(line)["text"].strip() for line in path.open(encoding="utf-8")]
    right = 0
    for passage in passages:
        context, word = passage.rsplit(" ", 1)
        answer = tokenizer(" " + word)["input_ids"]
        ids = tokenizer(context)["input_ids"][-(CONTEXT - len(answer)) :] + answer
        logits = model(torch.tensor([ids])).logits[0, -len(answer) - 1 : -1]
        right += logits.argmax(-1).tolist() == answer
    return right / len(passages)


CARD = """---
license: apache-2.0
language: [en, de, fr, it, nl]
---
# gpt2-mini

A GPT-2 of {parameters:.1f} M parameters ({layers} layers, {width} wide, {heads} heads, {context}
positions) with its own byte-level BPE of {vocabulary:,} tokens. It is small enough to live in a
repository and exists to be personalised: it is the base of the demonstration and of the tests.
It is not a chat model and knows little.

## Data

Public-domain and CC0 books and plays in English, German, French, Italian and Dutch (Project
Gutenberg texts, ELTeC, DraCor, US presidential speeches): {tokens:.1f} M training tokens. Whole
works are held out for validation. No text of a user of the demonstration is in it.

## Recipe

`python -m export.gpt2_mini.pretrain` from random weights: {steps:,} steps of {batch} x {context}
tokens ({seen:.1f} M tokens, {epochs:.2f} epochs) in {hours:.2f} hours on two x86 cores that did
other work too; Muon on the block matrices (peak {muon}), AdamW on the rest (peak {adamw}), linear
warm-up and decay, weight decay 0.1 / 0.01, bf16 autocast, gradient norm clipped at 1.

## Measured

By `python -m export.gpt2_mini.pretrain publish`, on the fp16 weights in this folder, in fp32.
Perplexity is per token of this model's own tokenizer, over whole held-out works; it does not
compare with models that have another tokenizer.

| held-out text | perplexity |
|---|---|
{rows}

LAMBADA (last word, greedy, {lambada_n:,} passages): {lambada:.1%}.
"""


def publish(work: Path, lambada: Path, out: Path) -> None:
    """Writes weights (fp16), configuration, tokenizer and the measured model card to `out`."""
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    tokenizer = load_tokenizer(work)
    model = new_model()
    model.load_state_dict(state["model"])
    model.half().save_pretrained(out)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(out)
    model = GPT2LMHeadModel.from_pretrained(out, dtype=torch.float32)
    model.train(False)
    measured = {
        lang: perplexity(model, np.fromfile(work / f"valid-{lang}.bin", np.uint16))
        for lang in LANGUAGES
    }
    tokens = (work / "train.bin").stat().st_size // 2
    seen = state["step"] * BATCH * CONTEXT
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        layers=model.config.n_layer,
        width=model.config.n_embd,
        heads=model.config.n_head,
        context=CONTEXT,
        vocabulary=VOCABULARY,
        tokens=tokens / 1e6,
        steps=state["step"],
        batch=BATCH,
        seen=seen / 1e6,
        epochs=seen / tokens,
        hours=state["elapsed"] / 3600,
        **PEAK_LR,
        rows="\n".join(f"| {lang} | {value:.2f} |" for lang, value in measured.items()),
        lambada=lambada_accuracy(model, tokenizer, lambada),
        lambada_n=sum(1 for _ in lambada.open(encoding="utf-8")),
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    print(card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("train")
    run.add_argument("--data", type=Path, required=True, help="folder of <language>*.jsonl.xz")
    run.add_argument("--work", type=Path, required=True, help="checkpoints and token files")
    run.add_argument("--hours", type=float, required=True, help="wall-clock budget, all runs")
    run.add_argument("--seed", type=int, default=0)
    run.set_defaults(call=train)
    finish = commands.add_parser("publish")
    finish.add_argument("--work", type=Path, required=True)
    finish.add_argument("--lambada", type=Path, required=True, help="lambada_test.jsonl")
    finish.add_argument("--out", type=Path, required=True)
    finish.set_defaults(call=publish)
    arguments = vars(parser.parse_args())
    arguments.pop("call")(**arguments)


if __name__ == "__main__":
    main()
