"""A checkpoint's tokenizer and chat template as calibration wants them: the wiring between calibration and server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from octavo.calibration.text.data import ConversationError
from octavo.calibration.text.documents import DataError
from octavo.calibration.text.records import Message
from octavo.quant.checkpoint import read_config
from octavo.quant.model_files import CheckpointError
from octavo.text.chat_template import ChatTemplate, ChatTemplateError
from octavo.text.tokenizer import EncodingError, Tokenizer, TokenizerError

MARK = "OCTAVO_USER_TEXT"


class ModelText:
    """A calibration.data.TextEncoder: the very code that the server tokenizes and renders with."""

    def __init__(self, directory: Path, chat_template: str | None = None) -> None:
        """chat_template: a file, or a template itself, in place of the checkpoint's. Raises DataError."""
        self._directory = directory
        try:
            self.tokenizer = Tokenizer.open(directory)
            self._template = ChatTemplate.open(directory, self.tokenizer.special_tokens, chat_template)
            config = read_config(directory)
        except CheckpointError:
            raise
        except (TokenizerError, ChatTemplateError, OSError) as e:
            raise DataError(f"{directory}: calibration text can't be tokenized: {e}") from e
        except Exception as e:  # the tokenizers library raises nothing narrower
            raise DataError(f"{directory}: the tokenizer can't be loaded: {e}") from e
        text_config = config.get("text_config") or config
        self.vocab_size: int = text_config.get("vocab_size") or self.tokenizer.num_tokens
        self.max_position: int | None = text_config.get("max_position_embeddings")
        self.has_chat_template = bool(self._template.templates)

    def encode(self, text: str, *, add_special_tokens: bool = True, is_answer: bool = False) -> list[int]:
        """Token ids of a text. is_answer: the model writes it. Raises DataError if the tokenizer can't encode it."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens, is_answer=is_answer)
        except EncodingError as e:
            raise DataError(f"{self._directory / 'tokenizer.json'}: {e}; other text works") from e

    def render(self, messages: Sequence[Message]) -> str:
        try:
            return self._template.render(messages, add_generation_prompt=False)
        except ChatTemplateError as e:
            raise ConversationError(str(e)) from e

    def before_a_question(self) -> str | None:
        """The chat template's text before a user's first words; None without a template, or with one that fails."""
        if not self.has_chat_template:
            return None
        try:
            before, found, _ = self.render([{"role": "user", "content": MARK}]).partition(MARK)
        except ConversationError:
            return None
        return before if found else None
