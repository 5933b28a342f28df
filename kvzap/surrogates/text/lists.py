"""Writes list-like text out of nothing: records, tables, settings, logs, addresses, glossaries and the like.

corpus.py takes it for the share of its text in which a name stands beside a value. No line follows the templates of a
benchmark: no hidden number, no question, no object of bare identifiers.
"""

import json
import random
import re
import uuid

FIRST = """Ada Amir Beatriz Carlos Chen Dagny Emeka Farah Georg Hana Ines Ivo Jonas Kofi Leila Lucia Marek Mei Nadia
Noah Olga Omar Paula Priya Quentin Rosa Samir Sven Tamara Uli Vera Wanda Ximena Yusuf Zoe""".split()
LAST = """Abara Becker Castillo Dubois Eriksen Ferrari Gupta Haddad Ivanova Jansen Kowalski Laurent Moreau Nakamura
Okafor Petrov Quispe Rossi Silva Tanaka Ueda Vargas Weber Xu Yilmaz Zimmermann""".split()
GOODS = """apricots blankets bolts buckets cables cement chairs copper envelopes filters flour gloves hinges lamps
lentils mirrors nails oil onions paint paper pears pipes pumps rice rope salt screws soap sugar tiles timber towels
tyres valves varnish wax wheat wire wool""".split()
TRADES = """archivist baker botanist carpenter dentist driver editor electrician farmer geologist glazier interpreter
librarian mason mechanic midwife nurse optician painter pilot plumber printer surveyor tailor teacher translator
treasurer veterinarian watchmaker welder""".split()
PARTS = """archive backup billing cache catalogue cluster console display export gateway index invoice journal ledger
mailer monitor parser printer proxy queue registry render report router scanner scheduler search sensor session
storage sync upload worker""".split()
TRAITS = """address buffer capacity colour delay depth format height interval language level limit mode offset owner
path period port precision priority profile quota rate region retries size speed theme timeout timezone unit volume
width""".split()
VERBS = """check clean collect count deliver inspect label measure move order pack paint repair replace return
weigh""".split()
UNITS = "bags boxes crates loads lots packs pallets".split()
COLOURS = "amber beige black blue bronze brown crimson green grey ivory orange purple red teal white yellow".split()
STATES = "active archived cancelled closed delayed draft failed new open paid pending ready returned shipped".split()
SOUNDS = """ba bel cor dan del el fa gar hol il ka lin lor mar mi na nor o pel ra ros sa sul ta tor u va vel wen
zo""".split()
ENDS = "berg bury da dorf field ford gate ham holm ka mouth na port ra ria stad ton vale ville wick".split()
MATTERS = """alloy bird cloth coin dance dish drum fish fruit garment grass herb knot mineral sauce sail shell
tool""".split()
USES = [
    "at weddings", "by bookbinders", "for grinding corn", "for lining walls", "for mending nets", "for storing grain",
    "in bad weather", "in the dyeing of silk", "on long journeys", "on slate roofs", "to keep out damp",
    "to sharpen blades", "when the tide is low",
]


def word(rng):
    """A made-up name of a place or a thing."""
    return (rng.choice(SOUNDS) + rng.choice(SOUNDS) * rng.randint(0, 1) + rng.choice(ENDS)).capitalize()


def person(rng):
    return f"{rng.choice(FIRST)} {rng.choice(LAST)}"


def number(rng):
    return rng.randint(1, 10 ** rng.randint(1, 7))


def code(rng):
    letters = "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=rng.randint(1, 3)))
    return f"{letters}{rng.choice(['-', '', '/'])}{rng.randint(10, 99999)}"


def money(rng):
    return f"{rng.uniform(1, 10 ** rng.randint(1, 5)):.2f}"


def day(rng):
    return f"{rng.randint(1975, 2025)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


def phone(rng):
    return f"0{rng.randint(20, 99)} {rng.randint(100, 999)} {rng.randint(1000, 9999)}"


def address(rng):
    street = rng.choice(["Street", "Road", "Lane", "Square", "Avenue", "Hill"])
    return f"{rng.randint(1, 240)} {word(rng)} {street}, {rng.randint(10000, 99999)} {word(rng)}"


FIELDS = {
    "id": number, "name": person, "city": word, "phone": phone, "code": code, "price": money, "date": day,
    "address": address,
    "stock": lambda rng: rng.randint(0, 900),
    "item": lambda rng: rng.choice(GOODS),
    "colour": lambda rng: rng.choice(COLOURS),
    "status": lambda rng: rng.choice(STATES),
    "job": lambda rng: rng.choice(TRADES),
    "score": lambda rng: round(rng.uniform(0, 10), 1),
    "weight_kg": lambda rng: round(rng.uniform(0.1, 90), 2),
    "ref": lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
    "active": lambda rng: rng.random() < 0.5,
    "lat": lambda rng: round(rng.uniform(-80, 80), 4),
    "lon": lambda rng: round(rng.uniform(-180, 180), 4),
}
PHRASES = [
    "{place}: {n}",
    "{name}, extension {n}",
    "The population of {place} is {n}.",
    "{name} lives at {address}.",
    "{goods} ({code}): {n} in stock",
    "Room {n} is booked for {name}.",
    "{name} was born in {place} on {day}.",
    "Flight {code} to {place} leaves from gate {small}.",
    "{place} lies {small} km from {other}.",
    "{trait} = {n}",
    "Invoice {code} of {day} comes to {money}.",
    "{goods}: {money} a box",
    "{name}, {job}, works in {place}.",
    "The {part} listens on port {port}.",
    "Locker {small} belongs to {name}; its key is tagged {code}.",
    "{code} - {name}",
    "Lot {small}: {goods}, from {money}",
    "Call {name} on {phone}.",
    "{place} was founded in {year}.",
    "{name} ({year})",
    "Bus {small} runs from {place} to {other} in {few} minutes.",
    "{name} scored {small} points.",
    "{name}: {job}, {place}",
]


