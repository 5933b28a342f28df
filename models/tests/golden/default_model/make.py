"""What transformers computes with the default model (SmolLM2-135M-Instruct, Q4_1 as GGUF) in f32: golden.json.

Versions: Python 3.11, torch 2.11.0, transformers 5.2.0, gguf 0.19.0, accelerate 1.15.0. LONGCTX_MODEL names the GGUF
file (sha256 b179c952...db53). Writes beside itself, greedy, so without chance; another CPU may move a logit by 1e-4.

  rope_theta, rms_norm_eps, head_dim        as transformers read them from the GGUF
  short.ids      about 200 ids, no special tokens      short.text  what they say
  short.next     the 64 greedy next ids                short.next_text
  short.margin   the least gap between best and second best logit of the 64 steps: within it rounding decides
  short.first, short.last   of the first and the 64th choice: {ids, logits} of the best 5, and {mean, norm} of all logits
  long.ids, long.top        about 1,000 ids; the same of the logits after the last
"""

import json
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
STEPS = 64

# Both texts were written for this repository.
SHORT = """The lighthouse at Carrow Point has two lamps. The upper one turns once in twelve seconds and can be seen from \
thirty kilometres away; the lower one stands still and marks the rocks north of the harbour. For eighty years a keeper \
climbed the stairs each evening, wound the clockwork and wrote the weather into a thick green book. In 1974 the clockwork \
was replaced by a motor, and the book by a machine that sends a line to the coast guard every hour.

Ada Venn, who was the last keeper, still lives in the white house below the tower. On clear days she shows visitors the \
green books, all thirty-one of them, and asks them to read one page aloud. Most people choose their own birthday. "You \
can see what the wind was doing," she says, "on the day you arrived." Last spring a boy found a page on which nothing was \
written except a drawing of a whale. Ada remembered the day well. "He told me"""

PLACES = ["the mill", "the north field", "the quarry", "the ferry landing", "the old school", "the orchard", "the bridge"]
PEOPLE = ["Jonas", "Mira", "Old Petersen", "the twins", "Dr. Hale", "Ines", "the postman"]
DEEDS = [
    "mended the fence at {0} before the rain came",
    "walked to {0} and back, {1} minutes each way",
    "counted {1} geese near {0} and lost count twice",
    "left a basket of pears at {0} for whoever wanted them",
    "heard that {0} will be painted blue, at a cost of {1} crowns",
]


def diary():
    """A village diary of 37 entries; the third holds the fact that the last line asks for."""
    lines = ["This is the diary of a small village, kept by whoever had time.\n"]
    for day in range(1, 38):
        deed = DEEDS[day * 3 % 5].format(PLACES[day * 5 % 7], 7 + day * 37 % 89)
        lines.append(f"Day {day}. In the morning {PEOPLE[day * 4 % 7]} {deed}.")
        if day == 3:
            lines.append("The key of the chapel was hidden under the third beehive.")
    return "\n".join(lines) + "\n\nQuestion: Where was the key of the chapel hidden?\nAnswer: The key of the chapel was hidden"


def best(logits):
    top = logits.topk(5)
    return {"ids": top.indices.tolist(), "logits": top.values.tolist(),
            "mean": logits.mean().item(), "norm": logits.norm().item()}  # fmt: skip


@torch.inference_mode()
def main():
    disable_progress_bar()
    torch.set_num_threads(2)
    path = Path(os.environ["LONGCTX_MODEL"])
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    config = model.config

    ids = tokenizer(SHORT, add_special_tokens=False)["input_ids"]
    cache, fed, choices, tops, margin = DynamicCache(config=config), ids, [], [], float("inf")
    for _ in range(STEPS):
        logits = model(torch.tensor([fed]), past_key_values=cache).logits[0, -1]
        first, second = logits.topk(2).values.tolist()
        margin = min(margin, first - second)
        tops.append(best(logits))
        choices.append(tops[-1]["ids"][0])
        fed = choices[-1:]
    short = {"text": SHORT, "ids": ids, "next": choices, "next_text": tokenizer.decode(choices), "margin": margin,
             "first": tops[0], "last": tops[-1]}  # fmt: skip

    assert margin > 1e-2, f"two next tokens are {margin} apart: rounding would decide, change the text"

    ids = tokenizer(diary(), add_special_tokens=False)["input_ids"]
    long = {"ids": ids, "top": best(model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1])}
    head = {"rope_theta": config.rope_parameters["rope_theta"], "rms_norm_eps": config.rms_norm_eps,
            "head_dim": config.head_dim}  # fmt: skip
    (HERE / "golden.json").write_text(json.dumps(head | {"short": short, "long": long}, indent=1) + "\n")
    print(len(short["ids"]), "ids, margin", margin, repr(short["next_text"]))
    print(len(long["ids"]), "ids,", [(tokenizer.decode(i), round(x, 3)) for i, x in zip(*list(long["top"].values())[:2])])
    print(head)


if __name__ == "__main__":
    main()
