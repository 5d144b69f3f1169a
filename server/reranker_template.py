"""How Qwen3-Reranker is asked: a query and a document in its own words, to which it says yes or no.

Its repository has the chat template of the model that it was made of, and scores of plain pairs would mean nothing.
"""

from __future__ import annotations

from octavo.server.errors import bad_request
from octavo.server.pooled_inputs import Cut, PooledPrompt, checked, limit_of, pair_prompt, pooled_facts
from octavo.server.prompts import encode
from octavo.server.served_model import ServedModel

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
BEHIND = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def reranker_prompt(
    query: str, document: str, instruction: str | None, name: str, model: ServedModel, cut: Cut
) -> PooledPrompt:
    """The prompt of a pair; where it is cut, the document loses its end. Raises ApiError."""
    text = f"<Instruct>: {instruction or INSTRUCTION}\n<Query>: {query}\n<Document>: {document}"
    before, ids, behind = (
        encode(part, name, model, add_special_tokens=False, must_fit=cut.most is None)
        for part in (BEFORE, text, BEHIND)
    )
    if cut.most is not None and cut.side == "left":
        raise bad_request(
            "truncation_side left: the instruction and the query stand in front of a document; right works",
            "truncation_side",
        )
    if cut.most is not None:
        ids = ids[: max(0, limit_of(cut, model) - len(before) - len(behind))]
    return PooledPrompt(checked([*before, *ids, *behind], name, model))


def asked_pair(
    first: str,
    second: str,
    name: str,
    model: ServedModel,
    cut: Cut,
    instruction: str | None = None,
    *,
    most_of_second: int | None = None,
    known: dict[str, list[int]] | None = None,
) -> PooledPrompt:
    """A pair of texts as the model reads it. most_of_second, known: as of `pair_prompt`. Raises ApiError."""
    if not pooled_facts(model).facts.template:
        if instruction is not None:
            raise bad_request("instruction: this model's pairs have no instruction; leave it out", "instruction")
        return pair_prompt(first, second, name, model, cut, most_of_second=most_of_second, known=known)
    if most_of_second is not None:
        ids = encode(second, name, model, add_special_tokens=False, must_fit=False)
        second = model.tokenizer.decode(ids[:most_of_second])
    return reranker_prompt(first, second, instruction, name, model, cut)
