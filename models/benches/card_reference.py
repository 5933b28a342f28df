"""What transformers and kvpress take on a card: the rows that models/BENCHMARKS.md holds ours against.

    python card_reference.py MODEL_FOLDER [--results results/h100.json] [--date 2026-11-26] [--compile-seconds 150]

Versions: torch 2.11.0 (CUDA 13), transformers 5.2.0, kvpress 0.5.5. MODEL_FOLDER holds config.json; weights are random bf16,
attention is SDPA. Run it on the card that `longctx bench --device cuda --random-weights` has just left.

Prefill is the median of three, logits of the last position only. A decode step is measured twice: its kernels' time by the
profiler, and the wall's, when each step is queued as soon as it can be, which for eager steps is the host's. The compiled
static cache is what `generate(cache_implementation="static")` runs; no case is compiled after so many seconds. kvpress's press
is DMSPress(KVzapPress) with a random MLP of 512 units that removes three quarters, in the prefill only, its cheaper way. Its
caches before a step are random rows and a random mask, uneven over heads.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

CONTEXTS = [4096, 16384, 32768]
STEPS_AT = [(1, 4096), (1, 32768), (8, 32768)]
COMPILED_AT = [(1, 4096), (1, 32768)]
WARM, STEPS, KEEP, WINDOW, WIDTH = 6, 16, 0.25, 128, 512
DEVICE = "cuda"


class Rows:
    def __init__(self, model, date):
        self.model, self.date, self.rows = model, date, []

    def add(self, what, engine, case, keep, value, unit):
        row = {"what": what, "engine": engine, "model": self.model, "case": case, "keep": keep, "value": round(value, 3)}
        row |= {"unit": unit, "floor": None, "card": torch.cuda.get_device_name(0), "date": self.date}
        self.rows.append(row)
        print(f"{engine:40} {what:15} {case:9} {value:10.3f} {unit}", flush=True)

    def merge(self, path):
        """Puts the rows into the file, each in the place of one that says the same of the same case, as the bench does."""
        key = lambda row: tuple(row[name] for name in ("what", "engine", "model", "case", "keep", "card"))
        rows = {key(row): row for row in json.loads(path.read_text())} if path.exists() else {}
        rows |= {key(row): row for row in self.rows}
        beside = path.with_suffix(".new")
        beside.write_text("[\n" + ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows.values()) + "\n]\n")
        beside.rename(path)


def now():
    torch.cuda.synchronize()
    return time.perf_counter()


def ids(model, texts, tokens):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (texts, tokens), generator=generator).to(DEVICE)


def filled(model, cache, texts, tokens):
    """Random keys and values in place of a prompt's: a step costs the same."""
    config = model.config
    shape = (texts, config.num_key_value_heads, tokens, config.head_dim)
    for layer in range(config.num_hidden_layers):
        rows = [torch.randn(shape, dtype=model.dtype, device=DEVICE) for _ in range(2)]
        cache.update(*rows, layer)
    return cache


def prefill(rows, engine, keep, model, tokens):
    seconds = []
    for _ in range(4):
        start = now()
        model(ids(model, 1, tokens), past_key_values=DynamicCache(), logits_to_keep=1)
        seconds.append(now() - start)
    rows.add("prefill", engine, f"1x{tokens}", keep, 1e3 * statistics.median(seconds[1:]), "ms")


def decode(rows, engine, keep, model, cache, texts, tokens, call=None):
    call, case = call or model, f"{texts}x{tokens}"
    token = ids(model, texts, 1)

    def step():
        nonlocal token
        token = call(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    for _ in range(WARM):
        step()
    start = now()
    for _ in range(STEPS):
        step()
    wall = (now() - start) / STEPS
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    on_card = [event.device_time for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    rows.add("decode kernels", engine, case, keep, sum(on_card) / 3e3, "ms")
    rows.add("decode wall", engine, case, keep, 1e3 * wall, "ms")
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    rows.add("KV held", engine, case, keep, held / 1e9, "GB")


def of_transformers(rows, model, compile_seconds):
    engine = f"transformers {transformers.__version__}"
    for tokens in CONTEXTS:
        prefill(rows, engine, 1.0, model, tokens)
    for texts, tokens in STEPS_AT:
        decode(rows, engine, 1.0, model, filled(model, DynamicCache(), texts, tokens), texts, tokens)
        torch.cuda.empty_cache()
    start = now()
    for texts, tokens in COMPILED_AT:
        if now() - start > compile_seconds:
            break
        torch._dynamo.reset()
        vars(model).pop("_compiled_call", None)
        cache = filled(model, StaticCache(config=model.config, max_cache_len=tokens), texts, tokens - 64)
        call = model.get_compiled_call(None)
        decode(rows, f"{engine}, compiled static cache", 1.0, model, cache, texts, tokens, call)
    torch._dynamo.reset()


def of_kvpress(rows, model):
    import kvpress  # which patches attention for all that follows
    from importlib.metadata import version
    from kvpress.presses.kvzap_press import KVzapConfig, KVzapModel

    engine, config = f"kvpress {version('kvpress')}", model.config
    heads, layers = config.num_key_value_heads, config.num_hidden_layers
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # KVzapPress finds its surrogate by the model's name
        model.config.name_or_path = "random/model"
        shape = dict(input_dim=config.hidden_size, output_dim=heads, hidden_dim=WIDTH, n_modules=layers)
        KVzapModel(KVzapConfig(**shape)).to(model.dtype).save_pretrained("nvidia/KVzap-mlp-model")
        press = kvpress.DMSPress(kvpress.KVzapPress(model_type="mlp"), threshold=-torch.inf, sliding_window_size=WINDOW)
        with press(model):
            for tokens in CONTEXTS:
                press.threshold = -torch.inf
                model(ids(model, 1, tokens), past_key_values=DynamicCache(), logits_to_keep=1)
                scores = torch.cat([scores.flatten() for scores in press.scores_buffer.values()]).float()
                press.threshold = scores.quantile(1 - KEEP).item()
                prefill(rows, engine, KEEP, model, tokens)
                print(f"  of {tokens} tokens it masks {press.compression_ratio:.3f}", flush=True)
        os.chdir("/")
    for texts, tokens in STEPS_AT:
        cache = filled(model, DynamicCache(), texts, tokens)
        for layer in model.model.layers:
            scores = torch.randn((texts, heads, tokens - WINDOW), device=DEVICE)
            scores += 0.7 * torch.randn((texts, heads, 1), device=DEVICE)
            dropped = scores.flatten().kthvalue(int(scores.numel() * (1 - KEEP))).values
            layer.self_attn.masked_key_indices = list(torch.where(scores < dropped))
        decode(rows, engine, KEEP, model, cache, texts, tokens)
        for layer in model.model.layers:
            layer.self_attn.masked_key_indices = None
        del cache
        torch.cuda.empty_cache()


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--date", default="")
    parser.add_argument("--compile-seconds", type=float, default=150)
    args = parser.parse_args()
    if args.results:
        args.results = args.results.absolute()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    with torch.device(DEVICE):
        config = AutoConfig.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    rows = Rows(args.model.name, args.date)
    of_transformers(rows, model, args.compile_seconds)
    of_kvpress(rows, model)
    if args.results:
        rows.merge(args.results)


if __name__ == "__main__":
    main()
