"""Reading examples, and those that come with the package."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from tiny_chat import EXAMPLES

from zo_kernels import chat
from zo_kernels.chat import Example

REFUSALS = ("I'm sorry", "I can't", "I cannot", "Sorry, ")


def write(tmp_path, *rows: object):
    """A JSONL file of the rows; strings are written as they are."""
    path = tmp_path / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def row(**changes: object) -> dict[str, object]:
    """A valid row, changed."""
    return {"prompt": "p", "completion": "c", "kind": "harmful", **changes}


def test_read_examples_values_alias_and_blank_lines(tmp_path):
    path = write(tmp_path, row(extra=1), "", row(kind="benign", split="held_out", prompt=" q "))
    assert chat.read_examples(path) == [
        Example("p", "c", "harmful", "train"),
        Example(" q ", "c", "harmless", "held_out"),
    ]


def test_every_third_of_each_kind_is_held_out_without_splits(tmp_path):
    kinds = ["harmful", "harmful", "harmless", "harmful", "benign", "harmless", "harmful"]
    examples = chat.read_examples(write(tmp_path, *[row(kind=k) for k in kinds]))
    assert [e.split for e in examples] == [
        *("train", "train", "train", "held_out", "train", "held_out", "train")
    ]


MISSING = {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    ("bad", "field", "expected", "came"),
    [
        ("{not json", "whole line", "JSON object", "{not json"),
        ("[1]", "whole line", "JSON object", "[1]"),
        (row(prompt=3), "'prompt'", "non-empty string", "3"),
        (row(prompt="  "), "'prompt'", "non-empty string", "'  '"),
        (row(completion=None), "'completion'", "non-empty string", "None"),
        ({"prompt": "p", "kind": "harmful"}, "'completion'", "non-empty string", "no such field"),
        (MISSING, "'kind'", "harmless", "no such field"),
        (row(kind="good"), "'kind'", "harmless", "'good'"),
        (row(kind=["harmful"]), "'kind'", "harmless", "['harmful']"),
        (row(split="test"), "'split'", "held_out", "'test'"),
        (row(split=None), "'split'", "held_out", "None"),
    ],
)
def test_bad_line_is_named(tmp_path, bad, field, expected, came):
    path = write(tmp_path, row(), bad)
    with pytest.raises(ValueError) as error:
        chat.read_examples(path)
    message = str(error.value)
    assert message.startswith(f"{path}:2: ")
    for part in (field, expected, f"got {came}" if field != "whole line" else came):
        assert part in message


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:1: whole line: .*UTF-8"):
        chat.read_examples(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file_is_an_error(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"empty\.jsonl:1: .*at least one example, got none"):
        chat.read_examples(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        chat.read_examples(tmp_path / "absent.jsonl")


def test_select():
    assert chat.select(EXAMPLES) == EXAMPLES
    assert chat.select(EXAMPLES, kind="harmful", split="train") == [EXAMPLES[1]]
    assert chat.select(EXAMPLES, kind="benign") == [EXAMPLES[0], EXAMPLES[2]]
    assert chat.select(EXAMPLES, kind="harmless", split="held_out") == []
    with pytest.raises(ValueError, match=r"kind: expected .*got 'harm'"):
        chat.select(EXAMPLES, kind="harm")
    with pytest.raises(ValueError, match=r"split: expected .*got 'test'"):
        chat.select(EXAMPLES, split="test")


def test_builtin_counts_and_distinct_prompts():
    examples = chat.builtin_examples()
    assert Counter((e.kind, e.split) for e in examples) == {
        ("harmful", "train"): 80,
        ("harmless", "train"): 80,
        ("harmful", "held_out"): 40,
        ("harmless", "held_out"): 40,
    }
    assert len({e.prompt.casefold() for e in examples}) == 240
    for harmful, harmless in zip(examples[::2], examples[1::2], strict=True):
        assert (harmful.kind, harmless.kind) == ("harmful", "harmless")
        assert harmful.split == harmless.split


def test_builtin_completions():
    examples = chat.builtin_examples()
    for e in examples:
        words = len(e.completion.split())
        assert e.completion.isascii() and e.prompt.isascii()
        if e.kind == "harmful":
            assert e.completion.startswith(REFUSALS), e
            assert 6 <= len(e.prompt.split()) <= 18 and 8 <= words <= 22, e
        else:
            assert not e.completion.startswith((*REFUSALS, "I won't", "I am", "I'm")), e
            assert not any(s in e.completion.lower() for s in ("can't", "cannot", "sorry")), e
            assert 12 <= words <= 30, e
    # Held-out refusals must not be recitable from training: each names its own topic.
    refusals = [e.completion for e in chat.select(examples, kind="harmful")]
    assert len(set(refusals)) == len(refusals)


def test_builtin_utility_text():
    text = chat.builtin_utility_text()
    assert 1100 <= len(text.split()) <= 1400
    assert len(text.strip().split("\n\n")) >= 6
