"""What the machine can do with these threads, as a contestant: products, and reading memory.

`python -m benchmarks.limits THREADS`; `gemm` answers with GFLOP/s, or GOP/s of int8 products,
`read` with GB/s. Products are torch's; reading is the maximum of an array, a part of it in each
thread. The best of several repetitions and shapes: a bound that a program could reach, not the
data sheet's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from benchmarks.child import Commands, serve

# Large and square, and a training step's own: 128 tokens through an MLP map of GPT-2 124M.
SHAPES = ((2048, 2048, 2048), (512, 768, 3072), (128, 768, 3072))
READ_BYTES = 2**29  # far beyond any cache


def best(call: Callable[[], object], repetitions: int = 5) -> float:
    """Seconds of the fastest repetition."""
    seconds = []
    for _ in range(repetitions):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def load(threads: int) -> Commands:
    torch.set_num_threads(threads)
    parts = np.array_split(np.ones(READ_BYTES // 8), threads)
    pool = ThreadPoolExecutor(threads)

    def gemm(dtype: str) -> float:
        rates = []
        for rows, inner, columns in SHAPES:
            if dtype == "int8":
                a = torch.randint(-99, 99, (rows, inner), dtype=torch.int8)
                b = torch.randint(-99, 99, (inner, columns), dtype=torch.int8)
                seconds = best(lambda a=a, b=b: torch._int_mm(a, b))  # type: ignore[misc]
            else:
                a, b = torch.randn(rows, inner), torch.randn(inner, columns)
                seconds = best(lambda a=a, b=b: a @ b)  # type: ignore[misc]
            rates.append(2 * rows * inner * columns / seconds / 1e9)
        return max(rates)

    def read() -> float:
        return READ_BYTES / best(lambda: list(pool.map(np.max, parts))) / 1e9

    return {"gemm": gemm, "read": read}


if __name__ == "__main__":
    serve(lambda: load(int(sys.argv[1])))
