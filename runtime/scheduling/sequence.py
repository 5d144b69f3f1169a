"""One request as the engine sees it while it lives: its tokens, and how far they are in the cache."""

from __future__ import annotations

from octavo.runtime.messages import AddRequest, Logprobs, SamplingParams
from octavo.runtime.scheduling.block_pool import hash_block, salted_root
from octavo.runtime.scheduling.penalties import TokenCounts


class Sequence:
    """Prompt and output tokens in one list; the scheduler owns everything about blocks, rows and progress.

    num_computed     tokens whose keys and values are in the cache; back to 0 on preemption
    blocks           the block table
    row              its row in the tables of inputs.py while it runs, else -1
    number           how many requests came before it: the seed of a request without a seed
    prompt_logprobs  None unless asked for; grows with the prefill, sent with the first token
    root             the parent of the first block's name; requests with other cache salts have another one
    token_counts     the sampler's, for penalties; made when first needed
    """

    __slots__ = (
        "arrival_time",
        "block_names",
        "blocks",
        "first_token_time",
        "is_plain_greedy",
        "num_cached",
        "num_computed",
        "num_prompt",
        "number",
        "params",
        "prompt_logprobs",
        "request_id",
        "root",
        "row",
        "scheduled_time",
        "token_counts",
        "token_ids",
    )

    def __init__(self, request: AddRequest, number: int) -> None:
        self.request_id = request.request_id
        self.params = request.params
        self.token_ids = list(request.token_ids)
        self.num_prompt = len(request.token_ids)
        self.arrival_time = request.arrival_time
        self.number = number
        self.num_computed = 0
        self.num_cached: int | None = None
        self.blocks: list[int] = []
        self.block_names: list[bytes] = []
        self.root = salted_root(request.cache_salt)
        self.row = -1
        self.scheduled_time: float | None = None
        self.first_token_time: float | None = None
        self.prompt_logprobs: list[Logprobs | None] | None = None
        if request.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        self.token_counts: TokenCounts | None = None
        self.is_plain_greedy = _is_plain_greedy(request.params)

    @property
    def num_outputs(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether logits of prompt positions are still missing; then the prefix cache can't help."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt

    def name_blocks(self, count: int, block_size: int) -> list[bytes]:
        """The hashes of the first `count` blocks, which must be full of tokens."""
        names = self.block_names
        while len(names) < count:
            begin = len(names) * block_size
            parent = names[-1] if names else self.root
            names.append(hash_block(parent, self.token_ids[begin : begin + block_size]))
        return names[:count]


def _is_plain_greedy(params: SamplingParams) -> bool:
    """Whether the next token is the argmax of the model's logits and nothing else is wanted of them."""
    return (
        params.temperature == 0
        and not params.changes_logits
        and params.logprobs is None
        and params.prompt_logprobs is None
    )
