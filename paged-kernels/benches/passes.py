"""Measures what bench_passes is held to: the rate of a large bf16 matrix product, and torch's SDPA over contiguous keys.

Prints one number, TFLOP/s, to stdout, and a table of SDPA to stderr: 8 kv heads, 4 query heads each, head dim 128, every head
as long, no mask. Medians of 20 calls in a graph.
"""

import statistics
import sys

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa


def time(work, calls):
    """Microseconds of one of the `calls` that `work` makes."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(22):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times[2:])


def rand(*shape):
    return torch.rand(*shape, device="cuda", dtype=torch.bfloat16) * 2 - 1


def main():
    a, b = rand(8192, 8192), rand(8192, 8192)
    us = time(lambda: [a @ b for _ in range(4)], 4)
    print(f"{2 * 8192**3 / us / 1e6:.0f}")
    for kept in [2048, 8192, 32768]:
        layers = max(-(-(200 << 20) // (kept * 4096)), 1)
        cache = [(rand(1, 8, kept, 128), rand(1, 8, kept, 128)) for _ in range(layers)]
        for tokens in [16, 40, 128, 512, 2048]:
            queries = rand(1, 32, tokens, 128)
            us = time(lambda: [sdpa(queries, k, v, enable_gqa=True) for k, v in cache], layers)
            rate = kept * tokens * 32 * 128 * 4 / us / 1e6
            print(f"SDPA {tokens:5} over {kept:6}: {us:8.1f} us {rate:5.0f} TFLOP/s", file=sys.stderr)


with torch.no_grad():
    main()
