"""The flags that say what a model is calibrated on, with llm-compressor's names."""

from __future__ import annotations

import argparse

from octavo.jobs.calibration_data import MAX_SEQ_LENGTH


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags, as a group of their own."""
    data = parser.add_argument_group("calibration data")
    data.add_argument(
        "--dataset",
        metavar="DATA",
        help="a .txt, .jsonl, .json or .parquet file, a directory of them, or a data set of the Hub ('owner/name', "
        "'owner/name:split') (default: none; the model generates its text itself)",
    )
    data.add_argument(
        "--num-calibration-samples",
        type=_count,
        metavar="N",
        help="windows of text (default: 32; more for wide layers, so that there are 4 tokens for each of their inputs)",
    )
    data.add_argument(
        "--max-seq-length",
        type=_count,
        default=MAX_SEQ_LENGTH,
        metavar="N",
        help="tokens of each window (default: %(default)s)",
    )
    data.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="of the choice of samples, and of text that the model generates (default: 0)",
    )
    data.add_argument(
        "--chat-template",
        metavar="TEMPLATE",
        help="a Jinja file, or a template itself, for conversations in the data (default: the model's own)",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 2^32 - 1")
    return int(text)
