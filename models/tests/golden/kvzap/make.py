"""A tiny random Llama pruned by kvpress: what KVzap (arXiv 2601.07891) drops, and the logits of the pruned cache.

Versions: Python 3.11, torch 2.11.0, transformers 5.2.0, kvpress 0.5.5, safetensors 0.8.0. Run `python make.py`
here: it writes beside itself, seeded, f32, one thread, in a minute.

model/             Llama: 3 layers, 4 query heads, 2 kv heads, head dim 16, hidden 64, vocab 128, tied, theta 10000
linear/, mlp/      random surrogates as kvpress's KVzapModel saves them
runs.json          the runs: {name, surrogate, prompt, window, threshold, decoding, forwards, rows, ratio}. The prompt is
                   ids[..prompt]; the forwards after it take the next 1 (or 7: a burst) ids each; ratio is kvpress's
                   removed share at the end (its mean over layers)
runs.safetensors   ids           i64 [512]      one stream, the same for all runs
                   {name}.dropped_at  u8 [L, H, tokens]  the forward after which kvpress masks the token: 0 the prefill,
                                  k the k-th forward after it, 255 never. The masked set after k is {dropped_at <= k}
                   {name}.logits  f32 [rows, vocab]  row r is fed after r tokens beyond the prompt, r of `rows`
                   {name}.scores  f32 [L, H, tokens] of the tokens kvpress scored (decoding off: the prompt), for linear
                                  and mlp runs with `decoding`
long.json, long.safetensors  a generation of 600 tokens, the same way, see long.py; dropped_at is i16 [L, H, tokens]
target.safetensors the KVzip+ training target of KVzap, see target.py
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from kvpress import DMSPress, KVzapPress
from kvpress.presses.kvzap_press import KVzapConfig, KVzapModel
from safetensors.torch import save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from target import target

HERE = Path(__file__).resolve().parent
LAYERS, HEADS, GROUP, DIM, HIDDEN, VOCAB = 3, 2, 2, 16, 64, 128
STEPS = [1] * 12


def fill(model, matrices):
    """N(0, 0.15) matrices: with transformers' own start attention is nearly uniform, and pruning would change little."""
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.normal_(1.0, 0.1) if "norm" in key else weight.normal_(0.0, matrices)
    return model.eval()


def llama():
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=LAYERS, head_dim=DIM,
        num_attention_heads=HEADS * GROUP, num_key_value_heads=HEADS, max_position_embeddings=512,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return fill(LlamaForCausalLM(config), 0.15)


def surrogate(hidden_dim):
    config = KVzapConfig(input_dim=HIDDEN, output_dim=HEADS, hidden_dim=hidden_dim, n_modules=LAYERS)
    return fill(KVzapModel(config), 0.2)


@dataclass
class Recorder(KVzapPress):
    """KVzapPress with a local surrogate instead of the hub's, keeping every score it gives."""

    seen: dict = field(default_factory=lambda: {layer: [] for layer in range(LAYERS)})

    def post_init_from_model(self, model):
        pass

    def score(self, module, *args):
        scores = super().score(module, *args)
        self.seen[module.layer_idx].append(scores[0])
        return scores

    def scores(self):
        return torch.stack([torch.cat(self.seen[layer], dim=-1) for layer in range(LAYERS)])


def run(model, surrogate, ids, prompt, forwards, threshold, decoding, window, dtype=torch.uint8):
    """One prefill and `forwards` later ones under kvpress. Returns dropped_at, logits, scores, ratio."""
    never = torch.iinfo(dtype).max
    recorder = Recorder()
    recorder.kvzap_model = surrogate
    press = DMSPress(recorder, threshold=threshold, sliding_window_size=window, decoding=decoding)
    dropped_at = torch.full((LAYERS, HEADS, prompt + sum(forwards)), never, dtype=dtype)
    cache, logits, at = DynamicCache(config=model.config), [], 0
    with press(model):
        for step, count in enumerate([prompt, *forwards]):
            out = model(ids[None, at : at + count], past_key_values=cache).logits[0]
            logits.append(out if step else out[-1:])
            at += count
            for layer in range(LAYERS):
                masked = model.model.layers[layer].self_attn.masked_key_indices
                if masked is not None:
                    row = dropped_at[layer]
                    new = torch.zeros_like(row, dtype=torch.bool)
                    new[masked[1], masked[2]] = True
                    row[new & (row == never)] = step
    return dropped_at, torch.cat(logits), recorder.scores(), press.compression_ratio


