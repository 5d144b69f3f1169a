"""What crosses the socket between the server and the engine process: plain values, encoded by msgspec.

Token ids only; text stays in the server. Every request that isn't aborted ends in exactly one TokenOutput with a
finish_reason; `error` says why when that is "error".
"""

from __future__ import annotations

from typing import Literal

import msgspec

from octavo.runtime.offload.stats import OffloadStats
from octavo.runtime.source_messages import AnswerRules, Source
from octavo.runtime.vision.recipes import PromptImage, VisionModel

FinishReason = Literal["stop", "length", "repetition", "abort", "error"]


Marker = tuple[int | str, ...]
"""A marker's pieces: a token by its id, or a text, however it is tokenized."""


class Reasoning(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a model thinks before it answers.

    end: what ends it. is_open: the prompt has begun it; else `begin` does where it is the first that the answer says,
    but for whitespace, and an empty one never. budget: None, or how many tokens it may have; then the tokens of
    `closing`, which say `end`, are forced. in_grammar: the answer's grammar describes the reasoning too.
    """

    end: Marker
    is_open: bool = False
    begin: Marker = ()
    budget: int | None = None
    closing: tuple[int, ...] = ()
    in_grammar: bool = False


class Triggers(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where a grammar that sleeps wakes up; until then the answer is free, and costs no mask.

    token_ids: it wakes at one of these tokens. texts: at one of these texts, however it is tokenized. start: where the
    answer's first character that is no whitespace is this one. What has woken the grammar is the first thing that it
    reads. once: when the grammar is through, the answer is over; else the grammar sleeps again.
    """

    token_ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    start: str = ""
    once: bool = False


class Constraint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an answer must look like: a grammar, and from where on it holds.

    grammar: llguidance's own JSON, as `LLMatcher.grammar_from_json_schema` and its like write it; empty where only
    the reasoning has a limit.
    reasoning: stands in front of what the grammar is about, and is free. triggers: None: the grammar holds from the
    first token on; else where they say.
    """

    grammar: str = ""
    reasoning: Reasoning | None = None
    triggers: Triggers | None = None


class RepetitionDetection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """End an answer with "repetition" when its end is a pattern of tokens, `min_count` times in a row."""

    max_pattern_size: int
    min_pattern_size: int
    min_count: int


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How one sequence is sampled. Defaults are OpenAI's; a server resolves a model's own defaults before this.

    temperature 0 is greedy. top_k 0 and top_p 1.0 and min_p 0.0 are off. max_tokens counts generated tokens and is
    always set: the server fills in what the context leaves. stop_token_ids (the model's end tokens among them,
    unless the request ignores them) end the sequence once min_tokens have been generated; before that they can't be
    sampled.
    logprobs: None, or how many of the most likely tokens to report beside the sampled one (0: only that one).
    logprob_token_ids: further tokens to report, behind the most likely ones.
    prompt_logprobs, prompt_logprob_token_ids: the same for each prompt token.
    allowed_token_ids: nothing else may be sampled.
    forbidden: sequences of tokens that the answer may not contain (bad_words).
    constraint: what the answer must look like. It ends with "stop" where its grammar allows nothing more.
    rules: what it keeps to beside that; None: nothing.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] | None = None
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    forbidden: tuple[tuple[int, ...], ...] = ()
    logprob_token_ids: tuple[int, ...] = ()
    prompt_logprob_token_ids: tuple[int, ...] = ()
    repetition: RepetitionDetection | None = None
    rules: AnswerRules | None = None

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def changes_logits(self) -> bool:
        """Whether a greedy choice may differ from the argmax of the model's logits."""
        return (
            self.has_penalties
            or bool(self.logit_bias)
            or self.allowed_token_ids is not None
            or self.constraint is not None
            or bool(self.forbidden)
            or self.rules is not None
            or (self.min_tokens > 0 and bool(self.stop_token_ids))
        )

    @property
    def may_jump(self) -> bool:
        """Whether a token that the constraint forces may be taken without the model's logits."""
        return (
            self.constraint is not None
            and self.logprobs is None
            and self.allowed_token_ids is None
            and not self.forbidden
        )


PoolingTask = Literal["embed", "classify", "token_embed", "token_classify"]


class PoolingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a request wants of its prompt's hidden states, instead of tokens.

    task: one vector of the prompt, or one for each token (`token_`): an embedding, or a classifier's scores.
    dimensions: the first so many numbers of an embedding; None: all. use_activation: whether embeddings get the length
    1, and logits become probabilities; None: as the model says. second: where the second of two texts begins, whose
    tokens have the second token type; None: there is one text.
    """

    task: PoolingTask = "embed"
    dimensions: int | None = None
    use_activation: bool | None = None
    second: int | None = None


class AddRequest(msgspec.Struct, frozen=True, tag="add"):
    """A prompt to complete, once or several times: it crosses the socket once, whatever the number of its answers.

    other_ids: further answers to the same prompt, each a request of its own from then on; where there is a seed, it
    counts up from one answer to the next. cache_salt: only requests with the same salt share cached prefixes.
    priority: lower ones go first, where the engine's scheduling policy is `priority`. owner: whose these requests are;
    each owner gets a fair share.
    num_prompt: how many of token_ids are the prompt; None: all. The others are the beginning of the answer, which
    another engine has generated: max_tokens, min_tokens, penalties and random draws count them.
    adapter: the digest of a LoadAdapter that came before; empty: the model alone.
    pooling: what is wanted instead of an answer; None: an answer.
    images: of the prompt, in their order.
    features: what an encoder reads (AudioSource), float32, little-endian; such a request has one answer.
    source_ids: the text that an encoder reads (TextSource); token_ids are what its decoder begins with.
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    arrival_time: float  # time.time() in the server, for the queue-time metrics
    cache_salt: str = ""
    other_ids: list[str] = []
    priority: int = 0
    owner: str = ""
    num_prompt: int | None = None
    adapter: str = ""
    pooling: PoolingParams | None = None
    images: tuple[PromptImage, ...] = ()
    features: bytes = b""
    source_ids: list[int] = []

    @property
    def prompt_ids(self) -> list[int]:
        """The client's prompt: what an encoder reads, or what the answer goes on from."""
        return self.source_ids or self.token_ids

    @property
    def num_read(self) -> int:
        """Tokens that are computed before the answer's first one."""
        return len(self.source_ids) + len(self.token_ids)

    @property
    def prompt_length(self) -> int:
        """The number of the prompt's own tokens."""
        return len(self.token_ids) if self.num_prompt is None else self.num_prompt

    @property
    def request_ids(self) -> list[str]:
        """The ids of all answers."""
        return [self.request_id, *self.other_ids]

    def answers(self) -> list[AddRequest]:
        """A request for each answer. They share the prompt's list and, without a seed, their parameters."""
        return [self.answer(number) for number in range(1 + len(self.other_ids))]

    def answer(self, number: int) -> AddRequest:
        """The request for one of the answers."""
        if not self.other_ids:
            return self
        seed = self.params.seed
        return AddRequest(
            self.request_ids[number],
            self.token_ids,
            self.params if seed is None else msgspec.structs.replace(self.params, seed=seed + number),
            self.arrival_time,
            self.cache_salt,
            priority=self.priority,
            owner=self.owner,
            num_prompt=self.num_prompt,
            adapter=self.adapter,
            images=self.images,
            source_ids=self.source_ids,
        )


class AbortRequest(msgspec.Struct, frozen=True, tag="abort"):
    """Stop these requests wherever they are; unknown ids are ignored. No output follows for them."""

    request_ids: list[str]


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Answered by a Pong from the engine's loop itself, so that an answer means that the loop turns."""

    nonce: int


class ResetPrefixCache(msgspec.Struct, frozen=True, tag="reset_prefix_cache"):
    """Forget all cached prefixes that no running request uses."""


class Pause(msgspec.Struct, frozen=True, tag="pause"):
    """Compute no step until Resume; requests are taken and kept."""


class Resume(msgspec.Struct, frozen=True, tag="resume"):
    """Go on."""


class Sleep(msgspec.Struct, frozen=True, tag="sleep"):
    """Give the KV cache's memory back and forget all cached prefixes. Answered by Asleep; the next request may come."""


class Vocabulary(msgspec.Struct, frozen=True, tag="vocabulary"):
    """What grammars are about, sent once, when the engine is ready.

    tokens: the bytes of each token by its id. special_ids: tokens that no text may contain. end_ids: those that end an
    answer. tokenizer: the tokenizer itself, as its library writes it (JSON).
    """

    tokens: list[bytes]
    special_ids: list[int]
    end_ids: list[int]
    tokenizer: str


class LoadAdapter(msgspec.Struct, frozen=True, tag="load_adapter"):
    """Read an adapter's directory, which must have this digest. Answered by AdapterLoaded, also where it is known.

    name: for those who watch; requests name the digest.
    """

    digest: str
    directory: str
    name: str


class DropAdapter(msgspec.Struct, frozen=True, tag="drop_adapter"):
    """No request names this adapter any more; those that have come go on with it."""

    digest: str


class AbandonServer(msgspec.Struct, frozen=True, tag="abandon_server"):
    """A server process has ended: stop all requests whose ids begin with its name (see runtime/shared_link.py)."""

    name: str


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """End the process now. is_final: no other engine is started in its place."""

    is_final: bool = False


ToEngine = (
    AddRequest
    | AbortRequest
    | Ping
    | ResetPrefixCache
    | Pause
    | Resume
    | Sleep
    | Vocabulary
    | LoadAdapter
    | DropAdapter
    | AbandonServer
    | Shutdown
)


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position: of the token that stands there, with its rank (1 is best), and of others.

    top_ids: the most likely tokens, then those that the request names.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class Pooled(msgspec.Struct, frozen=True, array_like=True):
    """What a pooled request brought. data: float32, little-endian, rows of `width` numbers: one, or one a token."""

    data: bytes
    width: int


class TokenOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one step brought for one request: usually one token; the last one carries finish_reason.

    stop_token_id is the token that ended it (it is also the last of token_ids). prompt_logprobs comes once, with the
    first token: entry i belongs to prompt token i; entry 0 is None, since nothing predicts the first token.
    timing fields are time.time() values, set with the first token. is_refused: the error is about the request itself.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs | None] | None = None
    num_cached_tokens: int | None = None
    scheduled_time: float | None = None
    first_token_time: float | None = None
    is_refused: bool = False
    num_preemptions: int = 0  # of this request, so far
    num_fetched_tokens: int = 0  # of num_cached_tokens, those that were read from a file
    checked: tuple[int, int] | None = None  # drafts that the step has checked, and how many were right; None: no drafts
    pooled: Pooled | None = None  # of a pooled request, which has no tokens; with it comes the finish_reason "stop"


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """Gauges as they are, and counters as totals since start.

    num_drafts: sequences of steps that checked drafts; num_draft_tokens: those drafts. accepted_per_pos: how many first
    ones, second ones and so on of theirs were right.
    """

    num_running: int
    num_waiting: int
    kv_cache_usage: float  # 0..1
    num_preemptions: int
    prefix_cache_queries: int  # tokens
    prefix_cache_hits: int  # tokens
    step_tokens: int  # of the step that is over with this message; 0 where none is
    num_deferred: int = 0  # of those that wait: they would not be admitted if there were room
    num_drafts: int = 0
    num_draft_tokens: int = 0
    accepted_per_pos: list[int] = []
    running_adapters: tuple[str, ...] = ()  # digests of those that requests which run use
    waiting_adapters: tuple[str, ...] = ()  # of those that requests which wait name
    offload: OffloadStats | None = None  # where there is --kv-offloading-path


