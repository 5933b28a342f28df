"""What transformers makes of text and messages: token ids, decoded text, rendered chat templates.

Versions: Python 3.11, transformers 5.2.0, tokenizers 0.22.2, jinja2 3.1.6, gguf 0.19.0. Run
`LONGCTX_MODEL=…/SmolLM2-135M-Instruct.Q4_1.gguf python make.py` anywhere: it writes beside itself, in half a minute.

tiny/           a folder as `save_pretrained` writes it: byte-level BPE of 512 ids, whose merges cross every border that a
                pre-tokenizer can draw; `BOS $A`; a template that begins with BOS, too; and truncation to 4 tokens saved in
                tokenizer.json, which transformers ignores
strings.json    [text | [text, times]]: 200 strings, the second form for repeated ones
expected.json   ids of them, in the same order:
                  smollm2   the default model's
                  text      the default model's, special tokens taken as plain text, where that differs: {index: ids}
                  decoded   the default model's ids as text again, without special tokens, where it differs: {index: text}
                  smollm, llama-bpe, qwen2, gpt-2   tiny's vocabulary behind these pre-tokenizers
                  tiny      tiny's own with its BOS
chats.json      [{template, messages, tools, variables, add_generation_prompt, now, expected | error}]; templates/ holds the
                templates, chatml.jinja being the default model's own

The default model's reference is not AutoTokenizer's own reading of the GGUF: that takes every `llama` file for a
sentencepiece model, so it adds a BOS, takes BOS for EOS and cuts no digits off. It is transformers' tokenizer class around
the file's vocabulary and merges behind the pre-tokenizer of the published tokenizer.json: digits one by one, then GPT-2's.
`main` prints how many of the strings the two read differently.
"""

import json
import os
import shutil
from datetime import datetime, timezone
from itertools import cycle
from pathlib import Path

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

HERE = Path(__file__).resolve().parent
MODEL = Path(os.environ["LONGCTX_MODEL"])
NOW = 1785067200  # 2026-07-26 12:00:00 UTC

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"


def bytes_(use_regex):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_(False)])


PRE = {
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_(True)]),
    "llama-bpe": lambda: split(rf"{CONTRACTIONS}|{WORD}|\p{{N}}{{1,3}}|{REST}"),
    "qwen2": lambda: split(rf"{CONTRACTIONS}|{WORD}|\p{{N}}|{REST}"),
    "gpt-2": lambda: bytes_(True),
}

# What a tiny vocabulary learns from: runs, contractions, digits, spaces before and after everything.
CORPUS = [
    "1234567890 12345678 1234567 123456 12345 1234 123 12 1, 3.14159 2026-11-25 x1 y22 z333",
    "it's It'S I'll I'LL we've you'RE they'd 'tis don't o'clock 's 't ' ll",
    "a  b   c    d     e      f\n\ng\n\n\nh \n i\n  j\r\n\r\nk\t\tl \t m   \n",
    "!\n?\n\n...\n (a) [b] {c} <d> \"e\" 'f' --- === ##  !! ?!\r\n",
    "the cat the dog the end, the start; caf\u00e9 na\u00efve \u65e5\u672c\u8a9e \u65e5\u672c\u4eba \u0661\u0662\u0663 \u2167 \u00b2\u00b3 ",
    "def f(x):\n    return x ** 2\n\n\nclass A:\n\tpass\n",
]
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]

