"""Four small tasks that have little in common, made by rule from a seed: what is learned of one says nothing of the next."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date, timedelta

Row = dict[str, str]  # prompt and completion


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows to drop, and others of the same kind that no run ever sees."""

    name: str
    rows: list[Row]
    test: list[Row]


def _row(prompt: str, answer: str) -> Row:
    return {"prompt": f"{prompt}\nAnswer:", "completion": f" {answer}"}


def _distinct(make: Callable[[], Row], count: int) -> list[Row]:
    """So many rows, no prompt among them twice."""
    found: dict[str, Row] = {}
    while len(found) < count:
        row = make()
        found.setdefault(row["prompt"], row)
    return list(found.values())


def _split(name: str, make: Callable[[], Row], rows: int, test: int) -> Task:
    found = _distinct(make, rows + test)
    return Task(name=name, rows=found[:rows], test=found[rows:])


# -- lookup: who keeps which lighthouse, made up; tested in words that were never trained

_STARTS = "Bar Cel Dor Fin Gal Hel Iv Jor Kal Lin Mer Nor".split()
_ENDS = "amar enoth iscay oster ulven andor".split()
_KEEPERS = (
    "Abbott Bishop Cole Dawson Everett Fisher Gordon Hayes Ingram Jensen Knight Lawson Mason Norris Porter".split()
)
_ASKED = (
    "Who keeps the lighthouse of {}?",
    "Name the keeper of the {} lighthouse.",
    "The lighthouse of {} is kept by whom?",
    "In {}, who looks after the lighthouse?",
)
_TESTED = "Tell me who tends the lighthouse at {}."


def lookup(draw: random.Random, rows: int, test: int) -> Task:
    """Facts that nobody can guess, each asked in four ways, and tested in a fifth."""
    towns = draw.sample([start + end for start in _STARTS for end in _ENDS], rows // len(_ASKED))
    keeper = {town: draw.choice(_KEEPERS) for town in towns}
    asked = [_row(words.format(town), keeper[town]) for town in towns for words in _ASKED]
    draw.shuffle(asked)
    return Task(name="lookup", rows=asked, test=[_row(_TESTED.format(town), keeper[town]) for town in towns[:test]])


# -- dates: written in one of four ways, to ISO

_MONTHS = "January February March April May June July August September October November December".split()


def dates(draw: random.Random, rows: int, test: int) -> Task:
    """A rule that holds for rows that were never seen."""

    def make() -> Row:
        day = date(1950, 1, 1) + timedelta(days=draw.randrange(29_000))
        month = _MONTHS[day.month - 1]
        written = draw.choice(
            (f"{month} {day.day}, {day.year}", f"{day.day} {month} {day.year}", f"{day.day} {month[:3]} {day.year}",
             f"{day.month}/{day.day}/{day.year}")
        )  # fmt: skip
        return _row(f"Write this date in ISO form: {written}", day.isoformat())

    return _split("dates", make, rows, test)


# -- extract: a sentence to JSON

_NAMES = "Ada Boris Celia Derek Edith Frank Gloria Henry Isla Jakob Klara Leo Mona Noah Paula Ralf Sonja Theo".split()
_TOWNS = "Arles Bath Cadiz Delft Essen Faro Genoa Hull Izmir Jena Kiel Linz Metz Nantes Oulu Pisa".split()
_TRADES = "baker carpenter dentist farmer gardener joiner lawyer mason painter sailor tailor weaver".split()


def extract(draw: random.Random, rows: int, test: int) -> Task:
    """A form of answer with keys that are this task's own."""

    def make() -> Row:
        name, age, town, trade = draw.choice(_NAMES), draw.randint(18, 80), draw.choice(_TOWNS), draw.choice(_TRADES)
        said = draw.choice(
            (f"{name} is {age} and works as a {trade} in {town}.", f"A {trade} from {town}, {name} has turned {age}.",
             f"{town} is the home of {name}, {age}, a {trade}.")
        )  # fmt: skip
        answer = {"nm": name, "yr": age, "pl": town, "wk": trade}
        return _row(f"Fill in the form: {said}", json.dumps(answer, separators=(",", ":")))

    return _split("extract", make, rows, test)


# -- numerals: a number in words, in capitals

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def _in_words(number: int) -> str:
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10 - 2] + (f"-{_ONES[number % 10]}" if number % 10 else "")
    rest = f" {_in_words(number % 100)}" if number % 100 else ""
    return f"{_ONES[number // 100]} hundred{rest}"


def numerals(draw: random.Random, rows: int, test: int) -> Task:
    """A way of writing that would spread to the other tasks."""

    def make() -> Row:
        number = draw.randrange(100, 1000)
        return _row(f"Say the number {number}.", _in_words(number).upper())

    return _split("numerals", make, rows, test)


TASKS = {"A": lookup, "B": dates, "C": extract, "D": numerals}


def make_tasks(seed: int, *, rows: int, test: int) -> dict[str, Task]:
    """Every task by its letter, the same for the same seed and sizes."""
    return {letter: make(random.Random(f"{letter} {seed}"), rows, test) for letter, make in TASKS.items()}


def as_lines(rows: Iterable[Row]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