class SharedLoad(msgspec.Struct, frozen=True, array_like=True):
    """What one of several server processes can't know of an engine that all of them use.

    num_prompt_tokens, seconds    computed for anybody since the last message to this process, and what that took
    num_generated                 tokens that this step brought for anybody
    num_queued                    of this process's answers, those that wait for room
    num_other_tokens              of the prompts of other processes' answers that have brought nothing yet
    num_other_silent, num_others  other processes' answers: those that have brought nothing yet, and all
    """

    num_prompt_tokens: int
    seconds: float
    num_generated: int
    num_queued: int = 0
    num_other_tokens: int = 0
    num_other_silent: int = 0
    num_others: int = 0


class StepOutputs(msgspec.Struct, frozen=True, tag="outputs", omit_defaults=True):
    """What a step brought. shared: None where the engine serves one process alone."""

    outputs: list[TokenOutput]
    stats: EngineStats
    shared: SharedLoad | None = None


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    nonce: int


class AdapterLoaded(msgspec.Struct, frozen=True, tag="adapter_loaded"):
    """What became of a LoadAdapter. error: why it can't be served; empty: it can."""

    digest: str
    error: str = ""


class Asleep(msgspec.Struct, frozen=True, tag="asleep"):
    """What became of a Sleep: bytes that the process held before, and not after it. error: why it gave none back."""

    num_bytes: int
    error: str = ""