def phrase(rng, pattern):
    values = {
        "place": word, "other": word, "n": number, "name": person, "address": address, "code": code, "day": day,
        "money": money, "phone": phone,
        "goods": lambda rng: rng.choice(GOODS).capitalize(),
        "trait": lambda rng: rng.choice(TRAITS),
        "job": lambda rng: rng.choice(TRADES),
        "part": lambda rng: rng.choice(PARTS),
        "small": lambda rng: rng.randint(2, 120),
        "few": lambda rng: rng.randint(3, 90),
        "port": lambda rng: rng.randint(1024, 65535),
        "year": lambda rng: rng.randint(1100, 2020),
    }
    return re.sub(r"\{(\w+)\}", lambda name: str(values[name[1]](rng)), pattern)


def rows(rng):
    names = rng.sample(list(FIELDS), rng.randint(2, 7))
    return [{name: FIELDS[name](rng) for name in names} for _ in range(rng.randint(8, 40))]


def records(rng):
    """JSON: one list, or an object a line."""
    if rng.random() < 0.5:
        return "\n".join(json.dumps(row) for row in rows(rng))
    return json.dumps({rng.choice(PARTS): rows(rng)[:20]}, indent=rng.choice([None, 2, 4]))


def separated(rng):
    table, mark = rows(rng), rng.choice([",", ";", "\t", " | "])
    cells = [list(table[0])] + [[str(cell).replace(mark, " ") for cell in row.values()] for row in table]
    return "\n".join(map(mark.join, cells))


def markdown(rng):
    table = rows(rng)
    lines = [list(table[0]), ["---"] * len(table[0])] + [[str(cell) for cell in row.values()] for row in table]
    return f"### {rng.choice(PARTS).capitalize()}\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def settings(rng):
    """INI or YAML, a few sections."""
    head, line = rng.choice([("[{}]", "{} = {}"), ("{}:", "  {}: {}"), ("# {}", "{}={}")])
    lines = []
    for part in rng.sample(PARTS, rng.randint(3, 9)):
        lines.append(head.format(part))
        for trait in rng.sample(TRAITS, rng.randint(2, 7)):
            value = rng.choice([number(rng), code(rng), word(rng), rng.choice(COLOURS), "true", "false"])
            lines.append(line.format(trait, value))
    return "\n".join(lines)


def log(rng):
    date, second = day(rng), rng.randint(0, 40000)
    lines = []
    for _ in range(rng.randint(15, 45)):
        second += rng.randint(1, 900)
        event = rng.choice([
            f"{rng.choice(TRAITS)} set to {number(rng)}",
            f"user {rng.choice(LAST).lower()} logged in",
            f"request {code(rng)} done in {rng.randint(2, 4000)} ms",
            f"cannot reach {rng.choice(PARTS)}, try {rng.randint(1, 5)}",
            f"{rng.randint(1, 500)} rows written to {rng.choice(PARTS)}",
            f"job {number(rng)} {rng.choice(STATES)}",
        ])
        level = rng.choice(["INFO", "INFO", "DEBUG", "WARN", "ERROR"])
        clock = f"{second // 3600 % 24:02}:{second // 60 % 60:02}:{second % 60:02}"
        lines.append(f"{date} {clock} {level} [{rng.choice(PARTS)}] {event}")
    return "\n".join(lines)


def addresses(rng):
    blocks = (f"{person(rng)}\n{address(rng).replace(', ', chr(10))}\n{phone(rng)}" for _ in range(rng.randint(8, 24)))
    return "\n\n".join(blocks)


def numbered(rng):
    """A list of things to do, numbered in one of four ways."""
    mark = rng.choice(["{}. ", "{}) ", "- [{}] ", "Step {}: "])
    lines = []
    for index in range(1, rng.randint(12, 40)):
        task = f"{rng.choice(VERBS).capitalize()} {rng.randint(2, 90)} {rng.choice(UNITS)} of {rng.choice(GOODS)}"
        where = f" from {word(rng)}", f" for {person(rng)}", f" before {day(rng)}", f", order {code(rng)}", ""
        task += rng.choice(where)
        lines.append(mark.format(index) + task + ".")
    return "\n".join(lines)


def glossary(rng):
    mark = rng.choice([": ", " - ", " (n.) ", "\n    "])
    lines = []
    for name in sorted(word(rng) for _ in range(rng.randint(10, 30))):
        meaning = f"{rng.choice(COLOURS)} {rng.choice(MATTERS)}, used {rng.choice(USES)}"
        lines.append(f"{name}{mark}{meaning}; first described by {rng.choice(LAST)} in {rng.randint(1500, 1990)}.")
    return "\n".join(lines)


def figures(rng):
    """Lines that say one thing each, in up to three phrasings."""
    patterns = rng.sample(PHRASES, rng.randint(1, 3))
    bullet = rng.choice(["", "", "- ", "* "])
    return "\n".join(bullet + phrase(rng, rng.choice(patterns)) for _ in range(rng.randint(15, 50)))


def notes(rng):
    """The same kind of facts as running text."""
    return " ".join(phrase(rng, rng.choice([p for p in PHRASES if p[-1] == "."])) for _ in range(rng.randint(10, 25)))


KINDS = [records, separated, markdown, settings, log, addresses, numbered, glossary, figures, figures, figures, notes]


def lists():
    """Yields (key, text) of 3,600 pieces, each of one kind."""
    for index in range(3600):
        rng = random.Random(f"lists {index}")
        yield f"lists {index}", rng.choice(KINDS)(rng)
