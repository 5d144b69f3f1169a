"""Flags out of a struct: what argparse accepts, what the struct then holds, what help, errors and docs say."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import option_tables
import pytest
from msgspec import Meta

from octavo.flags import add_flags, flags_of, given, markdown, parse_pair, parse_size, read


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """One field of each sort."""

    model: Annotated[str, Meta(description="a directory", extra={"positional": True})]
    output: Annotated[Path, Meta(description="where to", extra={"flag": ("-o", "--output"), "group": "files"})]
    count: Annotated[int, Meta(ge=1, description="how many", extra={"aliases": ("--number",), "metavar": "N"})] = 8
    share: Annotated[float, Meta(ge=0, le=1, description="100 % at most")] = 0.5
    rate: Annotated[float | None, Meta(gt=0, description="speed", extra={"default": "no limit", "group": "how"})] = None
    dtype: Annotated[
        Literal["auto", "fp8_e4m3"], Meta(description="type", extra={"spellings": {"fp8": "fp8_e4m3"}})
    ] = "auto"
    size: Annotated[int, Meta(description="bytes", extra={"parse": parse_size, "default": "1KB"})] = 1000
    bits: Annotated[int | None, Meta(description="bits", extra={"choices": (4, 8, -1)})] = None
    quick: Annotated[bool, Meta(description="hurry")] = False
    cached: Annotated[bool, Meta(description="keep")] = True
    measured: Annotated[bool, Meta(description="don't measure", extra={"flag": "--no-measure"})] = True
    both: Annotated[bool | None, Meta(description="either way")] = None
    header: Annotated[list[tuple[str, str]], Meta(description="headers", extra={"parse_each": parse_pair})] = []
    ignore: Annotated[tuple[str, ...], Meta(description="names")] = ()
    limit: Annotated[Annotated[int, Meta(ge=1)] | None, Meta(description="most")] = None
    internal: int = 3


FLAGS = flags_of(Options)


def parse(*arguments: str) -> Options:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, FLAGS)
    return read(Options, parser.parse_args(["m", "-o", "out", *arguments]))


def test_what_is_not_given_is_the_default() -> None:
    assert parse() == Options(model="m", output=Path("out"))


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--count", "3"], "count", 3),
        (["--number", "3"], "count", 3),
        (["--share=0"], "share", 0.0),
        (["--share", "1"], "share", 1.0),
        (["--rate", "inf"], "rate", float("inf")),
        (["--dtype", "fp8"], "dtype", "fp8_e4m3"),
        (["--dtype", "fp8_e4m3"], "dtype", "fp8_e4m3"),
        (["--size", "2KiB"], "size", 2048),
        (["--bits", "-1"], "bits", -1),
        (["--quick"], "quick", True),
        (["--no-cached"], "cached", False),
        (["--no-measure"], "measured", False),
        (["--both"], "both", True),
        (["--no-both"], "both", False),
        (["--header", "a=1", "b=2", "--header", "c=3"], "header", [("a", "1"), ("b", "2"), ("c", "3")]),
        (["--ignore", "a", "b"], "ignore", ("a", "b")),
        (["--limit", "1"], "limit", 1),
    ],
)
def test_flags_set_their_field_and_no_other(arguments: list[str], field: str, value: object) -> None:
    expected: Any = {"model": "m", "output": Path("out"), field: value}
    assert parse(*arguments) == Options(**expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "argument --count: '0' is not a whole number from 1 up"),
        (["--count", "x"], "'x' is not a whole number from 1 up"),
        (["--number", "0"], "'0' is not a whole number from 1 up"),
        (["--share", "1.5"], "'1.5' is not a number from 0 to 1"),
        (["--share", "nan"], "'nan' is not a number from 0 to 1"),
        (["--rate", "0"], "'0' is not a number above 0"),
        (["--dtype", "fp9"], "invalid choice: 'fp9'"),
        (["--size", "much"], "'much' is not a size such as"),
        (["--bits", "5"], "invalid choice: 5"),
        (["--header", "a"], "'a' is not NAME=VALUE"),
        (["--limit", "0"], "argument --limit: '0' is not a whole number from 1 up"),
        (["--internal", "1"], "unrecognized arguments: --internal"),
    ],
)
def test_what_a_field_does_not_take_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert message in capsys.readouterr().err


def test_help_tells_defaults_and_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    shown = capsys.readouterr().out
    assert "-o OUTPUT, --output OUTPUT" in shown
    assert "how many (default: 8)" in shown
    assert "100 % at most (default: 0.5)" in shown
    assert "speed (default: no limit)" in shown
    assert "--number" not in shown
    listed = shown[shown.index("files:") :]
    assert listed.index("--count") < listed.index("how:") < listed.index("--rate")


def test_given_names_what_stands_on_the_command_line() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, FLAGS)
    args = parser.parse_args(["m", "-o", "out", "--number", "8", "--no-cached"])
    assert given(args, FLAGS) == ["-o", "--count", "--cached"]
    assert read(Options, args, count=5).count == 5


def test_docs_say_the_same() -> None:
    table = markdown(flags_of(Options))
    assert "| `MODEL` |  | a directory |\n" in table
    assert "**files**\n\n| option | default | what it does |" in table
    assert "| `--count N` (also `--number`) | 8 | how many |\n" in table
    assert "| `--dtype {auto,fp8_e4m3,fp8}` | auto | type |\n" in table


def test_the_documentation_is_what_the_structs_say() -> None:
    """`python tests/support/option_tables.py` writes it anew."""
    assert [page.name for page in option_tables.TABLES.changed()] == []
    assert sorted(option_tables.TABLES.shown()) == sorted(option_tables.TABLES.makers)


def test_a_key_that_no_option_has_is_an_error() -> None:
    class Wrong(msgspec.Struct):
        x: Annotated[int, Meta(description="x", extra={"metavr": "N"})] = 0

    with pytest.raises(TypeError, match=r"Wrong\.x: unknown keys of an option: metavr"):
        flags_of(Wrong)
