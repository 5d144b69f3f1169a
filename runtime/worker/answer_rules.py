"""Rules of a model for its answers: what the first and last tokens are, and Whisper's for timestamps (AnswerRules).

Of the latter, as OpenAI's decoding has them (arXiv 2212.04356, section 4.5, and its code): timestamps come in pairs
around text, never go back, begin the answer, and are taken where all of them together are likelier than any single
token of text. Tokens of text have ids below `end_id`, timestamps from `first_timestamp` on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.runtime.source_messages import AnswerRules

NEVER = float("-inf")


def keep_rules(logits: Tensor, output: Sequence[int], rules: AnswerRules, max_tokens: int) -> None:
    """Change the logits [vocab] of the token behind `output`, an answer's tokens so far, in place."""
    num_starts = len(rules.starts)
    if rules.last_id is not None and len(output) == max_tokens - 1:
        _take_likeliest(logits, (rules.last_id,))
        return
    if len(output) < num_starts:
        _take_likeliest(logits, rules.starts[len(output)])
        return
    said = output[num_starts:]
    if not said and rules.never_first:
        logits[list(rules.never_first)] = NEVER
    if rules.first_timestamp is not None:
        _keep_times(logits, said, rules, rules.first_timestamp)


def _take_likeliest(logits: Tensor, tokens: tuple[int, ...]) -> None:
    """Leave the likeliest of these tokens alone, also where nothing else would let any of them come."""
    best = tokens[int(logits[list(tokens)].argmax())]
    logits.fill_(NEVER)
    logits[best] = 0.0


def _keep_times(logits: Tensor, said: Sequence[int], rules: AnswerRules, first: int) -> None:
    if not said:
        logits[:first] = NEVER
        if rules.latest_start is not None:
            logits[rules.latest_start + 1 :] = NEVER
    else:
        last_is_time = said[-1] >= first
        opens = last_is_time and (len(said) == 1 or said[-2] >= first)  # text follows the second of a pair
        if opens:
            logits[first:] = NEVER
        elif last_is_time:  # the end, or the time again at which the next piece begins
            logits[: rules.end_id] = NEVER
        latest = next((token for token in reversed(said) if token >= first), None)
        if latest is not None:
            logits[first : latest + (not (last_is_time and not opens))] = NEVER
    together = torch.logsumexp(logits[first:], dim=0)
    if together > logits[:first].max():
        logits[:first] = NEVER
