"""Prompts of RULER's own generators, with the values that they drew, on small texts of our making.

The generators lie in $LONGCTX_DATA/ruler. What they import beside the standard library and numpy is replaced here by what does
the same on these texts: sentences end at marks (theirs is NLTK's splitter), tokens are words.
"""

import importlib.util
import json
import math
import os
import pathlib
import random
import re
import shutil
import sys
import tempfile
import types

import numpy

DATA = pathlib.Path(os.environ["LONGCTX_DATA"]) / "ruler"
ESSAY = " ".join(
    f"Sentence {n} speaks of {word}, and of {n * 7 % 11} other things{mark}"
    for n, (word, mark) in enumerate(zip("rivers kettles maps wind salt paper clocks bees".split() * 5, "..?.!..." * 5))
)
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Article {a}, paragraph {p}: the lamp of house {a}{p} is green.",
                    "qas": [
                        {"question": f"What is green in {a}{p}?", "is_impossible": False,
                         "answers": [{"text": "the lamp"}, {"text": "lamp"}]},
                        {"question": "What is blue?", "is_impossible": True, "answers": []},
                    ],
                }
                for p in range(4)
            ]
        }
        for a in range(3)
    ]
}
HOTPOT = [
    {
        "question": f"Which town lies by river {q}?",
        "answer": f"Town {q}",
        "supporting_facts": [[f"Title {q}-3", 0], [f"Title {q}-7", 1]],
        "context": [[f"Title {q}-{p}", [f"First of {q}-{p}.", f" Second of {q}-{p}."]] for p in range(10)],
    }
    for q in range(3)
]
WORDS = {
    "nounlist.txt": [f"noun{n}" for n in range(30)],
    "adjectivelist.txt": [f"adj{n}" for n in range(30)],
    "verblist.txt": [f"verb{n}" for n in range(60)],
}


def stub(name, **members):
    module = types.ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        if parent not in sys.modules:
            stub(parent)
        setattr(sys.modules[parent], child, module)


tokenizer = types.SimpleNamespace(text_to_tokens=str.split)
stub("long_context_eval.pred.nemo_utils", write_manifest=None)
stub("long_context_eval.data.tokenizer", select_tokenizer=lambda *_: tokenizer)
stub("tokenizer", select_tokenizer=lambda *_: tokenizer)
stub("nltk.tokenize", sent_tokenize=lambda text: re.split(r"(?<=[.?!])\s+", text))
stub("wonderwords.random_word", _get_words_from_text_file=WORDS.__getitem__)
stub("scipy.special", zeta=lambda alpha: {2.0: math.pi**2 / 6}[alpha])
stub("tqdm", tqdm=lambda items: items)

folder = pathlib.Path(tempfile.mkdtemp())
(folder / "json").mkdir()
for generator in DATA.glob("*.py"):
    shutil.copy(generator, folder)
for name, content in [("PaulGrahamEssays", {"text": ESSAY}), ("squad", SQUAD), ("hotpotqa", HOTPOT)]:
    (folder / "json" / f"{name}.json").write_text(json.dumps(content))
sys.path.insert(0, str(folder))
from constants import TASKS  # noqa: E402


class Recorder:
    """The module `random`, which remembers what it sampled from what."""

    def __init__(self):
        self.samples = []

    def __getattr__(self, name):
        return getattr(random, name)

    def sample(self, population, count):
        found = random.sample(population, count)
        self.samples.append((len(population), found))
        return found


