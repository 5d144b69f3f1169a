"""One request as the engine sees it while it lives: its tokens, and how far they are in the cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from octavo.runtime.messages import (
    AddRequest,
    FinishReason,
    Logprobs,
    Pooled,
    SamplingParams,
    TokenOutput,
)
from octavo.runtime.scheduling.adapter_slots import Adapter
from octavo.runtime.scheduling.block_pool import hash_block, salted_root
from octavo.runtime.scheduling.kv_groups import BlockTables
from octavo.runtime.vision.recipes import PromptImage, tokens_at_once


class Sequence:
    """Prompt and output tokens in one list; the scheduler owns everything about blocks, slots and progress.

    Steps are planned before the results of earlier ones are there: `token_ids` are the tokens that are known,
    `num_planned` and `num_sampling` say what the steps under way will add.

    num_planned      tokens whose keys and values are in the cache once all planned steps have run; 0 on preemption
    num_sampling     tokens beyond token_ids that the steps under way bring for sure
    num_steps        steps under way that compute some of its tokens
    num_void_steps   how many of those don't count: an earlier step did not bring the token that they go on from
    num_preemptions  how often it gave its blocks back
    drafts           guesses of the tokens behind token_ids, for the next step to check
    drafting         what whoever makes its drafts keeps of it; for nobody else
    checks_drafts    a step under way does so: how many tokens it brings is only known afterwards
    rank             its place in the queue before its number: `waiting.rank_of`
    tag, owner       whose it is, and where its owner's fair share puts it: `FairShares.tag`
    is_ready         whether it may be admitted: what it still waits for outside, such as its grammar, may take long
    adapter          what its tokens are computed with beside the model; None: the model alone
    grammar          what its answer must look like, compiled; for the sampler alone
    has_ended        it was answered, or is to be forgotten: what steps under way bring for it is dropped
    blocks           its block tables, one for each group of layers
    slot             its row in the block tables of all ranks while it runs, else -1
    number           how many requests came before it: its place in the queue, and the seed of a request without one
    prompt_logprobs  None unless asked for; grows with the prefill, sent with the first token
    num_listed       prompt tokens whose log-probabilities are there or under way; the first token has none
    cache_salt, root the request's salt, and the parent of the first block's hash, which it makes another one
    may_fetch        whether it has still to ask for blocks of its prefix that lie in a file
    num_fetched      of its cached tokens, those that came from there
    pooling          what is wanted instead of tokens; None: tokens
    images           of its prompt. at_once: tokens of the largest one that a step may not divide; 0: there is none
    axes             positions of its prompt's tokens where they are no line; for whoever makes steps' inputs alone
    features, source_ids  as of AddRequest: read again where it begins again
    """

    __slots__ = (
        "_hashes",
        "adapter",
        "arrival_time",
        "at_once",
        "axes",
        "blocks",
        "cache_salt",
        "checks_drafts",
        "drafting",
        "drafts",
        "features",
        "first_token_time",
        "grammar",
        "has_ended",
        "images",
        "is_plain_greedy",
        "is_ready",
        "may_fetch",
        "num_cached",
        "num_fetched",
        "num_listed",
        "num_planned",
        "num_preemptions",
        "num_prompt",
        "num_sampling",
        "num_steps",
        "num_void_steps",
        "number",
        "owner",
        "params",
        "pooling",
        "prompt_logprobs",
        "rank",
        "request_id",
        "root",
        "scheduled_time",
        "slot",
        "source_ids",
        "tag",
        "token_ids",
    )

    def __init__(
        self,
        request: AddRequest,
        number: int,
        blocks: BlockTables,
        *,
        is_ready: bool = True,
        adapter: Adapter | None = None,
    ) -> None:
        self.request_id = request.request_id
        self.params = request.params
        self.pooling = request.pooling
        self.images = request.images
        self.at_once = tokens_at_once(request.images)
        self.axes: object = None
        self.features = request.features
        self.source_ids = request.source_ids
        self.token_ids = list(request.token_ids)
        self.num_prompt = request.prompt_length
        self.arrival_time = request.arrival_time
        self.number = number
        self.num_planned = 0
        self.num_sampling = 0
        self.num_steps = 0
        self.num_void_steps = 0
        self.num_preemptions = 0
        self.drafts: list[int] = []
        self.drafting: object = None
        self.checks_drafts = False
        self.is_ready = is_ready
        self.adapter = adapter
        self.rank = 0.0
        self.tag = 0.0
        self.owner = request.owner
        self.grammar: object = None
        self.has_ended = False
        self.num_cached: int | None = None
        self.may_fetch = True
        self.num_fetched = 0
        self.blocks = blocks
        self._hashes: list[bytes] = []
        self.cache_salt = request.cache_salt
        self.root = salted_root(request.cache_salt, "" if adapter is None else adapter.digest)
        self.slot = -1
        self.scheduled_time: float | None = None
        self.first_token_time: float | None = None
        self.prompt_logprobs: list[Logprobs | None] | None = None
        if request.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        self.num_listed = 1
        self.is_plain_greedy = _is_plain_greedy(request.params)

    @property
    def length(self) -> int:
        """All of its tokens, with those that steps under way are sampling."""
        return len(self.token_ids) + self.num_sampling

    @property
    def wants(self) -> Literal["token", "pooled"]:
        """What it wants of the step that computes its last known token."""
        return "token" if self.pooling is None else "pooled"

    @property
    def may_begin(self) -> bool:
        """Whether all that it waits for outside is there."""
        return self.is_ready and (self.adapter is None or self.adapter.is_up)

    @property
    def has_begun(self) -> bool:
        """Whether a token of its answer is known, be it from another engine."""
        return len(self.token_ids) > self.num_prompt

    @property
    def first_uncertain(self) -> int:
        """The first position that may be planned again: a step under way may bring no token."""
        return min(self.num_planned, len(self.token_ids) - 1)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether logits of prompt positions are still to be planned; then the prefix cache can't help."""
        return self.prompt_logprobs is not None and self.num_listed < self.num_prompt

    def output(
        self,
        tokens: list[int],
        finish_reason: FinishReason | None,
        logprobs: list[Logprobs] | None,
        now: float,
        checked: tuple[int, int] | None = None,
        pooled: Pooled | None = None,
    ) -> TokenOutput:
        """What the server is told of these new tokens, or of what was pooled; with the first ones, when they came and
        what was cached.

        checked: as in TokenOutput.
        """
        listed = None if logprobs is None else logprobs[: len(tokens)]
        stops = finish_reason == "stop" and tokens and tokens[-1] in self.params.stop_token_ids
        stop_token_id = tokens[-1] if stops else None
        is_first = self.first_token_time is None
        if is_first:
            self.first_token_time = now
        return TokenOutput(
            self.request_id,
            tokens,
            finish_reason,
            stop_token_id,
            logprobs=listed,
            prompt_logprobs=self.prompt_logprobs if is_first else None,
            num_cached_tokens=self.num_cached if is_first else None,
            num_fetched_tokens=self.num_fetched if is_first else 0,
            scheduled_time=self.scheduled_time if is_first else None,
            first_token_time=now if is_first else None,
            num_preemptions=self.num_preemptions,
            checked=checked,
            pooled=pooled,
        )

    def go_back(self) -> None:
        """A token did not come: its position is planned again, and steps that were planned behind it are void."""
        self.num_sampling = 0
        self.num_void_steps = self.num_steps
        if self.slot >= 0:
            self.num_planned = len(self.token_ids) - 1

    def block_hashes(self, count: int, block_size: int) -> list[bytes]:
        """The hashes of the first `count` blocks, which must be full of known tokens."""
        hashes = self._hashes
        while len(hashes) < count:
            begin = len(hashes) * block_size
            parent = hashes[-1] if hashes else self.root
            tokens = self.token_ids[begin : begin + block_size]
            seen = self.images_among(begin, begin + block_size) if self.images else ()
            hashes.append(hash_block(parent, tokens, [image.digest for image in seen]))
        return hashes[:count]

    def uncut(self, size: int, start: int | None = None) -> int:
        """So many of its tokens from start on, by default those that are not planned, or fewer, where they would end
        within an image that is computed in one step.
        """
        if not self.images:
            return size
        begin = self.num_planned if start is None else start
        end = begin + size
        cut = [it for it in self.images_among(end - 1, end) if it.is_whole and end < it.start + it.length]
        return max(0, cut[0].start - begin) if cut else size

    def images_among(self, begin: int, end: int) -> list[PromptImage]:
        """The images that some of the tokens begin .. end stand for."""
        return [image for image in self.images if image.start < end and image.start + image.length > begin]


