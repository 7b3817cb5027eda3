"""Parsers are pure and versioned: the same raw answer gives the same result for as long as the version is the same.

A red test here means that a parser reads an answer differently than its version says. If that is what you want, raise its
version, and add what it makes of each answer now to `results` in its golden file; what older versions made of it stays there.
"""

import base64
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.golden.write import FOLDER
from workers.lookup import LookupFailed, RawAnswer
from workers.parsers import PARSERS

ANSWERS = sorted((FOLDER / "answers").glob("*.json"))


STRANGERS = ("rdap", "ip-api", "ptr")
"""Whose bodies were written by others. Those of the rest are our own words for what we measured, or read in a file."""


def raw_of(golden: dict[str, Any]) -> RawAnswer:
    body = golden["body"].encode() if "body" in golden else base64.b64decode(golden["body_base64"])
    return RawAnswer(golden["about"], body)


@pytest.mark.parametrize("path", ANSWERS, ids=lambda path: path.stem)
def test_a_parser_reads_what_its_version_says(path: Path) -> None:
    golden = orjson.loads(path.read_bytes())
    parser = PARSERS[golden["parser"]]

    then = parser.parse(raw_of(golden))

    assert orjson.loads(then.model_dump_json()) == golden["results"].get(str(parser.version)), __doc__


def test_every_parser_has_a_golden_answer() -> None:
    assert {orjson.loads(path.read_bytes())["parser"] for path in ANSWERS} == set(PARSERS)


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_is_found_by_the_name_that_a_fact_tells(name: str) -> None:
    parser = PARSERS[name]

    assert str(parser) == f"{name}/{parser.version}"


@pytest.mark.parametrize("body", [b"", b"{}", b'{"a":\n\n"b"}', bytes(range(256))])
def test_a_raw_answer_comes_out_of_the_store_as_it_was_received(body: bytes) -> None:
    """Whatever the bytes of a stranger are: line feeds, too."""
    raw = RawAnswer({"asked": 'b\u00fccher "\n', "kind": "domain"}, body)

    assert RawAnswer.of(raw.stored()) == raw


@pytest.mark.parametrize("path", [path for path in ANSWERS if path.stem.startswith(STRANGERS)], ids=lambda path: path.stem)
def test_a_body_that_makes_no_sense_is_a_failure_in_our_words(path: Path) -> None:
    golden = orjson.loads(path.read_bytes())

    for nonsense in (b"\xff\xfe", b"[]", b"null"):
        with pytest.raises(LookupFailed):
            PARSERS[golden["parser"]].parse(RawAnswer(golden["about"], nonsense))
