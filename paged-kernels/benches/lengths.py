"""Kept lengths of each layer, sequence and kv head, for `bench_cuda`: those that the peers are timed on.

Usage: lengths.py > lengths.txt. A line `CASE KEEP DIST SEQUENCES TOKENS LAYERS`, then LAYERS lines of SEQUENCES x 8 lengths.
"""

import numpy as np

HEADS, DIM, PAGE, WINDOW, SEED = 8, 128, 16, 128, 20261125
FOOTPRINT, PAGES = 768 << 20, 1 << 20
MAIN = [(1, 4096), (1, 32768), (1, 131072), (8, 32768), (32, 8192), (64, 4096)]
KEEPS = [(1.0, "uniform"), (0.25, "ragged"), (0.25, "uniform"), (0.25, "onehead")]


def lengths(b, t, keep, dist, layers):
    """[layers, b * HEADS]. A head keeps a share of the tokens before the window, and the window."""
    rows, old = b * HEADS, t - WINDOW
    if keep >= 1.0:
        return np.full((layers, rows), t)
    if dist == "uniform":
        return np.full((layers, rows), round(keep * old) + WINDOW)
    rng = np.random.default_rng([SEED, b, t, int(keep * 1000)])
    if dist == "onehead":
        r = np.full((layers, b, HEADS), max(0.0, (HEADS * keep - 1) / (HEADS - 1)))
        np.put_along_axis(r, rng.integers(0, HEADS, size=(layers, b, 1)), 1.0, axis=2)
        return np.rint(r * old).astype("int64").reshape(layers, rows) + WINDOW
    r = rng.beta(2 * keep, 2 * (1 - keep), size=(layers, rows))
    for _ in range(100):
        r = np.clip(r * (keep / r.mean(axis=1, keepdims=True)), 0.0, 1.0)
    return np.rint(r * old).astype("int64") + WINDOW


for b, t in MAIN:
    for keep, dist in KEEPS:
        probe = lengths(b, t, keep, dist, 1)
        layers = max(4 if dist == "uniform" else 12, min(64, -(-FOOTPRINT // int(probe.sum() * 4 * DIM))))
        pages = int(((probe + PAGE - 1) // PAGE).sum()) + b * HEADS + 64
        layers = max(1, min(layers, PAGES // pages))
        print(f"{b}x{t // 1024}k", keep, dist, b, t, layers)
        for row in lengths(b, t, keep, dist, layers):
            print(*row)
