"""Times a surrogate's first GEMM alone in cuBLAS, by graph replay, and prints JSON rows for bench_scores.

With its bias, as torch's Linear has it; GELU, the second layer and the threshold are not in it. Weights and hidden states
rotate, so that a replay reads far more than the L2 holds; the median of 40 replays counts.
"""

import json
import statistics

import torch

TOKENS = [1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192, 16384, 32768]
SHAPES = [(4096, 512), (5120, 640), (4096, 0)]
HEADS = 8
READ = 200 << 20


def time(tokens, dim, width):
    """Microseconds of a linear layer; without hidden units it is the linear surrogate's own."""
    rows = width or HEADS
    copies = min(max(-(-READ // (2 * dim * (rows + tokens))), 2), 64)
    layers = [torch.nn.Linear(dim, rows, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    hidden = [torch.rand(tokens, dim, device="cuda", dtype=torch.bfloat16) * 2 - 1 for _ in range(copies)]

    def work():
        for layer, x in zip(layers, hidden):
            layer(x)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for i in range(43):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) * 1e3 / copies)
    return statistics.median(times)


def main():
    rows = []
    with torch.no_grad():
        for dim, width in SHAPES:
            for tokens in TOKENS:
                us = round(time(tokens, dim, width), 2)
                rows.append({"tokens": tokens, "dim": dim, "width": width, "us": us})
    print(json.dumps(rows))


main()
