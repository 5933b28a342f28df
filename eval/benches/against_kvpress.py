"""The public Python harness on the prompts of `longctx eval`: do both score alike, with the full cache and pruned?

Versions: Python 3.11, torch 2.11.0, transformers 5.2.0, kvpress 0.5.5, gguf 0.19.0, accelerate 1.15.0.

    longctx eval --model M.gguf --task ruler --only niah_multikey_1,… --tokens 2048 --samples 20 --write-samples samples.jsonl
    python against_kvpress.py ask M.gguf SURROGATE samples.jsonl -3 answers.jsonl      # goes on where it stopped
    python against_kvpress.py compare answers.jsonl RESULTS                            # the folder that `longctx eval` filled

`ask` runs kvpress's own pipeline, a prefill for each setting, f32, with `DMSPress(KVzapPress)` for the pruned one; the
surrogate is read from a folder instead of the hub. `compare` pairs the answers and prints JSON.
"""

import json
import random
import sys
from pathlib import Path


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).exists() else []


def score(task, answers, text):
    """RULER's rule as kvpress applies it: any answer will do for a question, the share of all is taken elsewhere."""
    text = "".join(c for c in text.strip() if ord(c) >= 32).strip().lower()
    found = [answer.lower() in text for answer in answers]
    return float(any(found)) if task.startswith("qa") else sum(found) / len(found)


def ask(model_path, surrogate, samples, threshold, out):
    import torch
    from kvpress import DMSPress, KVzapPress
    from kvpress.presses.kvzap_press import KVzapModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    class Local(KVzapPress):
        def post_init_from_model(self, model):
            pass

    torch.set_num_threads(1)
    path = Path(model_path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    pipe = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer)
    scorer = Local()
    scorer.kvzap_model = KVzapModel.from_pretrained(surrogate, dtype=torch.float32)

    seen, numbered = {}, []
    for sample in lines(samples):
        index = seen[sample["task"]] = seen.get(sample["task"], -1) + 1
        numbered.append((index, sample))
    done = {(row["task"], row["index"], row["press"]) for row in lines(out)}
    with open(out, "a") as file:
        # A sample of every task before the next, so that a part of the run is a fair part.
        for index, sample in sorted(numbered, key=lambda pair: pair[0]):
            for name in ("no_press", "kvzap_mlp"):
                if (sample["task"], index, name) in done:
                    continue
                press = None if name == "no_press" else DMSPress(scorer, threshold=float(threshold))
                with torch.inference_mode():
                    answer = pipe(
                        sample["context"], question=sample["question"], answer_prefix=sample["answer_prefix"],
                        press=press, max_new_tokens=sample["max_new_tokens"],
                    )["answer"]  # fmt: skip
                row = {
                    "task": sample["task"], "index": index, "press": name, "threshold": float(threshold),
                    "predicted_answer": answer, "score": score(sample["task"], sample["answer"], answer),
                    "compression_ratio": 0.0 if press is None else press.compression_ratio,
                }  # fmt: skip
                file.write(json.dumps(row) + "\n")
                file.flush()


def interval(differences):
    """95 % of 10,000 resamples of a mean."""
    drawn = random.Random(1)
    means = sorted(sum(drawn.choices(differences, k=len(differences))) / len(differences) for _ in range(10_000))
    return [100 * means[250], 100 * means[9749]]


def compare(answers, results):
    ours = {}
    for journal in Path(results).glob("*/journal*.jsonl"):
        head, *rows = lines(journal)
        key = (head["settings"]["method"], head["settings"]["level"])
        for row in rows:
            ours[(row["task"], row["index"], *key)] = row
    table = {}
    for row in lines(answers):
        key = ("full", 0.0) if row["press"] == "no_press" else ("kvzap", row["threshold"])
        own = ours.get((row["task"], row["index"], *key))
        if own:
            for task in (row["task"], "all"):
                table.setdefault((row["press"], task), []).append((own, row))
    report = []
    for (press, task), pairs in sorted(table.items()):
        mean = lambda side: 100 * sum(pair[side]["score"] for pair in pairs) / len(pairs)
        apart = [own["score"] - row["score"] for own, row in pairs]
        report.append({
            "press": press, "task": task, "samples": len(pairs), "longctx": round(mean(0), 2), "kvpress": round(mean(1), 2),
            "difference": round(100 * sum(apart) / len(apart), 2), "interval": interval(apart),
            "other_scores": sum(a != 0 for a in apart),
            "same_texts": sum(own["predicted_answer"] == row["predicted_answer"] for own, row in pairs),
            "most_apart_in_removed": max(abs(own["compression_ratio"] - row["compression_ratio"]) for own, row in pairs),
        })  # fmt: skip
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    {"ask": ask, "compare": compare}[sys.argv[1]](*sys.argv[2:])
