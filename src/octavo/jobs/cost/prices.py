"""What a machine costs, and what follows from it for a token: a dated table, and arithmetic without a clock.

A machine is paid by the hour, and one hour makes tokens of both kinds. So a price of input tokens and one of output
tokens are a division of one bill, and the rule is: by the machine's time. A prompt's time is what it takes where
nothing but prompts is sent (`prefill_rate`); the rest of the time is the answers'. The two prices times what was served
are the bill, exactly. A cached token costs an input token's price times the ratio of the two measured times.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import NamedTuple

import msgspec

MILLION = 1e6
SECONDS_PER_DAY = 86400


class PriceError(ValueError):
    """A machine or a price that can't be had; the message is one line."""


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of prices.toml: dollars per hour, what that is, on which date that was so, and who says it."""

    cost_per_hour: float
    what: str
    date: str
    source: str


class ApiPrice(msgspec.Struct, frozen=True):
    """Somebody's price list: dollars per million tokens."""

    name: str
    input: float
    output: float

    def dollars(self, inputs: float, outputs: float) -> float:
        """Of so many tokens."""
        return (inputs * self.input + outputs * self.output) / MILLION


class Traffic(NamedTuple):
    """What a machine serves: requests a second, and the tokens of one request in the mean."""

    rate: float
    inputs: float
    outputs: float


class TokenPrices(msgspec.Struct, frozen=True):
    """Dollars per million tokens. all_in: the whole bill over the output tokens alone. cached None: not measured."""

    input: float
    output: float
    cached: float
    all_in: float


def machines(own: Path | None = None) -> dict[str, Machine]:
    """All machines by name; those of a file of one's own win. Raises PriceError."""
    found = _read(Path(__file__).with_name("prices.toml"))
    return found if own is None else found | _read(own)


def machine_named(name: str, own: Path | None) -> Machine:
    """Raises PriceError."""
    known = machines(own)
    if name not in known:
        raise PriceError(f"no machine {name!r} in the table of prices; it has {', '.join(sorted(known))}")
    return known[name]


def _read(path: Path) -> dict[str, Machine]:
    try:
        content = tomllib.loads(path.read_text("utf-8"))
        found = msgspec.convert(content, dict[str, Machine])
    except OSError as e:
        raise PriceError(f"{path}: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError) as e:
        raise PriceError(f"{path} is no table of prices: {e}") from e
    for name, machine in found.items():
        if not machine.cost_per_hour > 0:
            raise PriceError(f"{path}: {name}: cost_per_hour {machine.cost_per_hour} is not above 0")
    return found


def parse_api_price(text: str) -> ApiPrice:
    """'name=in/out' in dollars per million tokens. Raises ValueError."""
    name, _, prices = text.partition("=")
    try:
        price = ApiPrice(name.strip(), *(float(part) for part in prices.split("/", 1)))
        valid = bool(price.name) and price.input >= 0 and price.output >= 0 and price.input + price.output > 0
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(f"{text!r} is not NAME=IN/OUT in dollars per million tokens, such as gpt=0.15/0.60")
    return price


def prefill_share(traffic: Traffic, prefill_rate: float) -> float:
    """The share of a saturated machine's time that prompts take; prefill_rate: prompt tokens a second, alone."""
    return min(1.0, traffic.rate * traffic.inputs / prefill_rate) if prefill_rate > 0 else 0.0


def token_prices(cost_per_hour: float, traffic: Traffic, share: float, cached_ratio: float) -> TokenPrices:
    """The bill of an hour over what was served in it; share: `prefill_share`; cached_ratio: a cached token's time."""
    per_request = cost_per_hour / 3600 / traffic.rate
    input_price = per_request * share / traffic.inputs * MILLION
    return TokenPrices(
        input=input_price,
        output=per_request * (1 - share) / traffic.outputs * MILLION,
        cached=input_price * cached_ratio,
        all_in=per_request / traffic.outputs * MILLION,
    )


def machines_needed(tokens_per_day: float, traffic: Traffic) -> float:
    """How many machines serve so many input and output tokens, spread evenly over the day; not rounded up."""
    return tokens_per_day / (traffic.rate * (traffic.inputs + traffic.outputs) * SECONDS_PER_DAY)


def break_even(cost_per_hour: float, traffic: Traffic, price: ApiPrice) -> float:
    """Input and output tokens a day above which a machine that is always on costs less than the API."""
    bill_per_request = price.dollars(traffic.inputs, traffic.outputs)
    return cost_per_hour * 24 / bill_per_request * (traffic.inputs + traffic.outputs)