PROSE = [
    "The quick brown fox jumps over the lazy dog.",
    "It was the best of times, it was the worst of times; it was the age of wisdom.",
    "One of the special magic numbers for long-context is: 4812093.",
    "What's more, they'd said I'll be there; we've seen IT'S, YOU'LL, 'tis.",
    "Hello, world! Hello,world!Hello , world !",
    "Mr. O'Neill didn't pay $1,234.56 (or \u20ac99.99?) on 2026-11-25 at 09:05:07.",
    "\u201cCurly\u201d \u2018quotes\u2019 \u2014 dashes \u2013 and an ellipsis\u2026",
    "e-mail: a.b+c@example.org, see https://example.org/a?b=c&d=%20#frag",
]
SCRIPTS = {
    "chinese": "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u5427\u3002",
    "japanese": "\u541b\u306e\u540d\u306f\u3002\u30ab\u30bf\u30ab\u30ca\u30fc\u3068\u6f22\u5b57\u3068\u304b\u306a",
    "halfwidth": "\uff76\uff80\uff76\uff85 \uff21\uff22\uff23 \uff11\uff12\uff13",
    "korean": "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4 \u1112\u1161\u11ab\u1100\u1173\u11af",
    "arabic": "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 \u0661\u0662\u0663\u0664\u0665",
    "hebrew": "\u05e9\u05dc\u05d5\u05b9\u05dd \u05e2\u05d5\u05dc\u05dd\u200f abc \u202e123\u202c",
    "hindi": "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e \u0967\u0968\u0969",
    "thai": "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01 \u0e51\u0e52\u0e53",
    "russian": "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0401\u0436\u0438\u043a \u0438\u0434\u0451\u0442",
    "greek": "\u039a\u03b1\u03bb\u03b7\u03bc\u03ad\u03c1\u03b1 \u03ba\u03cc\u03c3\u03bc\u03b5 \u1f00\u03c1\u03c7\u1f74",
    "georgian": "\u10d2\u10d0\u10db\u10d0\u10e0\u10ef\u10dd\u10d1\u10d0 \u1c92\u1c90",
    "turkish": "\u0130stanbul'da \u0131\u015f\u0131k \u011f \u015e",
    "vietnamese": "Vi\u1ec7t Nam Vi\u0065\u0323\u0302t Nam",
    "cuneiform": "\U00012000\U00012001 \U0001d400\U0001d7d8",
}
EMOJI = [
    "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\U0001f3f3\ufe0f\u200d\U0001f308", "\u2764\ufe0f",
    "\U0001f44d\U0001f3fd", "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7", "1\ufe0f\u20e3 #\ufe0f\u20e3", "a\U0001f600b \U0001f600 c",
    "\U0001fae8\U0001f6dc", "text\u200btext\u200ctext\u200d",
]
MARKS = [
    "e\u0301 \u00e9 E\u0301", "Z\u0351\u036b\u0343\u036aa\u0302\u0303l\u0317g\u0321o\u0328", "\u0301 leading mark", "a\u0301\u0301\u0301\u0301b", "\u1e9b\u0323 \u1e9b\u0323",
    "\ufb01 \ufb03 \u00df \u1e9e \u017f's 'S '\u017f", "\u212b \u00c5 A\u030a", "\u2126 \u03a9 \u00b5 \u03bc",
]
DIGITS = [
    "0", "7 8", "12345", "a1b22c333", "3.14159", "1,000,000", "-42", "1e10", "0x1F", "1 2  3   4    5", "x 12", "x  12",
    "x   123", "\n12", "\n\n12", " \t12", "\u00bd \u00b2\u00b3 \u2167 \u2460", "\u0967\u0968\u0969 \u0661\u0662\u0663", "v1.2.3-rc4", "12:34:56.789",
    "99 bottles", "  7", "1234567890123456789012345678901234567890", "one 1 two 22 three 333 four 4444",
]
SPACES = [
    "", " ", "  ", "   ", "a ", " a", "  a", "a  b", "a   b", "\n", "\n\n", "\n\n\n", " \n", "\n ", "a\nb", "a\n\nb", "a \n b", "a\n  b", "\t",
    "\t\t", "a\tb", "a \t b", "\r\n", "a\r\nb\r\n", "\r", "a\x0bb\x0cc", "\x85a\x85", "\u00a0a\u00a0b", "\u2003a\u2003\u2003b", "\u3000\u4f60\u3000",
    "\u2028a\u2029b", "\ufeffbom", "a\u1680b\u202fc\u205fd", "trailing   ", "   leading", "  \n  \n  ", "word" + " " * 40 + "word",
]
CONTROL = [
    "\x00", "a\x00b", "\x00\x00\x00", "\x01\x02\x03", "\x1b[31mred\x1b[0m", "\x1c\x1d\x1e\x1f", "\x7f", "\x80\x9f", "\u00ad soft", "\ufffd",
    "\ufffe\uffff", "\ue000 private \U000f0000", "\U0010ffff", "bell\x07 back\x08",
]
CODE = [
    "fn main() {\n    println!(\"{:?}\", vec![1, 2, 3]);\n}\n", "def f(x):\n\treturn x**2  # square\n", "if (a&&b||!c){d+=e<<2;}",
    "SELECT * FROM t WHERE a='b' AND c<>1;", "<div class=\"x\">&nbsp;</div>", "{\"a\": [1, 2.5, null], \"b\": {\"c\": \"d\\n\"}}",
    "for i in range(10):\n        for j in range(i):\n                print(i, j)", "#!/bin/sh\nset -e\ncd \"$HOME\" && ls -la | grep '^d'",
    "snake_case camelCase PascalCase SCREAMING_CASE kebab-case", "a+b-c*d/e%f^g|h~i!j@k#l", "\\frac{a}{b} \\alpha_{i}^{2}", "x=1;y=2\n\n\n\nz=3",
    "/* c */ // d\n-- e\n;; f", "=====\n-----\n*****\n", "| a | b |\n|---|---|\n| 1 | 2 |",
]
SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|>b", "a <|im_end|> b",
    "<|im_start|><|im_start|>", "<|im_start", "im_start|>", "< |im_start|>", "<|IM_START|>", "<repo_name>x<file_sep>y", "<repo_name", "<|im_end|>\n\n",
    "12<|im_end|>34", "<|im_\u200bend|>", "<filename>a.py<gh_stars>100", "<jupyter_start><jupyter_code>1+1<jupyter_output>2<empty_output>", "<s>", "</s> <tool>x</tool>",
    "  <|endoftext|>  ", "<<|im_end|>>",
]
LONG = [
    ["a", 200], ["ab", 150], ["\u6f22", 100], [" ", 200], ["\n", 100], ["7", 100], ["\U0001f600", 40], ["e\u0301", 50], ["-", 100], ["lorem ipsum ", 20],
    ["Donaudampfschifffahrtsgesellschaftskapit\u00e4n", 5], ["\x00", 40], [" a", 70], ["<|im_end|>", 30], ["'s", 60],
]


