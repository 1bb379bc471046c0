"""Writes the quick start's data: train.jsonl and a BEIR folder, out of the tables in facts.py.

    python make_data.py [FOLDER]        (default: this folder; the same bytes every time)

Every passage has four training questions: two name the thing, one describes it, one is a few search words. The test asks
about the same passages in sentences that no training question has, as people will ask about the documents that a model
was tuned on. The facts are in facts.py, the sentences in templates.py.
"""

import json
import pathlib
import random
import sys

from templates import KINDS, OPENINGS

SEED = 7
NEGATIVES = 2
TEST_QUESTIONS = 160
NO_ARTICLE = {"dynamite", "penicillin", "pasteurisation", "air conditioning", "vulcanised rubber", "television"}


class Passage:
    """One thing of one kind, told in one of that kind's shapes."""

    def __init__(self, kind, row, number, rng):
        self.kind, self.row, self.id = kind, row, f"p{number:03}"
        self.title = KINDS[kind]["title"].format(**row)
        self.text = sentence(rng.choice(KINDS[kind]["passage"]), row)

    def whole(self):
        """As evaluation indexes it."""
        return f"{self.title} {self.text}"

    def questions(self, rng):
        """The training questions: by name, by description, and as search words."""
        kind = KINDS[self.kind]
        asked = rng.sample(kind["named"], 2) + rng.sample(kind["described"], 1)
        for template in asked:
            yield rng.choice(OPENINGS).format(sentence(template, self.row))
        facts = [self.row[column] for column in kind["keywords"].split()]
        yield rng.choice([f"{self.row['name']} {rng.choice(facts)}", ", ".join(rng.sample(facts, 2))])

    def test_question(self, rng):
        return sentence(rng.choice(KINDS[self.kind]["test"]), self.row)


def things(kind):
    """Rows of a table with the forms of their fields that the templates ask for: `x_cap` is x with a capital."""
    columns = kind["columns"].split()
    for line in kind["table"].strip().split("\n"):
        row = dict(zip(columns, line.split("|"), strict=True))
        name = row["name"]
        row["a_kind"] = ("an " if row.get("kind", "x")[0] in "aeiou" else "a ") + row.get("kind", "")
        row["the"] = name if name in NO_ARTICLE else f"the {name}"
        row["name_low"] = name.lower()
        row["language_is"] = "languages are" if " and " in row.get("language", "") else "language is"
        yield row | {f"{key}_cap": capital(value) for key, value in row.items()}


def capital(text):
    return text[:1].upper() + text[1:]


def sentence(template, row):
    """A filled template, with a capital if it is a whole sentence."""
    text = template.format(**row)
    return capital(text) if text[-1] in ".?" else text


def negatives(passage, passages, rng):
    """Siblings: other things of the same kind."""
    return rng.sample([p for p in passages if p.kind == passage.kind and p is not passage], NEGATIVES)


def main():
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).parent
    rng = random.Random(SEED)
    rows = [(name, row) for name, kind in KINDS.items() for row in things(kind)]
    passages = [Passage(name, row, number, rng) for number, (name, row) in enumerate(rows)]

    train = []
    for passage in passages:
        for query in passage.questions(rng):
            neg = [p.whole() for p in negatives(passage, passages, rng)]
            train.append({"query": query, "pos": [passage.whole()], "neg": neg})
    rng.shuffle(train)

    asked = {row["query"] for row in train}
    test = []
    for passage in sorted(rng.sample(passages, TEST_QUESTIONS), key=lambda p: p.id):
        query = passage.test_question(rng)
        assert query not in asked, f"asked in training: {query}"
        test.append((f"q{len(test):03}", query, passage.id))

    beir = folder / "beir"
    (beir / "qrels").mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(beir / "corpus.jsonl", [{"_id": p.id, "title": p.title, "text": p.text} for p in passages])
    write_jsonl(beir / "queries.jsonl", [{"_id": q, "text": text} for q, text, _ in test])
    lines = ["query-id\tcorpus-id\tscore"] + [f"{q}\t{p}\t1" for q, _, p in test]
    (beir / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(train)} training rows, {len(passages)} passages, {len(test)} test questions")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
