"""The text side of a model: what of it the server needs and the engine doesn't know, read while that loads."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.server.start.flags import ServeError, ServeOptions, model_of

if TYPE_CHECKING:
    from octavo.server.fleet.fleet import Fleet
    from octavo.server.lora_options import LoraModule
    from octavo.server.message.model_formats import ModelFormats
    from octavo.server.options import TextOptions
    from octavo.server.template_renderer import TemplateRenderer
    from octavo.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextSide:
    """What of the model the server needs, and the engine doesn't know."""

    directory: Path
    names: tuple[str, ...]
    serves_any_name: bool
    tokenizer: Tokenizer
    renderer: TemplateRenderer
    defaults: dict[str, float]
    end_ids: frozenset[int]


def text_side(options: ServeOptions, directory: Path) -> TextSide:
    """Read it now, while the engine loads. Raises ServeError."""
    from octavo.server.message.model_formats import check_names
    from octavo.server.served_model import checked_names, end_token_ids, sampling_defaults
    from octavo.server.template_renderer import TemplateRenderer
    from octavo.text.chat_template import ChatTemplate, ChatTemplateError
    from octavo.text.tokenizer import Tokenizer, TokenizerError

    text = options.text
    source = Path(options.model.tokenizer) if options.model.tokenizer else directory
    try:
        tokenizer = Tokenizer.open(source, trust_remote_code=options.engine.trust_remote_code)
        renderer = TemplateRenderer(ChatTemplate.open(source, tokenizer.special_tokens, text.chat_template))
        defaults = sampling_defaults(directory, text.generation_config, text.override_generation_config)
        end_ids = end_token_ids(directory, tokenizer)
        check_names(text.tool_call_parser, text.reasoning_parser)
        names, any_name = checked_names(
            options.model.served_model_name, options.model.model_aliases, model_of(options.model)
        )
    except (TokenizerError, ChatTemplateError, ValueError) as error:
        raise ServeError(str(error)) from error
    return TextSide(directory, names, any_name, tokenizer, renderer, defaults, end_ids)


def preparation(
    options: TextOptions,
    text: TextSide,
    shown: Callable[[], AbstractContextManager[object]],
    modules: Sequence[LoraModule] = (),
) -> Callable[[Fleet], Awaitable[ModelFormats]]:
    """What is done while the engines load: the vocabulary is made and sent, the chat template compiled, and how the
    model writes calls and reasoning read from it. shown: shows how far the load is, until it is over.
    modules: adapters that the engines load then.
    """
    from octavo.quant.adapter_files import AdapterError
    from octavo.server.lifecycle import EngineStartError
    from octavo.server.served_model import vocabulary_of

    async def prepare(client: Fleet) -> ModelFormats:
        with shown():
            vocabulary = await asyncio.to_thread(vocabulary_of, text.tokenizer, text.end_ids)
            formats = await found_formats(options, text)
            ready = await client.ready()
        if ready.pooled is None:
            client.give_vocabulary(vocabulary)
        try:
            await client.adapters.load_all(modules)
        except AdapterError as error:
            raise EngineStartError(f"--lora-modules: {error}") from None
        return formats

    return prepare


async def found_formats(options: TextOptions, text: TextSide) -> ModelFormats:
    """How the model writes calls and reasoning, when its template has been compiled."""
    from octavo.server.message.model_formats import find_formats

    tokenizer = text.tokenizer
    special = {tokenizer.token_name(token_id): token_id for token_id in tokenizer.special_ids}
    await text.renderer.check()
    return await find_formats(text.renderer, special, options.tool_call_parser, options.reasoning_parser)
