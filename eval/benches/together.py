"""What RULER's 13 tasks take when three settings share a run, and when each has a run of its own.

    python together.py LONGCTX MODEL.gguf SURROGATE ROUNDS rounds.jsonl      # a sample of each task a round; goes on
    python together.py table rounds.jsonl

Both ways in turns, on one thread, so that what else the machine does falls on both; CPU seconds, since it then says little of
wall time. What loading the model takes is measured in each round and taken off.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TASKS = """niah_single_1 niah_single_2 niah_single_3 niah_multikey_1 niah_multikey_2 niah_multikey_3 niah_multivalue
niah_multiquery vt cwe fwe qa_1 qa_2""".split()
THRESHOLDS = ["--threshold=-3", "--threshold=-2"]
ALONE = [["--method", "full"], *(["--method", "kvzap", threshold] for threshold in THRESHOLDS)]


def seconds(command):
    """CPU and wall seconds."""
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    cpu, wall = used(), time.monotonic()
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--threads", "1"], check=True, env=one, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return round(used() - cpu, 2), round(time.monotonic() - wall, 2)


def measure(longctx, model, surrogate, rounds, out):
    done = {(row["round"], row["task"]) for row in lines(out)}
    for number in range(int(rounds)):
        wanted = [task for task in TASKS if (number, task) not in done]
        if not wanted:
            continue
        load = seconds([longctx, "generate", "--model", model, "--prompt", "Hi", "--max-tokens", "1"])
        for task in wanted:
            with tempfile.TemporaryDirectory() as folder:

                def ask(name, more):
                    command = [longctx, "eval", "--model", model, "--surrogate", surrogate, "--tokens", "2048", "--samples", "1"]
                    results = f"{folder}/{name}"
                    took = seconds([*command, "--seed", str(42 + number), "--only", task, "--out", results, *more])
                    journals = [lines(path)[1] for path in sorted(Path(results).glob("*/journal.jsonl"))]
                    return took, {row["predicted_answer"] for row in journals}, [row["new_tokens"] for row in journals]

                together, texts, tokens = ask("together", THRESHOLDS)
                alone, others, _ = zip(*(ask(f"alone{at}", more) for at, more in enumerate(ALONE)))
                assert texts == set().union(*others), f"{task}: a shared run answers otherwise"
            row = {"round": number, "task": task, "new_tokens": tokens, "load": load, "together": together, "alone": alone}
            with open(out, "a") as file:
                file.write(json.dumps(row) + "\n")


def table(path):
    rows, total = lines(path), [0.0, 0.0]
    print("| CPU seconds, a sample | tokens written | together | one by one | |\n| --- | ---: | ---: | ---: | ---: |")
    for task in TASKS:
        of = [row for row in rows if row["task"] == task]
        if not of:
            continue
        mean = lambda value: sum(map(value, of)) / len(of)
        tokens = mean(lambda row: sum(row["new_tokens"]) / 3)
        together = mean(lambda row: row["together"][0] - row["load"][0])
        alone = mean(lambda row: sum(cpu - row["load"][0] for cpu, _ in row["alone"]))
        total = [total[0] + together, total[1] + alone]
        print(f"| {task} | {tokens:.0f} | {together:.1f} | {alone:.1f} | {alone / together:.2f}× |")
    print(f"| all | | {total[0]:.0f} | {total[1]:.0f} | {total[1] / total[0]:.2f}× |")


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).exists() else []


if __name__ == "__main__":
    table(sys.argv[2]) if sys.argv[1] == "table" else measure(*sys.argv[1:])
