"""What SGLang's /v1/score takes of a model that generates, and vLLM's /generative_scoring."""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Field, Tag, model_validator

from octavo.server.dialects.fields import (
    MAX_LOGPROB_TOKENS,
    MAX_TOKENS_SENT,
    Flag,
    Integer,
    RequestName,
    Strict,
    Text,
    TextOption,
    TokenId,
)
from octavo.server.dialects.pooled_request import Lists, Texts
from octavo.server.errors import field_error
from octavo.server.hints import PooledHints

Query = Annotated[list[TokenId], Field(max_length=MAX_TOKENS_SENT, fail_fast=True)]


def _kind_of_items(value: object) -> str:
    if not isinstance(value, list):
        return "<text>"
    return "<lists of ids>" if value and isinstance(value[0], list) else "<texts>"


class LabelScoreRequest(PooledHints, Strict):
    """POST /v1/score: how probable each label is as the token behind the query and an item. Both are text, or ids.

    apply_softmax: among the labels alone; else among all tokens. item_first: the item stands before the query.
    """

    model: Text | None = None
    query: Annotated[
        TextOption | Annotated[Query, Tag("<ids>")],
        Discriminator(lambda value: "<ids>" if isinstance(value, list) else "<text>"),
    ]
    items: Annotated[
        TextOption | Annotated[Texts, Tag("<texts>")] | Annotated[Lists, Tag("<lists of ids>")],
        Discriminator(_kind_of_items),
    ]
    label_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_LOGPROB_TOKENS, fail_fast=True)]
    apply_softmax: Flag = False
    item_first: Flag = False
    priority: Annotated[Integer, Field(ge=-(2**31), lt=2**31)] | None = None
    rid: RequestName | None = None

    @property
    def texts(self) -> list[str] | None:
        """The items, where they are text."""
        if isinstance(self.items, str):
            return [self.items]
        return None if isinstance(self.items[0], list) else self.items  # told by its first

    @model_validator(mode="after")
    def _check_kinds(self) -> LabelScoreRequest:
        if isinstance(self.query, str) != (self.texts is not None):
            raise field_error("items", "query and items: both are text, or both are token ids")
        return self


class GenerativeScoringRequest(LabelScoreRequest):
    """POST /generative_scoring, as vLLM has it: a text and its items are tokenized each by itself.

    add_special_tokens: around the query.
    """

    apply_softmax: Flag = True
    add_special_tokens: Flag = True
    cache_salt: Annotated[Text, Field(min_length=1, max_length=1024)] | None = None
    request_id: RequestName | None = None
