"""Writes a GGUF file once more, with YaRN (arXiv 2309.00071) in its metadata, where llama.cpp and longctx read it.

Its tensors stay, so overlays for the one are overlays for the other.
"""

import argparse
import struct

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
U32, F32, STRING, ARRAY = 4, 6, 8, 9


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def number(self, code):
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def text(self):
        length = self.number("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self, kind):
        """What it is, if it is one number or a text."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, count = self.number("I"), self.number("Q")
            for _ in range(count):
                self.value(inner)
            return None
        self.at += SIZES[kind]
        return int.from_bytes(self.data[self.at - SIZES[kind] : self.at], "little")


def entry(key, kind, value):
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--factor", type=float, required=True, help="how many times longer contexts may be")
    parser.add_argument("--original", type=int, required=True, help="the length trained on, in tokens")
    args = parser.parse_args()
    with open(args.model, "rb") as file:
        data = file.read()
    if data[:4] != b"GGUF":
        raise SystemExit(f"{args.model} is no GGUF file")
    reader = Reader(data)
    reader.at = 8
    tensors, entries = reader.number("Q"), reader.number("Q")
    begin, known = reader.at, {}
    for _ in range(entries):
        key = reader.text()
        known[key] = reader.value(reader.number("I"))
    for _ in range(tensors):
        reader.text()
        dimensions = reader.number("I")
        reader.at += 8 * dimensions + 4 + 8  # shape, type, place
    prefix = known["general.architecture"] + ".rope.scaling."
    if prefix + "type" in known:
        raise SystemExit(f"{args.model} has {prefix}type = {known[prefix + 'type']} already")
    yarn = [
        entry(prefix + "type", STRING, struct.pack("<Q", 4) + b"yarn"),
        entry(prefix + "factor", F32, struct.pack("<f", args.factor)),
        entry(prefix + "original_context_length", U32, struct.pack("<I", args.original)),
    ]
    head = data[:16] + struct.pack("<Q", entries + len(yarn)) + b"".join(yarn) + data[begin : reader.at]
    align = known.get("general.alignment") or 32
    rest = data[-(-reader.at // align) * align :]
    with open(args.output, "wb") as file:
        file.write(head + bytes(-len(head) % align) + rest)


if __name__ == "__main__":
    main()
