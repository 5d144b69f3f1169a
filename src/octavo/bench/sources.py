"""The prompts that the options ask for: random ones, a workload's, or those of a file."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from octavo.bench.http import Client, HttpError
from octavo.bench.prompt_options import PromptOptions
from octavo.bench.prompts import (
    FIRST,
    MAX_AT_ONCE,
    Count,
    LocalCount,
    Prompt,
    PromptError,
    RandomShape,
    ServerCount,
    Vocabulary,
    local_vocabulary,
    measure_vocabulary,
    random_prompts,
)
from octavo.bench.traces import Row, read_trace, trace_prompts
from octavo.bench.workloads import WORKLOADS, cut_note, make_requests

# vLLM's bounds of a ShareGPT prompt, in tokens: what is shorter or longer is left out
MIN_TOKENS = 4
MAX_PROMPT = 1024
MAX_TOTAL = 2048


@dataclass(frozen=True)
class PromptSet:
    """Prompts and, in words, how they were made.

    synthetic  made of lengths alone: the model is to ignore where it would end
    timed      they have times of their own, which --self-timed keeps
    """

    prompts: list[Prompt]
    how: str
    synthetic: bool
    timed: bool = False


async def make_prompts(options: PromptOptions, client: Client, model: str, count: int, rng: random.Random) -> PromptSet:
    """`count` prompts, or fewer where a file has fewer and isn't repeated. Raises PromptError."""
    if options.file is not None:
        return await _from_file(options, client, model, count, rng)
    vocabulary = await _vocabulary(options, client, model, turns=options.workload is not None)
    if options.workload is not None:
        workload = WORKLOADS[options.workload].scaled(options.length_scale)
        prompts = make_requests(workload, count, rng, vocabulary)
        scaled = f" of {options.length_scale:g} times its lengths" if options.length_scale != 1 else ""
        notes = [f"workload {workload.name}{scaled}: {workload.describe()}", _counted(prompts, vocabulary)]
        return PromptSet(prompts, _joined(notes, cut_note(prompts, vocabulary)), synthetic=True)
    prompts = random_prompts(vocabulary, count, _shape(options), rng)
    if options.dataset_name == "prefix_repetition":
        rng.shuffle(prompts)
    return PromptSet(prompts, _joined(["random words", _counted(prompts, vocabulary)]), synthetic=True)


async def _vocabulary(options: PromptOptions, client: Client, model: str, *, turns: bool) -> Vocabulary:
    if options.tokenizer is not None:
        return await local_vocabulary(options.tokenizer, chat=options.chat)
    return await measure_vocabulary(client, model, chat=options.chat, turns=turns)


def _shape(options: PromptOptions) -> RandomShape:
    if options.dataset_name == "prefix_repetition":
        return RandomShape(
            options.prefix_repetition_suffix_len,
            options.output_len,
            prefix_len=options.prefix_repetition_prefix_len,
            prefixes=options.prefix_repetition_num_prefixes,
        )
    return RandomShape(
        options.random_input_len, options.output_len, options.random_range_ratio, prefix_len=options.random_prefix_len
    )


def _counted(prompts: Sequence[Prompt], vocabulary: Vocabulary) -> str:
    """The lengths of the prompts, and who counted them."""
    if not vocabulary.exact:
        about = sorted({len(" ".join((*prompt.history, prompt.text)).split()) for prompt in prompts})
        return f"about {_span(about)} tokens: the server has no /tokenize to make them exact"
    lengths = sorted({prompt.num_tokens or 0 for prompt in prompts})
    return f"{_span(lengths)} tokens as {vocabulary.counter} counts them"


def _span(lengths: Sequence[int]) -> str:
    return f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"


def _joined(parts: Sequence[str], *notes: str | None) -> str:
    sentences = [", ".join(parts), *(note for note in notes if note)]
    return " ".join(f"{sentence}." for sentence in sentences)


async def _from_file(options: PromptOptions, client: Client, model: str, count: int, rng: random.Random) -> PromptSet:
    """A file with times is replayed in its order, as far as it goes; others are shuffled, and repeated if short."""
    assert options.file is not None
    trace = read_trace(options.file, options.file_format, options.timed_trace_sec_multiplier)
    rows = trace.rows
    texts = any(row.texts for row in rows)
    if options.dataset_name == "sharegpt":
        rows = [row for row in rows if not row.follows]
    timed = trace.timed and options.keeps_times
    in_order = timed or options.disable_shuffle
    rows = rows if in_order else _shuffled(rows, rng)
    if trace.format == "sharegpt":
        rows = await _with_lengths(options, client, model, rows[: 2 * count])
    rows = _repeated(rows, count, repeats=options.oversample and not timed)
    if options.output_len:
        rows = [replace(row, output_len=options.output_len) for row in rows]
    vocabulary = Vocabulary(1, [], exact=False, max_model_len=None)
    if not texts:
        vocabulary = await _vocabulary(options, client, model, turns=False)
    prompts = trace_prompts(rows, vocabulary, rng, output_len=256, block_size=options.block_size)
    notes = [f"{options.file}{'' if in_order else ', shuffled'}"]
    if options.trace is not None or not texts:
        notes.append(f"the first {len(rows):,} of {len(trace.rows):,} requests in the format {trace.format}")
    if not texts:
        notes.append(_counted(prompts, vocabulary))
    how = _joined(notes, cut_note(prompts, vocabulary))
    return PromptSet(prompts, how, synthetic=not texts, timed=timed)


def _shuffled(rows: Sequence[Row], rng: random.Random) -> list[Row]:
    """Conversations in a random order, each with its turns."""
    conversations: list[list[Row]] = []
    for row in rows:
        if row.follows and conversations:
            conversations[-1].append(row)
        else:
            conversations.append([row])
    rng.shuffle(conversations)
    return [row for conversation in conversations for row in conversation]


def _repeated(rows: Sequence[Row], count: int, *, repeats: bool) -> list[Row]:
    if not rows:
        raise PromptError("no request of the file is of a length that can be asked")
    return [rows[i % len(rows)] for i in range(count)] if repeats else list(rows[:count])


async def _with_lengths(options: PromptOptions, client: Client, model: str, rows: Sequence[Row]) -> list[Row]:
    """ShareGPT's rows with the tokens of their prompts and answers, without those that vLLM leaves out.

    A server without /tokenize gets a quarter of the characters as the number of tokens.
    """
    server = ServerCount(client, model, chat=options.chat)
    count: Count = server if options.tokenizer is None else LocalCount(options.tokenizer, chat=options.chat)
    try:
        around = await count([FIRST]) - 1
    except HttpError:
        around = None
    gate = asyncio.Semaphore(MAX_AT_ONCE)

    async def measured(row: Row) -> Row:
        if around is None:
            return replace(row, output_len=max(1, len(row.answer) // 4))
        async with gate:
            answer = await count([row.answer or FIRST]) - around
            return replace(row, input_len=await count(row.texts), output_len=max(1, answer))

    found = await asyncio.gather(*(measured(row) for row in rows))
    return [row for row in found if _as_in_vllm(row) or options.dataset_name != "sharegpt"]


def _as_in_vllm(row: Row) -> bool:
    asked = row.input_len or MIN_TOKENS
    answered = row.output_len or MIN_TOKENS
    return asked >= MIN_TOKENS and answered >= MIN_TOKENS and asked <= MAX_PROMPT and asked + answered <= MAX_TOTAL
