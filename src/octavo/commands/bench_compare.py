"""Compare results of octavo bench: ratios to the first one, with intervals, and a verdict for each figure."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from octavo.bench.compare import CompareError, as_json, compare, lines, read_side
from octavo.commands.failure import one_line
from octavo.flags import add_flags, flags_of, read

PROG = "octavo bench compare"


class CompareOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of the command, besides its files."""

    output_json: Annotated[
        Path | None, Meta(description="write the comparisons here, too", extra={"metavar": "FILE", "default": "none"})
    ] = None


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "results", type=Path, nargs="+", metavar="RESULT", help="files of --save-result; the first is the base"
    )
    add_flags(parser, flags_of(CompareOptions))


def run(args: argparse.Namespace) -> int:
    """Print the comparisons; returns the exit code."""
    options = read(CompareOptions, args)
    if len(args.results) < 2:
        print(f"{PROG}: a comparison takes two results or more", file=sys.stderr)
        return 1
    try:
        base, *others = [read_side(path) for path in args.results]
        found = [(other, compare(base, other)) for other in others]
        if options.output_json is not None:
            content = {other.name: [as_json(one) for one in comparisons] for other, comparisons in found}
            options.output_json.write_text(json.dumps({"base": base.name, "others": content}, indent=2) + "\n")
    except (CompareError, OSError) as e:
        print(f"{PROG}: {one_line(e)}", file=sys.stderr)
        return 1
    for other, comparisons in found:
        print("\n".join(lines(base, other, comparisons)))
    return 0
