"""Tiny data sets of our own making in the layout of the hub's: a folder a data set, parquet in parts, JSON lines beside.

Versions: Python 3.11, datasets 5.2.0, pyarrow 26.0.1. Columns are those of simonjegou/ruler and Xnhyacinth/LongBench.

    python make.py          # writes beside itself
"""

import json
from pathlib import Path

from datasets import Dataset

here = Path(__file__).parent


def write(name, rows, parts, of_group):
    folder = here / name
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-len(rows) // parts)
    for part in range(parts):
        path = folder / f"test-{part:05}-of-{parts:05}.parquet"
        Dataset.from_list(rows[part * size : (part + 1) * size]).to_parquet(path, batch_size=of_group)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder.parent / f"{folder.name}.jsonl").write_text(lines)


ruler = [
    {
        "context": f'The "pass"\tword of {who} is {word}. Größe 字 🦀\n' * (60 if who == "Ann" else 2),
        "question": f"What is the word of {who}? ",
        "answer_prefix": f"The word of {who} is",
        "answer": [word, f"{word}s"],
        "task": task,
        "max_new_tokens": 128,
    }
    for task in ("niah_single_1", "vt", "qa_1")
    for who, word in (("Ann", "apple"), ("Bob", "bread"), ("Cy", "cake"))
]
write("ruler/4096", ruler, parts=2, of_group=2)

longbench = [
    {
        "context": f"The following are given passages.\n{who} is at home.\n",
        "question": f"Where is {who}?",
        "answer_prefix": "Answer:",
        "answers": answers,
        "all_classes": None,
        "length": 5000 + len(who),
        "task": "hotpotqa",
        "max_new_tokens": 52,
    }
    for who, answers in (("Ann", ["home"]), ("Bob", ["home", "at home"]))
]
write("longbench/hotpotqa", longbench, parts=1, of_group=1000)
