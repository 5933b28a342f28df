"""How fast transformers runs the default model here: the number that models/BENCHMARKS.md holds ours against.

    python reference.py MODEL.gguf [--threads 2] [--context 2048] [--steps 64] [--runs 3]

Versions: Python 3.11, torch 2.11.0, transformers 5.2.0, gguf 0.19.0, accelerate 1.15.0. f32, SDPA, DynamicCache,
inference mode, logits of the last position only. Prefill: `context` random ids in one forward. Decode: `steps` single
tokens after them, so on average at context + steps / 2. One untimed run of each first. Prints one JSON object; run it
alone on the machine, in turns with `longctx bench --json`.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar


def measure(model, ids, steps):
    """Seconds of one prefill of `ids` and of `steps` greedy tokens after it."""
    cache = DynamicCache(config=model.config)
    begin = time.perf_counter()
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    filled = time.perf_counter()
    for _ in range(steps):
        logits = model(logits[:, -1].argmax(dim=-1, keepdim=True), past_key_values=cache, logits_to_keep=1).logits
    return filled - begin, time.perf_counter() - filled


def rates(tokens, seconds):
    return {"best_tps": tokens / min(seconds), "median_tps": tokens / statistics.median(seconds), "seconds": seconds}


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    for name, value in {"threads": 2, "context": 2048, "steps": 64, "runs": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(args.threads)

    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        args.model.parent, gguf_file=args.model.name, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    load = time.perf_counter() - begin
    ids = torch.randint(100, model.config.vocab_size, (1, args.context), generator=torch.Generator().manual_seed(0))
    measure(model, ids, 2)
    load_average = os.getloadavg()[0]
    prefill, decode = zip(*(measure(model, ids, args.steps) for _ in range(args.runs)))
    print(
        json.dumps(
            {
                "engine": f"transformers {transformers.__version__}, torch {torch.__version__}",
                "model": args.model.name,
                "dtype": "f32",
                "attention": model.config._attn_implementation,
                "threads": args.threads,
                "context": args.context,
                "steps": args.steps,
                "runs": args.runs,
                "load_seconds": load,
                "load_average": load_average,  # of the machine after the warm-up: near `threads` if nothing else runs
                "prefill": rates(args.context, prefill),
                "decode": rates(args.steps, decode),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
