"""What kvpress's pipeline answers with the default model and the surrogates that kvzap ships: pipeline.json.

Versions: Python 3.11, torch 2.11.0, transformers 5.2.0, kvpress 0.5.5, gguf 0.19.0, accelerate 1.15.0. LONGCTX_MODEL names the
GGUF file (sha256 b179c952...db53). Writes beside itself, greedy and in f32.

  context   a text of about 900 tokens, written for this repository
  cases     [{name, surrogate, threshold, questions, context, answers, removed}]: the method is DMSPress(KVzapPress), in the prefill
            only; `context` is what a query-aware case reads in the text's place; `removed` is the share that kvpress counts
"""

import json
import os
from pathlib import Path

import torch
from kvpress import DMSPress, KVzapPress
from kvpress.presses.kvzap_press import KVzapModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
TOKENS = 24
SURROGATES = HERE.parents[3] / "kvzap/surrogates"

STOCK = ["apples", "candles", "ropes", "lamps", "barrels of tar", "nets", "blankets", "bells", "oars", "maps"]
SHIPS = ["the Heron", "the Old Marta", "the Perseverance", "the Kittiwake", "the Blue Anchor", "the Sorrel"]


def text():
    lines = ["The harbour master keeps a ledger of all that leaves the stores. This is what it says for the month of May."]
    for day in range(1, 31):
        ship, goods = SHIPS[day * 5 % 6], STOCK[day * 7 % 10]
        lines.append(f"On day {day} {ship} took {day * 37 % 90 + 10} {goods} and paid {day * 53 % 70 + 5} crowns.")
        if day == 11:
            lines.append("The special number of the lighthouse is 48213. The keeper told it to nobody but the harbour master.")
        if day == 19:
            lines.append("The name of the harbour master's dog is Bramble, and it sleeps under the scales.")
    return " ".join(lines)


QUESTIONS = [
    "\n\nWhat is the special number of the lighthouse? Answer with the number only.",
    "\n\nWhat is the name of the harbour master's dog?",
    "\n\nWhat does the harbour master keep?",
]

disable_progress_bar()
path = Path(os.environ["LONGCTX_MODEL"])
tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
ask = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer, device="cpu")


def case(name, surrogate, threshold, questions, context):
    press = None
    if surrogate:
        kvzap = KVzapPress(model_type=surrogate)
        kvzap.kvzap_model = KVzapModel.from_pretrained(SURROGATES / f"smollm2-135m-instruct-{surrogate}").float()
        kvzap.post_init_from_model = lambda model: None
        press = DMSPress(kvzap, threshold=threshold)
    answers = ask(context, questions=questions, press=press, max_new_tokens=TOKENS)["answers"]
    removed = press.compression_ratio if press else 0.0
    print(name, round(removed, 4), answers)
    return {"name": name, "surrogate": surrogate, "threshold": threshold, "questions": questions, "context": context,
            "answers": answers, "removed": removed}


context = text()
cases = [
    case("full, one question", None, None, QUESTIONS[:1], context),
    case("full, three questions", None, None, QUESTIONS, context),
    case("MLP, one question", "mlp", -4.0, QUESTIONS[:1], context),
    case("MLP, three questions", "mlp", -4.0, QUESTIONS, context),
    case("linear, three questions", "linear", -4.0, QUESTIONS, context),
    case("MLP, query-aware", "mlp", -3.0, [""], context + QUESTIONS[0]),
]
for one in cases:
    if one["context"] == context:
        one["context"] = None
out = {"tokens": TOKENS, "context": context, "cases": cases}
(HERE / "pipeline.json").write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n")
