"""What the pooled routes take: OpenAI's embeddings with vLLM's fields, vLLM's score, classify and pooling, and
reranking as Jina and Cohere have it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from octavo.runtime.messages import PoolingTask
from octavo.server.dialects.conversation import ChatOptions
from octavo.server.dialects.fields import (
    MAX_TOKENS_SENT,
    Count,
    Flag,
    Integer,
    RequestName,
    Strict,
    Text,
    TextOption,
    TokenId,
    text_or_list,
)
from octavo.server.errors import field_error
from octavo.server.hints import PooledHints
from octavo.server.pooled_inputs import Cut
from octavo.server.pooled_numbers import NumberType

MAX_TEXTS = 1 << 14  # of one request

Ids = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS_SENT, fail_fast=True)]
Lists = Annotated[list[Ids], Field(max_length=MAX_TEXTS, fail_fast=True)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)]
Positive = Annotated[Integer, Field(ge=1, lt=2**31)]
Encoding = Literal["float", "base64"]


def _kind_of_input(value: object) -> str:
    """By the first element, as everybody's clients send lists of one kind."""
    if not isinstance(value, list):
        return "<text>"
    first = value[0] if value else None
    if isinstance(first, list):
        return "<lists of ids>"
    return "<texts>" if isinstance(first, str) or first is None else "<ids>"


Input = Annotated[
    TextOption
    | Annotated[Texts, Tag("<texts>")]
    | Annotated[Ids, Tag("<ids>")]
    | Annotated[Lists, Tag("<lists of ids>")],
    Discriminator(_kind_of_input),
]
TextOrTexts = Annotated[TextOption | Annotated[Texts, Tag("<list>")], Discriminator(text_or_list)]