def strings():
    singles = [*PROSE, *SCRIPTS.values(), *EMOJI, *MARKS, *DIGITS, *SPACES, *CONTROL, *CODE, *SPECIAL]
    mixed = [
        a + b
        for a, b in zip(cycle(["12 ", "  ", "x", "\n", "<|im_end|>", ".", "'s", "\u200d", "1"]), [*SCRIPTS.values(), *EMOJI, *MARKS, *DIGITS])
    ]
    every = [*singles, *LONG, *mixed]
    assert len(every) >= 200, len(every)
    return every[:200]


def write(name, value, **options):
    (HERE / name).write_text(json.dumps(value, **options) + "\n", encoding="utf-8")


def tiny():
    """The folder tiny/. Merges are learned without cutting at all, so that they cross every border."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = bytes_(False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=511, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, max_token_length=6
    )
    pieces = [line[i : i + n] for line in CORPUS for n in (2, 3, 4) for i in range(len(line) - n + 1)]
    tokenizer.train_from_iterator(sorted(pieces), trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.pre_tokenizer = bytes_(True)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    shutil.rmtree(HERE / "tiny", ignore_errors=True)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    wrapped.save_pretrained(HERE / "tiny")
    path = HERE / "tiny/tokenizer.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    saved["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0, "pad_token": "</s>"}
    path.write_text(json.dumps(saved, ensure_ascii=False), encoding="utf-8")
    return AutoTokenizer.from_pretrained(HERE / "tiny")


def bpe(vocab, merges, pre, added, **options):
    """transformers' tokenizer around a vocabulary. `added`: special tokens."""
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    tokenizer.pre_tokenizer = PRE[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def default_model():
    fields = gguf.GGUFReader(MODEL).fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges"))
    (HERE / "templates/chatml.jinja").write_text(fields["tokenizer.chat_template"].contents(), encoding="utf-8")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
    vocab = {token: id for id, token in enumerate(tokens)}
    return bpe(vocab, [tuple(merge.split(" ")) for merge in merges], "smollm", special)


def chats():
    text = [{"role": "user", "content": "  Who are you?\n"}]
    talk = [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "caf\u00e9 <|im_end|> 12\u00d712?"},
        {"role": "assistant", "content": "<think>\n144, \u201csure\u201d\n</think>\n\n144"},
        {"role": "user", "content": "And \U0001f468\u200d\U0001f469\u200d\U0001f467?"},
    ]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"place": "S\u00e3o 'Paulo' <&>", "days": 3, "exact": True, "none": None}}}
    used = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "{\"rain\": 0.5}"},
        {"role": "tool", "content": "two"},
        {"role": "assistant", "content": "Wet.", "reasoning_content": "\nhm\n"},
    ]
    schema = {"zeta": 1, "alpha": {"type": "object", "properties": {}, "required": []}, "x<y & 'z' \u00e9 \u2014 /": [1, 2]}
    tools = [{"type": "function", "function": {"name": "weather", "description": "It's <b>\"wet\"</b>", "parameters": schema}}]
    value = {
        "b": 1, "a": "x<y & 'z' \u00e9 \u2014 / \"q\" \\ \n\t\r\x08\x0c\x00\x1f\x7f \U0001f600", "list": [1, 2, "it's", "\""], "none": None, "yes": True, "no": False,
        "float": 1.0, "floats": [0.1, 1e16, 1.5e-7, 123456789.125, -0.0, 1e15, 0.0001, 1e-05, 1e300], "text": "zebra crossing", "empty": [], "void": {},
        "nested": {"list": [{"k": [None, True]}], "big": 12345678901234567890},
    }
    bos = {"bos_token": "<s>", "eos_token": "</s>"}
    cases = [
        ("chatml", text, None, {}), ("chatml", talk, None, {}), ("chatml", [], None, {}),
        ("header", text, None, bos), ("header", talk, None, bos), ("header", used, tools, bos), ("header", talk, None, {**bos, "date_string": "1 Jan 2025"}),
        ("header", [], tools, bos),
        ("thinking", text, None, {"enable_thinking": False}), ("thinking", talk, None, {}), ("thinking", used, tools, {"enable_thinking": True}),
        ("instruct", text, None, bos), ("instruct", talk[1:], None, bos), ("instruct", talk[2:], None, bos),
        ("values", [{"role": "user", "value": value}], None, {}),
    ]

    class Now(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.fromtimestamp(NOW, timezone.utc)

    chat_template_utils.datetime = Now
    for template, messages, tools, variables in cases:
        for prompt in (False, True):
            case = dict(template=template, messages=messages, tools=tools, variables=variables, add_generation_prompt=prompt, now=NOW)
            source = (HERE / f"templates/{template}.jinja").read_text(encoding="utf-8")
            try:
                rendered, _ = chat_template_utils.render_jinja_template(
                    [messages], tools, chat_template=source, add_generation_prompt=prompt, **variables
                )
                yield {**case, "expected": rendered[0]}
            except Exception as error:
                yield {**case, "error": str(error)}


def changed(before, after):
    return {i: b for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b}


def main():
    every = strings()
    texts = [text if isinstance(text, str) else text[0] * text[1] for text in every]
    write("strings.json", every, indent=0)

    def ids(tokenizer, **options):
        return [tokenizer(text, **options).input_ids for text in texts]

    small = tiny()
    expected = {"tiny": ids(small)}
    saved = json.loads((HERE / "tiny/tokenizer.json").read_text(encoding="utf-8"))
    vocab, merges = saved["model"]["vocab"], [tuple(merge) for merge in saved["model"]["merges"]]
    for pre in PRE:
        expected[pre] = ids(bpe(vocab, merges, pre, SPECIALS, ignore_merges=pre == "llama-bpe"))
    model = default_model()
    expected["smollm2"] = ids(model)
    expected["text"] = changed(expected["smollm2"], ids(model, split_special_tokens=True))
    expected["decoded"] = changed(texts, [model.decode(ids, skip_special_tokens=True) for ids in expected["smollm2"]])
    write("expected.json", expected, separators=(",", ":"))
    write("chats.json", list(chats()), indent=1)

    auto = ids(AutoTokenizer.from_pretrained(MODEL.parent, gguf_file=MODEL.name), add_special_tokens=False)
    differ = [text for text, a, b in zip(texts, auto, expected["smollm2"], strict=True) if a != b]
    print(f"{len(texts)} strings; AutoTokenizer on the GGUF itself reads {len(differ)} otherwise: {differ}")


if __name__ == "__main__":
    main()
