"""octavo's and SGLang's own API as a backend: text and token ids to /generate, log-probabilities for `select`.

octavo's server makes a prompt of a conversation itself, by the model's own chat template (POST /tokenize), so that a
program's prompts are those of /v1/chat/completions. A server that doesn't needs a chat template by its name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from octavo.lang import loop
from octavo.lang.backend import Backend, Context, Generated, Json, OnText, check_select, content_of
from octavo.lang.choices import ChoicesDecision, ChoicesSamplingMethod, normalized
from octavo.lang.ir import Options
from octavo.lang.scoring import Ids, Scores
from octavo.lang.templates import RoleTexts, named
from octavo.lang.wire import BackendError, Wire

ANCHOR = "\n"
"""Choices are tokenized behind it: some tokenizers begin a text with a space, which a choice isn't to have."""
OF_REQUESTS = ("return_logprob", "logprob_start_len", "top_logprobs_num", "return_text_in_logprobs")
"""Options that stand in the request itself; all others are sampling_params."""
MAX_KNOWN = 4096  # choices whose tokens are kept


class RuntimeEndpoint(Backend):
    """A server at this address, which is asked at once what it serves.

    verify: False for a server whose certificate nobody vouches for. chat_template_name: one of templates.NAMED, or a
    RoleTexts; without it, the server makes prompts of turns. Raises ValueError for what is no address; BackendError.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        verify: bool | None = None,
        chat_template_name: str | RoleTexts | None = None,
        *,
        max_connections: int = 256,
    ) -> None:
        if not (verify is None or isinstance(verify, bool)):
            raise ValueError(f"verify {verify!r}: only True and False; SSL_CERT_FILE names a file of certificates")
        self.base_url = base_url.rstrip("/")
        self.max_connections = max_connections
        self._template = None if chat_template_name is None else named(chat_template_name)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._wire = Wire(self.base_url, headers, insecure=verify is False, max_connections=max_connections)
        self._choice_ids: dict[str, list[int]] = {}
        self.model_info: Json = loop.run(self._wire.ask("GET", "/get_model_info"))

    def get_model_name(self) -> str:
        """What is served."""
        return str(self.model_info["model_path"])

    def get_server_info(self) -> Json:
        """What the server says of itself."""
        found: Json = loop.run(self._wire.ask("GET", "/get_server_info"))
        return found

    def flush_cache(self) -> None:
        """Forget all prefixes that no running request holds."""
        loop.run(self._wire.ask("POST", "/flush_cache"))

    def cache_prefix(self, prefix: str) -> None:
        """Compute a text, so that prompts that begin with it find it in the cache."""
        loop.run(self._wire.ask("POST", "/generate", {"text": prefix, "sampling_params": {"max_new_tokens": 0}}))

    def ask_native(self, body: Json) -> Any:
        """What POST /generate answers to this. Raises BackendError."""
        return loop.run(self._wire.ask("POST", "/generate", body))

    async def stream_native(self, body: Json, on_event: Callable[[Any], None]) -> None:
        """The same as a stream, in a coroutine of any loop; on_event is called by another thread."""
        await loop.awaited(self._wire.stream("/generate", {**body, "stream": True}, on_event))

    async def generate(self, context: Context, options: Options, on_text: OnText | None) -> Generated:
        """Raises BackendError and ValueError."""
        sampling = {name: value for name, value in options.items() if name not in OF_REQUESTS}
        if context.has_turns and self._template is not None:
            stop = sampling.get("stop") or []
            sampling["stop"] = [*([stop] if isinstance(stop, str) else stop), *self._template.stop]
        body = await self._prompt(context)
        body["sampling_params"] = sampling
        body |= {name: options[name] for name in OF_REQUESTS if name in options}
        if on_text is not None:
            return await self._streamed(body, on_text)
        answer = await self._wire.ask("POST", "/generate", body)
        return _generated(answer if isinstance(answer, list) else [answer])

    async def select(self, context: Context, choices: list[str], method: ChoicesSamplingMethod) -> ChoicesDecision:
        """One request scores all choices, behind the tokens of the text as it stands. Raises BackendError, ValueError.

        A choice's tokens are its own: none of them spans the end of the text, as one of the text and the choice written
        together might.
        """
        check_select(choices)
        asked = [self._ids(context), *(self._ids_of_choice(choice) for choice in choices)]
        prompt, *tokens = await asyncio.gather(*asked)
        if not prompt:
            raise ValueError("select: there is no text yet, and so nothing that makes a choice likely")
        alone = method.requires_unconditional_logprobs
        scores = Scores()
        for ids in tokens:
            scores.ask(prompt, ids)
            if alone:
                scores.ask((), ids)
        images = (tuple(prompt), context.image_urls)
        await asyncio.gather(*(self._score(batch, scores, *images) for batch in scores.batches()))
        inputs = [scores.of(prompt, ids) for ids in tokens]
        return method(
            choices=choices,
            normalized_prompt_logprobs=[normalized(entries) for entries in inputs],
            input_token_logprobs=inputs,
            output_token_logprobs=[[] for _ in choices],
            unconditional_token_logprobs=[scores.of((), ids) for ids in tokens] if alone else None,
        )

    async def text_of(self, context: Context) -> str:
        """The prompt that this context is. Raises BackendError, and ValueError for images in a template's text."""
        if not context.has_turns:
            return context.text
        if self._template is not None and context.image_urls:
            raise ValueError("an image has its place by the server's chat template: leave out chat_template_name")
        if self._template is not None:
            return self._template.text(context.messages, context.role, context.text)
        ids = await self._ids(context)
        found: str = (await self._wire.ask("POST", "/detokenize", {"tokens": ids}))["prompt"] if ids else ""
        return found

    async def _streamed(self, body: Json, on_text: OnText) -> Generated:
        said = ""
        meta: Json = {}

        def take(event: Any) -> None:
            nonlocal said, meta
            piece = event["text"][len(said) :]
            said = event["text"]
            meta = event["meta_info"]
            on_text(piece, meta)

        if (body["sampling_params"].get("n") or 1) > 1:
            raise ValueError("n: a streamed program has one answer to a gen; leave out stream=True, or fork")
        await self._wire.stream("/generate", {**body, "stream": True}, take)
        return _generated([{"text": said, "meta_info": meta}])

    async def _prompt(self, context: Context) -> Json:
        """The field of a request that says where to go on."""
        if context.has_turns and context.role is None:
            raise ValueError("gen stands outside of a turn, in a program that has turns: sgl.assistant(sgl.gen(...))")
        if context.has_turns and self._template is None:
            if context.role != "assistant" and not context.text:
                raise ValueError(f"gen begins a turn of role {context.role!r}: text must stand before it there")
            return {"input_ids": await self._ids(context)} | _images(context)
        return {"text": await self.text_of(context)}

    async def _ids(self, context: Context) -> list[int]:
        """The tokens of a context."""
        if context.has_turns and self._template is None:
            body = _turns(context)
            return [] if body is None else await self._rendered(body)
        return await self._tokens(await self.text_of(context), add_special_tokens=True)

    async def _rendered(self, body: Json) -> list[int]:
        try:
            return await self._tokenized(body)
        except BackendError as error:
            raise BackendError(
                f"the server makes no prompt of these turns: {error} (chat_template_name=... writes them down here)"
            ) from None

    async def _tokens(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return await self._tokenized({"prompt": text, "add_special_tokens": add_special_tokens})

    async def _tokenized(self, body: Json) -> list[int]:
        found: list[int] = (await self._wire.ask("POST", "/tokenize", body))["tokens"]
        return found

    async def _ids_of_choice(self, choice: str) -> list[int]:
        """The tokens of a choice by itself, as they go on from other text."""
        if choice not in self._choice_ids:
            before, whole = await asyncio.gather(
                self._tokens(ANCHOR, add_special_tokens=False),
                self._tokens(ANCHOR + choice, add_special_tokens=False),
            )
            if whole[: len(before)] != before:  # it begins with a line break, which its tokenizer joins to the anchor
                before = []
                whole = await self._tokens(choice, add_special_tokens=False)
            if len(self._choice_ids) >= MAX_KNOWN:
                self._choice_ids.clear()
            self._choice_ids[choice] = whole[len(before) :]
        return self._choice_ids[choice]

    async def _score(self, batch: list[tuple[Ids, list[int]]], scores: Scores, prompt: Ids, images: list[str]) -> None:
        """images: of whatever begins with this prompt."""
        body = {
            "input_ids": [key for key, _ in batch],
            "token_ids_logprob": [wanted for _, wanted in batch],
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True},
            "return_logprob": True,
            "return_text_in_logprobs": True,
        }
        if images:
            body["image_data"] = [images if key[: len(prompt)] == prompt else None for key, _ in batch]
        answers = await self._wire.ask("POST", "/generate", body)
        for (key, _), answer in zip(batch, answers, strict=True):
            [entries, *_] = answer["meta_info"]["output_token_ids_logprobs"]
            for logprob, token, text in entries:
                scores.take(key, token, logprob, text)


def _turns(context: Context) -> Json | None:
    """The body of POST /tokenize for a conversation; None where nothing has been said."""
    messages: list[Mapping[str, Any]] = [*context.messages]
    continues = context.role is not None and bool(context.text or context.images)
    if continues:
        messages.append({"role": str(context.role), "content": content_of(context.text, context.images)})
    if not messages:
        return None
    begins = context.role == "assistant" and not continues
    return {"messages": messages, "add_generation_prompt": begins, "continue_final_message": continues}


def _images(context: Context) -> Json:
    """The field of a request with its images, if it has any."""
    return {"image_data": urls} if (urls := context.image_urls) else {}


def _generated(answers: list[Json]) -> Generated:
    """Raises BackendError for an answer that the server gave up."""
    metas = [answer["meta_info"] for answer in answers]
    for meta in metas:
        reason = meta.get("finish_reason")
        if isinstance(reason, dict) and reason.get("type") == "abort":
            raise BackendError(f"the server ended the answer: {reason.get('message') or 'aborted'}")
    return Generated([answer["text"] for answer in answers], metas)