class PooledRequest(PooledHints, Strict):
    """What all of them have in common."""

    model: Text | None = None
    truncate_prompt_tokens: Annotated[Integer, Field(ge=-1, lt=2**31)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    priority: Annotated[Integer, Field(ge=-(2**31), lt=2**31)] | None = None
    request_id: RequestName | None = None

    @property
    def cut(self) -> Cut:
        return Cut(self.truncate_prompt_tokens, self.truncation_side or "right")

    @property
    def user_name(self) -> str:
        """Whose request it is, as far as --fair-by user goes by it."""
        return self.user[:256] if isinstance(self.user, str) else ""

    @model_validator(mode="after")
    def _check_truncation(self) -> PooledRequest:
        if self.truncate_prompt_tokens == 0:
            raise field_error(
                "truncate_prompt_tokens", "truncate_prompt_tokens must be positive, or -1 for what the model takes"
            )
        return self


class EmbeddingOptions(PooledRequest):
    """What embeddings are to be, whatever they are made of."""

    encoding_format: Encoding | None = None
    embed_dtype: NumberType | None = None
    endianness: Literal["native", "little"] | None = None
    dimensions: Positive | None = None
    use_activation: Flag | None = None
    normalize: Flag | None = None

    @property
    def normalizes(self) -> bool | None:
        return self.normalize if self.use_activation is None else self.use_activation


class EmbeddingRequest(EmbeddingOptions):
    """POST /v1/embeddings.

    prompt_name: one of the prompts of config_sentence_transformers.json; prompt: a text instead.
    """

    input: Input
    add_special_tokens: Flag = True
    prompt_name: Text | None = None
    prompt: Text | None = None

    @model_validator(mode="after")
    def _check_prompts(self) -> EmbeddingRequest:
        if self.prompt is not None and self.prompt_name is not None:
            raise field_error("prompt", "prompt and prompt_name: a text has one before it; leave one of them out")
        return self


class Messages(ChatOptions):
    """A conversation in place of texts: one prompt, which the chat template makes of it."""

    add_generation_prompt: Flag = False


class EmbeddingChatRequest(EmbeddingOptions, Messages):
    """POST /v1/embeddings of a conversation, as vLLM has it."""


class PoolingRequest(EmbeddingRequest):
    """POST /pooling: any task of the model, with rows as they are."""

    task: PoolingTask | None = None


class PoolingChatRequest(EmbeddingChatRequest):
    """The same of a conversation."""

    task: PoolingTask | None = None


class ClassifyOptions(PooledRequest):
    """What labels are to be, whatever they are of."""

    use_activation: Flag | None = None


class ClassifyRequest(ClassifyOptions):
    """POST /classify."""

    input: Input
    add_special_tokens: Flag = True


class ClassifyChatRequest(ClassifyOptions, Messages):
    """POST /classify of a conversation."""


def _kind_of_body(body: object) -> str:
    return "<messages>" if isinstance(body, dict) and "messages" in body else "<input>"


AnyEmbeddingRequest = Annotated[
    Annotated[EmbeddingRequest, Tag("<input>")] | Annotated[EmbeddingChatRequest, Tag("<messages>")],
    Discriminator(_kind_of_body),
]
AnyPoolingRequest = Annotated[
    Annotated[PoolingRequest, Tag("<input>")] | Annotated[PoolingChatRequest, Tag("<messages>")],
    Discriminator(_kind_of_body),
]
AnyClassifyRequest = Annotated[
    Annotated[ClassifyRequest, Tag("<input>")] | Annotated[ClassifyChatRequest, Tag("<messages>")],
    Discriminator(_kind_of_body),
]


_SIDES = (("queries", "documents"), ("text_1", "text_2"), ("data_1", "data_2"))


class ScoreRequest(PooledRequest):
    """POST /score: how well texts fit each other, by any of the three names that vLLM's fields have had."""

    queries: TextOrTexts | None = None
    documents: TextOrTexts | None = None
    text_1: TextOrTexts | None = None
    text_2: TextOrTexts | None = None
    data_1: TextOrTexts | None = None
    data_2: TextOrTexts | None = None
    use_activation: Flag | None = None
    instruction: Text | None = None

    @property
    def sides(self) -> tuple[list[str], list[str]]:
        """The texts on either side."""
        one, other = (getattr(self, name) for name in self.names)
        return ([one] if isinstance(one, str) else one), ([other] if isinstance(other, str) else other)

    @property
    def names(self) -> tuple[str, str]:
        """The fields that the request has used."""
        return next(pair for pair in _SIDES if getattr(self, pair[0]) is not None)

    @model_validator(mode="after")
    def _check_sides(self) -> ScoreRequest:
        given = [pair for pair in _SIDES if any(getattr(self, name) is not None for name in pair)]
        if len(given) != 1 or any(getattr(self, name) is None for name in given[0]):
            raise field_error("queries", "texts are queries and documents, or text_1 and text_2, or data_1 and data_2")
        one, other = self.sides
        if len(one) not in (1, len(other)):
            raise field_error(
                self.names[0],
                f"{self.names[0]} has {len(one)} texts, and {self.names[1]} {len(other)}: one text or as many work",
            )
        return self


class Document(Strict):
    """A text as an object, as Jina's and Cohere's clients may send it."""

    text: Text


def _kind_of_document(value: object) -> str:
    return "<object>" if isinstance(value, dict | Document) else "<text>"


OneDocument = Annotated[TextOption | Annotated[Document, Tag("<object>")], Discriminator(_kind_of_document)]


class RerankRequest(PooledRequest):
    """POST /rerank, /v1/rerank, /v2/rerank: documents by how well they answer a query."""

    query: Text
    documents: Annotated[list[OneDocument], Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)]
    top_n: Count | None = None
    return_documents: Flag | None = None
    max_tokens_per_doc: Positive | None = None
    use_activation: Flag | None = None
    instruction: Text | None = None

    @property
    def texts(self) -> list[str]:
        return [each if isinstance(each, str) else each.text for each in self.documents]


class CohereEmbedRequest(PooledHints, Strict):
    """POST /v2/embed, as Cohere has it."""

    model: Text | None = None
    texts: Texts
    input_type: Literal["search_document", "search_query", "classification", "clustering"] | None = None
    embedding_types: (
        Annotated[list[Literal["float", "base64", "binary", "ubinary"]], Field(min_length=1, max_length=4)] | None
    ) = None
    output_dimension: Positive | None = None
    truncate: Literal["NONE", "START", "END"] = "END"
    max_tokens: Positive | None = None
    priority: Annotated[Integer, Field(ge=-(2**31), lt=2**31)] | None = None

    def cut_within(self, longest: int) -> Cut:
        """longest: tokens that the model takes; more of them in max_tokens are as many, as Cohere has it."""
        most = None if self.max_tokens is None else min(self.max_tokens, longest)
        if self.truncate == "NONE":
            return Cut(limit=most)
        return Cut(most or -1, "left" if self.truncate == "START" else "right")


IdsOrLists = Annotated[
    Annotated[Ids, Tag("<ids>")] | Annotated[Lists, Tag("<lists of ids>")],
    Discriminator(_kind_of_input),
]


class EncodeRequest(Strict):
    """POST /encode, as SGLang has it."""

    text: TextOrTexts | None = None
    input_ids: IdsOrLists | None = None
    rid: RequestName | None = None
    dimensions: Positive | None = None