def load(task, tokens=4096, **args):
    config = TASKS[task]
    argv = {"save_dir": folder, "save_name": "x", "tokenizer_path": "x", "max_seq_length": tokens, "num_samples": 1,
            "tokens_to_generate": config["tokens_to_generate"],
            "template": config["template"] + config["answer_prefix"], **args}
    sys.argv = ["x"] + [word for key, value in argv.items() for word in (f"--{key}", str(value))]
    spec = importlib.util.spec_from_file_location(f"generator_{task}", folder / f"{task}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.random = Recorder()
    return module


def shuffled(count):
    order = list(range(count))
    random.Random(42).shuffle(order)
    return order


def niah(name, hay, key, value, keys, values, queries, size):
    module = load("niah", type_haystack=hay, type_needle_k=key, type_needle_v=value, num_needle_k=keys,
                  num_needle_v=values, num_needle_q=queries)
    drawn = []
    generate = module.generate_random
    module.generate_random = lambda kind: drawn.append(generate(kind)) or drawn[-1]
    prompt, answers = module.generate_input_output(size)
    keys = max(keys, queries)
    step = 1 + values
    names = [drawn[k * step] for k in range(keys)]
    needles = [(names[k], drawn[k * step + 1 + v]) for k in range(keys) for v in range(values)]
    needles = [needles[at] for at in shuffled(len(needles))]
    (_, placed), (_, queried) = module.random.samples
    case = {"task": name, "needles": needles, "queries": [names[k] for k in queried], "answers": answers}
    if hay == "essay":
        case |= {"words": size, "depths": sorted(map(int, placed))}
    else:
        rest = iter(drawn[keys * step:])
        others = [(next(rest), next(rest)) for _ in range(size)] if hay == "needle" else size
        case |= {"lines": others, "before": sorted(placed, reverse=True)}
    return case | {"prompt": prompt}


def variables(tokens):
    module = load("variable_tracking", tokens=tokens)
    chains = []
    generate = module.generate_chains
    module.generate_chains = lambda *a, **k: chains.append(generate(*a, **k)) or chains[-1]
    example = module.sys_vartrack_w_noise_random(num_samples=1, max_seq_length=500, incremental=5)[0]

    def drawn():
        (names,), ((first, *_),) = chains[-1]
        lines, before = module.random.samples[-1]
        return {"names": names, "value": first.split(" = ")[1], "lines": lines, "before": sorted(before)}

    example_drawn = drawn()
    made = module.sys_vartrack_w_noise_random(num_samples=1, max_seq_length=tokens, icl_example=example)[0]
    prompt = made["input"]
    example_drawn["names"] = list(dict.fromkeys(re.findall(r"VAR ([A-Z]{3}) =", prompt)))
    return {"task": "vt", "example": example_drawn, **drawn(), "answers": made["outputs"], "prompt": prompt}


def common_words(tokens, size):
    module = load("common_words_extraction", tokens=tokens)
    prompt, answers = module.generate_input_output(size)
    lists = [re.findall(r"\d+\. (\S+)", part.split("\nQuestion")[0]) for part in prompt.split("Below is a numbered")[1:]]
    example = prompt.split("in the list are:")[1].split("\n")[0]
    return {"task": "cwe", "tokens": tokens, "size": size, "example": [re.findall(r"\d+\. (\S+)", example), lists[0]],
            "list": [answers, lists[1]], "answers": answers, "prompt": prompt}


def frequent_words(size, vocabulary):
    module = load("freq_words_extraction")
    prompt, answers, _ = module.generate_input_output(10**9, num_words=size, vocab_size=vocabulary)
    words = prompt.split("coded words. ", 1)[1].split("\nQuestion")[0].split(" ")
    return {"task": "fwe", "size": size, "ranks": vocabulary, "words": words, "answers": answers, "prompt": prompt}


def questions(name, dataset, index, size):
    module = load("qa", dataset=dataset)
    prompt, answers = module.generate_input_output(index, size)
    places = sorted((prompt.index(document), at) for at, document in enumerate(module.DOCS) if document in prompt)
    asked = module.QAS[index]
    return {"task": name, "question": index, "documents": [at for _, at in places], "answers": answers,
            "own": sorted(asked["context"]), "near": sorted(asked.get("more_context", [])), "all": len(module.DOCS),
            "prompt": prompt}


random.seed(7)
numpy.random.seed(7)
cases = [
    niah("niah_single_1", "repeat", "words", "numbers", 1, 1, 1, 6),
    niah("niah_single_2", "essay", "words", "numbers", 1, 1, 1, 150),
    niah("niah_single_3", "essay", "words", "uuids", 1, 1, 1, 99),
    niah("niah_multikey_1", "essay", "words", "numbers", 4, 1, 1, 200),
    niah("niah_multikey_2", "needle", "words", "numbers", 1, 1, 1, 7),
    niah("niah_multikey_3", "needle", "uuids", "uuids", 1, 1, 1, 5),
    niah("niah_multivalue", "essay", "words", "numbers", 1, 4, 1, 250),
    niah("niah_multiquery", "essay", "words", "numbers", 1, 1, 4, 300),
    variables(900),
    common_words(1024, 60),
    common_words(4096, 40),
    frequent_words(300, 20),
    frequent_words(1000, 81),
    questions("qa_1", "squad", 5, 3),
    questions("qa_1", "squad", 2, 9),
    questions("qa_2", "hotpotqa", 1, 10),
    questions("qa_2", "hotpotqa", 2, 17),
]
golden = {"essay": ESSAY, "squad": json.dumps(SQUAD), "hotpot": json.dumps(HOTPOT), "cases": cases}
pathlib.Path("prompts.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")