def images_wait(running: Iterable[Sequence]) -> bool:
    """Whether an image that needs many blocks at once may get those that steps under way still see."""
    return any(it.at_once and it.num_steps for it in running)


def is_stop(params: SamplingParams, token: int, num_outputs: int) -> bool:
    """Whether a sequence ends with this token, the num_outputs-th of its answer."""
    return token in params.stop_token_ids and num_outputs > params.min_tokens


def is_full(sequence: Sequence, length: int, max_model_len: int) -> bool:
    """Whether a sequence of so many tokens has all that it may get."""
    return length - sequence.num_prompt >= sequence.params.max_tokens or length >= max_model_len


def append_tokens(sequence: Sequence, tokens: list[int], max_model_len: int) -> FinishReason | None:
    """Extend a sequence up to the token that ends it, and return why that one does."""
    for token in tokens:
        sequence.token_ids.append(token)
        if is_stop(sequence.params, token, len(sequence.token_ids) - sequence.num_prompt):
            return "stop"
        if is_full(sequence, len(sequence.token_ids), max_model_len):
            return "length"
        if repeats_itself(sequence):
            return "repetition"
    return None


def repeats_itself(sequence: Sequence) -> bool:
    """Whether the answer ends in a pattern as often as its request forbids; as vLLM looks for it."""
    rule = sequence.params.repetition
    if rule is None or len(sequence.token_ids) - sequence.num_prompt < sequence.params.min_tokens:
        return False
    tokens = sequence.token_ids
    num_outputs = len(tokens) - sequence.num_prompt
    for size in range(max(1, rule.min_pattern_size), min(rule.max_pattern_size, num_outputs // rule.min_count) + 1):
        if tokens[-1] == tokens[-1 - size]:  # most sizes end here
            length = size * (rule.min_count - 1)
            if tokens[-length:] == tokens[-length - size : -size]:
                return True
    return False


def _is_plain_greedy(params: SamplingParams) -> bool:
    """Whether the next token is the argmax of the model's logits and nothing else is wanted of them."""
    return (
        params.temperature == 0
        and not params.changes_logits
        and params.logprobs is None
        and params.prompt_logprobs is None
    )
