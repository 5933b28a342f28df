"""Takes out of the wheels in a folder what a pin file names (its format: xtask/libtorch.txt), checked.

Usage: unpack.py WHEELS PINS TARGET, with the standard library of whatever Python 3 there is.
"""

import hashlib
import pathlib
import sys
import zipfile


def unpack(wheels, pins, target):
    archives = [zipfile.ZipFile(str(wheel)) for wheel in sorted(wheels.glob("*.whl"))]
    members = {name: archive for archive in archives for name in archive.namelist()}
    for line in pins.read_text().splitlines():
        sign, _, words = line.partition(" ")
        if sign == "#=":
            place, _, text = words.partition(" ")
            (target / place).write_text(text)
        elif sign == "#>":
            member, place, *pin = words.split()
            names = [member] if pin else [n for n in members if n.startswith(member) and n[-1] != "/"]
            if not names or not names[0] in members:
                sys.exit(f"error: no wheel holds {member}")
            for name in names:
                path = target / (place + name[len(member):])
                path.parent.mkdir(parents=True, exist_ok=True)
                size, digest = copy(members[name], name, path)
                if pin and pin != [str(size), digest]:
                    sys.exit(f"error: {name} has {size} bytes of sha256 {digest}, expected {pin}")


def copy(archive, name, path):
    digest, size = hashlib.sha256(), 0
    with archive.open(name) as source, open(str(path), "wb") as sink:
        for block in iter(lambda: source.read(1 << 20), b""):
            digest.update(block)
            size += sink.write(block)
    return size, digest.hexdigest()


try:
    unpack(*map(pathlib.Path, sys.argv[1:]))
except (OSError, zipfile.BadZipFile) as error:
    sys.exit(f"error: cannot unpack: {error}")