def middle(scores):
    """The middle of the widest gap around the median: half of the tokens go, and no score is near the threshold."""
    ordered = scores.flatten().sort().values
    ordered = ordered[int(0.45 * len(ordered)) : int(0.55 * len(ordered))]
    widest = ordered.diff().argmax()
    return round((ordered[widest] + ordered[widest + 1]).item() / 2, 4)


def runs(model, surrogates, ids):
    thresholds = {k: middle(run(model, s, ids, 300, [], 0.0, False, 300)[2]) for k, s in surrogates.items()}
    plans = [(s, n, STEPS, thresholds[s], d, 128) for s, d in (("linear", True), ("linear", False), ("mlp", True))
             for n in (1, 127, 128, 129, 130, 300)]  # fmt: skip
    for name, threshold in thresholds.items():
        plans.append((name, 130, [1] * 140, threshold, True, 128))  # decisions of decode take effect
        plans.append((name, 300, [7, 1, 1], threshold, True, 128))  # a burst
    plans.append(("linear", 300, [7, 1, 1], thresholds["linear"], False, 128))
    plans.append(("linear", 300, STEPS, 1e9, True, 128))  # everything goes: a sliding window
    plans.append(("mlp", 20, [1] * 30, thresholds["mlp"], True, 16))

    tensors, table = {"ids": ids}, []
    for name, prompt, forwards, threshold, decoding, window in plans:
        label = f"{name}_{prompt}" + {12: "", 3: "_burst", 140: "_long"}.get(len(forwards), f"_window{window}")
        label += ("" if decoding else "_prefill_only") + ("_all" if threshold == 1e9 else "")
        args = (model, surrogates[name], ids, prompt, forwards)
        dropped_at, logits, scores, ratio = run(*args, threshold, decoding, window)
        near = (scores - threshold).abs().min().item()
        assert near > 1e-4, f"{label}: a score lies {near} from the threshold, change the seed"
        rows = range(0, len(logits), 10 if len(logits) > 100 else 1)
        table.append({"name": label, "surrogate": name, "prompt": prompt, "window": window, "threshold": threshold,
                      "decoding": decoding, "forwards": forwards, "rows": list(rows), "ratio": ratio})  # fmt: skip
        tensors[f"{label}.dropped_at"] = dropped_at
        tensors[f"{label}.logits"] = logits[rows].contiguous()
        if decoding:
            tensors[f"{label}.scores"] = scores
        gap = (logits - run(*args, -1e9, decoding, window)[1]).abs().amax(dim=1)
        print(f"{label:28} removed {ratio:.3f}, nearest score {near:.1e}, logits moved by at most {gap.max():.2f}")
        assert gap[0] == 0 and (gap.max() > 0.1) == bool((dropped_at < len(forwards)).any()), label
    assert len({row["name"] for row in table}) == len(table)
    (HERE / "runs.json").write_text("[\n" + ",\n".join(map(json.dumps, table)) + "\n]\n")
    save_file(tensors, HERE / "runs.safetensors")


@torch.no_grad()
def main():
    disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(7)
    model, surrogates = llama(), {"linear": surrogate(None), "mlp": surrogate(HIDDEN // 8)}
    for name, module in {"model": model, **surrogates}.items():
        shutil.rmtree(HERE / name, ignore_errors=True)
        module.save_pretrained(HERE / name)
    ids = torch.randint(0, VOCAB, (512,))
    runs(model, surrogates, ids)
    save_file(target(model, ids), HERE / "target.safetensors")
    import long  # reads what was written, and this file

    long.main()


if __name__ == "__main__":
    main()
