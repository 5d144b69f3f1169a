"""How `select` decides: three methods over the log-probabilities of the choices' tokens, and the class of own ones.

A method gets what SGLang's get, under the same names. It knows no server; native.py asks for the log-probabilities.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from math import fsum
from typing import Any

TokenLogprobs = list[list[Any]]
"""Of each token of a choice: [log-probability, token id, text of the token]. The log-probability is None where nothing
stands before the token."""


@dataclass(frozen=True, slots=True)
class ChoicesDecision:
    """The choice, and what it was made of."""

    decision: str
    meta_info: dict[str, Any] = field(default_factory=dict)


class ChoicesSamplingMethod(ABC):
    """A way to choose. An instance is called with keyword arguments, a list entry for each choice:

    choices                       the texts
    normalized_prompt_logprobs    the mean log-probability of a choice's tokens behind the text before it
    input_token_logprobs          the log-probabilities of its tokens there, TokenLogprobs
    output_token_logprobs         nothing: no token is generated behind a choice
    unconditional_token_logprobs  of its tokens with nothing before them, where the method asks for it, else None
    """

    @property
    def requires_unconditional_logprobs(self) -> bool:
        """Whether unconditional_token_logprobs are needed."""
        return False

    @abstractmethod
    def __call__(
        self,
        *,
        choices: list[str],
        normalized_prompt_logprobs: list[float],
        input_token_logprobs: list[TokenLogprobs],
        output_token_logprobs: list[TokenLogprobs],
        unconditional_token_logprobs: list[TokenLogprobs] | None = None,
    ) -> ChoicesDecision:
        """Choose."""


class TokenLengthNormalized(ChoicesSamplingMethod):
    """The highest mean log-probability of a token. Long choices whose ends follow from their beginnings gain by it."""

    def __call__(
        self,
        *,
        choices: list[str],
        normalized_prompt_logprobs: list[float],
        input_token_logprobs: list[TokenLogprobs],
        output_token_logprobs: list[TokenLogprobs],
        unconditional_token_logprobs: list[TokenLogprobs] | None = None,  # noqa: ARG002
    ) -> ChoicesDecision:
        """Choose."""
        found = {
            "normalized_prompt_logprobs": normalized_prompt_logprobs,
            "input_token_logprobs": input_token_logprobs,
            "output_token_logprobs": output_token_logprobs,
        }
        return ChoicesDecision(choices[_first_best(normalized_prompt_logprobs)], found)


class GreedyTokenSelection(ChoicesSamplingMethod):
    """The likeliest first token, among those the likeliest second one, and so on.

    A choice that is the beginning of a longer one counts further tokens, as likely as its own are on average.
    """

    def __call__(
        self,
        *,
        choices: list[str],
        normalized_prompt_logprobs: list[float],
        input_token_logprobs: list[TokenLogprobs],
        output_token_logprobs: list[TokenLogprobs],
        unconditional_token_logprobs: list[TokenLogprobs] | None = None,  # noqa: ARG002
    ) -> ChoicesDecision:
        """Choose."""
        longest = max(map(len, input_token_logprobs))
        rows = [_logprobs(tokens) for tokens in input_token_logprobs]
        matrix = [[*row, *[_mean(row)] * (longest - len(row))] for row in rows]
        found = {
            "normalized_prompt_logprobs": normalized_prompt_logprobs,
            "input_token_logprobs": input_token_logprobs,
            "output_token_logprobs": output_token_logprobs,
            "greedy_logprob_matrix": matrix,
        }
        # lists are ordered by their first difference, which is what this method is
        return ChoicesDecision(choices[_first_best(matrix)], found)


class UnconditionalLikelihoodNormalized(ChoicesSamplingMethod):
    """The highest mean of a token's log-probability behind the text, less the one that it has without the text."""

    @property
    def requires_unconditional_logprobs(self) -> bool:
        """They are what is subtracted."""
        return True

    def __call__(
        self,
        *,
        choices: list[str],
        normalized_prompt_logprobs: list[float],
        input_token_logprobs: list[TokenLogprobs],
        output_token_logprobs: list[TokenLogprobs],
        unconditional_token_logprobs: list[TokenLogprobs] | None = None,
    ) -> ChoicesDecision:
        """Choose. Raises ValueError without unconditional_token_logprobs."""
        if unconditional_token_logprobs is None:
            raise ValueError("unconditional_likelihood_normalized needs unconditional_token_logprobs")
        gains = [
            _mean([given - alone for given, alone in zip(_logprobs(inputs), _logprobs(without), strict=True)])
            for inputs, without in zip(input_token_logprobs, unconditional_token_logprobs, strict=True)
        ]
        found = {
            "normalized_prompt_logprobs": normalized_prompt_logprobs,
            "input_token_logprobs": input_token_logprobs,
            "output_token_logprobs": output_token_logprobs,
            "unconditional_token_logprobs": unconditional_token_logprobs,
            "normalized_unconditional_prompt_logprobs": gains,
        }
        return ChoicesDecision(choices[_first_best(gains)], found)


token_length_normalized = TokenLengthNormalized()
greedy_token_selection = GreedyTokenSelection()
unconditional_likelihood_normalized = UnconditionalLikelihoodNormalized()


def normalized(tokens: TokenLogprobs) -> float:
    """The mean log-probability of a choice's tokens."""
    return _mean(_logprobs(tokens))


def _logprobs(tokens: TokenLogprobs) -> list[float]:
    """A token with nothing before it counts as certain."""
    return [entry[0] or 0.0 for entry in tokens]


def _mean(values: list[float]) -> float:
    return fsum(values) / len(values)


def _first_best(values: list[Any]) -> int:
    """Where the highest value stands; the first of equals."""
    return max(range(len(values)), key=values.__getitem__)
