"""What `octavo.LLM` and `octavo.AsyncLLM` answer, by vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from octavo.lora_request import LoRARequest
from octavo.server.draft_metrics import DraftMetrics

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Logprob:
    """A token's log-probability. rank: its place in the whole vocabulary, 1 is the likeliest; None: not known."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


Output = TypeVar("Output")
LogprobsOnePosition = dict[int, Logprob]
"""By token id: the token that stands there first, then others, the likeliest first."""
SampleLogprobs = list[LogprobsOnePosition]
PromptLogprobs = list[LogprobsOnePosition | None]
"""None for the first token, which nothing predicts."""


@dataclass(slots=True)
class ToolCall:
    """A call of a function. arguments: JSON, as the model has written it; not complete where the answer was cut."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class CompletionOutput:
    """One answer. stop_reason: the stop string or the token of stop_token_ids that ended it, if one did.

    cumulative_logprob, logprobs: where they were asked for. token_ids has the token that ended the answer too.
    finish_reason: stop, length, repetition or abort; None while it goes on.
    reasoning, content, tool_calls: what the text is made of, with LLM(reasoning_parser=...) or tool_call_parser, once
    the answer has ended; vLLM's has none of them.
    spec_decode_metrics: how its drafts fared, with LLM(per_request_spec_decode_metrics=...), once it has ended.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: SampleLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: LoRARequest | None = None
    reasoning: str | None = None
    content: str | None = None
    tool_calls: list[ToolCall] | None = None
    spec_decode_metrics: DraftMetrics | None = None

    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestStateStats:
    """When things happened to a request, in seconds since the epoch: vLLM's names. Of n answers, the first one's.

    queued_ts is arrival_time: who arrives is queued. first_token_latency: seconds from there to the first token.
    """

    num_generation_tokens: int
    num_preemptions: int
    arrival_time: float
    queued_ts: float
    scheduled_ts: float
    first_token_ts: float
    last_token_ts: float
    first_token_latency: float


@dataclass(slots=True)
class RequestOutput:
    """The answers to one prompt. prompt: its text, where it was given as one, or as messages.

    num_cached_tokens: of the prompt, those that the prefix cache had; None until the first token has come. metrics: of
    an answer that has ended.
    Of an encoder-decoder, encoder_prompt and its ids are what the encoder has read, and prompt is what the decoder has
    begun with.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: PromptLogprobs | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestStateStats | None = None
    lora_request: LoRARequest | None = None
    encoder_prompt: str | None = None
    encoder_prompt_token_ids: list[int] | None = None
    num_cached_tokens: int | None = None
    kv_transfer_params: None = None


@dataclass(slots=True)
class BeamSearchSequence:
    """A beam. tokens and text begin with the prompt; logprobs and cum_logprob are about what follows it."""

    orig_prompt: dict[str, Any]
    tokens: list[int]
    logprobs: SampleLogprobs
    lora_request: LoRARequest | None = None
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The beams of one prompt, the best one first."""

    sequences: list[BeamSearchSequence]


@dataclass
class Metric:
    """What is counted, and of what."""

    name: str
    labels: dict[str, str]


@dataclass
class Counter(Metric):
    """What only grows."""

    value: int


@dataclass
class Gauge(Metric):
    """What goes up and down."""

    value: float


@dataclass
class Histogram(Metric):
    """Observations. buckets: how many are at most so large, by the bound as text; `+Inf` has all."""

    count: int
    sum: float
    buckets: dict[str, int] = field(default_factory=dict)


@dataclass
class Vector(Metric):
    """Counters in a row; octavo has none."""

    values: list[int]


@dataclass(slots=True)
class PoolingOutput:
    """What a pooler made of a prompt. data: float32, of one vector or, for a task of tokens, a row for each."""

    data: Tensor


@dataclass(slots=True)
class EmbeddingOutput:
    """The embedding of a prompt."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """How many numbers it has."""
        return len(self.embedding)


@dataclass(slots=True)
class ClassificationOutput:
    """The probabilities of a classifier's labels."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return len(self.probs)


@dataclass(slots=True)
class ScoringOutput:
    """How well two texts fit each other."""

    score: float


@dataclass(slots=True)
class PoolingRequestOutput(Generic[Output]):
    """What one prompt, or a pair, gave."""

    request_id: str
    outputs: Output
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True


EmbeddingRequestOutput = PoolingRequestOutput[EmbeddingOutput]
ClassificationRequestOutput = PoolingRequestOutput[ClassificationOutput]
ScoringRequestOutput = PoolingRequestOutput[ScoringOutput]