PairTemplate = Literal["", "qwen3_reranker"]


class PooledModel(msgspec.Struct, frozen=True):
    """What a model does that generates nothing.

    tasks: what requests may ask for. size: numbers of an embedding, or labels. dimensions: sizes that embeddings may be
    cut to; (): none; None: any. num_token_types: that a prompt's tokens may have. template: the words in which pairs of
    texts are asked; empty: as the tokenizer puts two texts together.
    """

    tasks: tuple[PoolingTask, ...]
    size: int
    dimensions: tuple[int, ...] | None = ()
    num_token_types: int = 0
    template: PairTemplate = ""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Sent once, when the engine can serve. `report` is what the start-up table prints.

    pooled: None: it generates. vision: None: it reads text alone. source: what requests bring beside a prompt for an
    encoder; None: nothing.
    """

    max_model_len: int
    num_blocks: int
    block_size: int
    vocab_size: int
    report: StartupReport
    pooled: PooledModel | None = None
    vision: VisionModel | None = None
    source: Source | None = None


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine can't go on (or can't start): one line for people, and the traceback for the log.

    No traceback where the line is about the model or a flag.
    """

    message: str
    traceback: str = ""


class StartupReport(msgspec.Struct, frozen=True):
    """The one table of a start: seconds by phase, bytes, and which body serves which kind of layer."""

    model: str
    architecture: str
    dtype: str
    device: str
    kv_cache_dtype: str
    layers: list[tuple[str, str, str]]  # (kind of layer, scheme, body)
    weight_bytes: int
    kv_cache_bytes: int
    seconds: dict[str, float]
    notes: list[str] = []
    ranks: list[str] = []  # what each of several ranks holds
    deterministic: bool = False  # all bodies are batch-invariant


FromEngine = Ready | Failed | StepOutputs | Pong | AdapterLoaded | Asleep
