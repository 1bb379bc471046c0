# `just` lists these; `just check` is what CI runs.

default:
    @just --list

# Format, lint, test and document: what must hold before a change lands.
check:
    bash .ci/run

# The tests alone.
test *args:
    cargo test {{args}}

# The quick start of the README: from nothing to answers in a few minutes.
quickstart:
    bash quickstart/run

# The reference's numbers, against another set of fixtures in the same form:
# `just golden DIR ROWS.jsonl ROW_COUNT PASSAGE_MAX_LEN`.
golden dir rows count length:
    LLARA_GOLDEN={{dir}}:{{rows}}:{{count}}:{{length}} cargo test --test golden

# Make the tests' fixtures anew; needs Python with torch, transformers and peft.
fixtures:
    python crates/llara/tests/fixtures/generate.py
