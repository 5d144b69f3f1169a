"""A GGUF file's tokenizer as tokenizer.json and tokenizer_config.json.

Source: ggml-org/llama.cpp, `src/llama-vocab.cpp` (which `tokenizer.ggml.pre` splits text how), and the tokenizers that
the models have on the Hub. gpt2: byte-level BPE by merges. llama: SentencePiece's BPE, where of all neighbors the pair
with the highest score is joined first; its merges are all pairs of pieces whose concatenation is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from octavo.quant.gguf.metadata import Keys
from octavo.quant.model_files import CheckpointError
from octavo.quant.printable import shown

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = (  # words that change to capitals are split there
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {  # tokenizer.ggml.pre: how text is split before bytes are joined; None: GPT-2's way
    "gpt-2": None,
    "olmo": None,
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "qwen2": _WORDS % "",
    "llama-bpe": _WORDS % "{1,3}",
    "dbrx": _WORDS % "{1,3}",
    "smaug-bpe": _WORDS % "{1,3}",
    "tekken": _CASED,
}
WHOLE_WORDS = {"llama-bpe", "tekken"}  # a word that is a token is one, whatever merges say; answers begin with bos
ENDS = {  # texts of control tokens that end an answer, whatever the metadata names
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "_<EOT>",
    "<|EOT|>",
    f"<\uff5cend{SPACE}of{SPACE}sentence\uff5c>",
}
NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def tokenizer_of(metadata: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """tokenizer.json and the content of tokenizer_config.json. Raises CheckpointError for a kind that isn't read."""
    keys = Keys(metadata, "tokenizer.ggml.")
    tokens = keys.texts("tokens")
    if not tokens:
        raise CheckpointError("it has no tokenizer.ggml.tokens")
    kinds = _kinds(keys, len(tokens))
    model = keys.text("model")
    if model == "gpt2":
        backend = _byte_level(keys, tokens)
    elif model == "llama":
        backend = _sentencepiece(keys, tokens, kinds)
    else:
        raise CheckpointError(f"tokenizer.ggml.model is {shown(model)}; gpt2 and llama are read")
    _add_tokens(backend, tokens, kinds)
    return backend.to_str(), _config(keys, tokens) | _template(metadata)


def _kinds(keys: Keys, num_tokens: int) -> list[int]:
    return keys.numbers("token_type", num_tokens, int) or [NORMAL] * num_tokens


def _byte_level(keys: Keys, tokens: list[str]) -> Tokenizer:
    pre = keys.text("pre")
    if pre not in SPLITS:
        raise CheckpointError(f"tokenizer.ggml.pre is {shown(pre)}; {', '.join(SPLITS)} are read")
    merges: Any = [tuple(merge.split(" ", 1)) for merge in keys.texts("merges")]
    backend = _bpe(tokens, merges, ignore_merges=pre in WHOLE_WORDS)
    backend.pre_tokenizer = split_by(SPLITS[pre])
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def split_by(split: str | None) -> Any:
    """What splits text as a value of SPLITS says."""
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in (None, "digits"))
    if split is None:
        return bytes_
    if split == "digits":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), bytes_])


def _sentencepiece(keys: Keys, tokens: list[str], kinds: list[int]) -> Tokenizer:
    scores = keys.numbers("scores", len(tokens), float)
    if scores is None:
        raise CheckpointError("it has no tokenizer.ggml.scores")
    unknown = _token(keys, tokens, "unknown")
    merges = merges_by_score(tokens, scores, kinds)
    backend = _bpe(tokens, merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in kinds)
    prefixed = keys.flag("add_space_prefix", otherwise=True)
    replace = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefixed else replace
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefixed else parts)
    return backend


def merges_by_score(tokens: list[str], scores: list[float], kinds: list[int]) -> list[tuple[str, str]]:
    """All pairs of pieces whose concatenation is a piece, those of the highest score first."""
    pieces = {token: i for i, token in enumerate(tokens) if kinds[i] in (NORMAL, USER, UNUSED)}
    found = []
    for token, i in pieces.items():
        for at in range(1, len(token)):
            left = token[:at]
            right = token[at:]
            if left in pieces and right in pieces:
                found.append((-scores[i], i, pieces[left], left, right))
    found.sort()
    return [(left, right) for _, _, _, left, right in found]


def _bpe(tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
    ids = _ids(tokens)
    for merge in merges:
        if len(merge) != 2 or merge[0] not in ids or merge[1] not in ids or "".join(merge) not in ids:
            raise CheckpointError(f"tokenizer.ggml.merges has {shown(' '.join(merge))}, which are no tokens")
    return Tokenizer(models.BPE(ids, merges, **options))


def _ids(tokens: list[str]) -> dict[str, int]:
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise CheckpointError(f"tokenizer.ggml.tokens has {shown(twice)} twice")
    return ids


def _add_tokens(backend: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Tokens that are found in a text as a whole: control tokens, which are special, and those that users defined."""
    added = [
        AddedToken(token, special=kind in (CONTROL, UNKNOWN), normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL, UNKNOWN, USER)
    ]
    backend.add_tokens(added)


def _token(keys: Keys, tokens: list[str], name: str) -> str | None:
    """The text of a token that the metadata names by its id."""
    number = keys.token(f"{name}_token_id", len(tokens))
    return None if number is None else tokens[number]


def _config(keys: Keys, tokens: list[str]) -> dict[str, Any]:
    named = {ours: _token(keys, tokens, theirs) for theirs, ours in NAMED.items()}
    begins = keys.text("model") == "llama" or keys.text("pre") in WHOLE_WORDS
    config: dict[str, Any] = {key: token for key, token in named.items() if token is not None}
    return config | {
        "add_bos_token": keys.flag("add_bos_token", begins),
        "add_eos_token": keys.flag("add_eos_token", otherwise=False),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _template(metadata: Mapping[str, Any]) -> dict[str, Any]:
    template = Keys(metadata).text("tokenizer.chat_template")
    return {} if template is None else {"chat_template": template}


def end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """Ids that end an answer: of a text, of a turn, of a message; and control tokens that are known to, as ENDS."""
    keys = Keys(metadata, "tokenizer.ggml.")
    tokens = keys.texts("tokens")
    ids = [keys.token(f"{name}_token_id", len(tokens)) for name in ("eos", "eot", "eom")]
    kinds = _kinds(keys, len(tokens))
    known = [i for i, token in enumerate(tokens) if token in ENDS and kinds[i] == CONTROL]
    return list(dict.fromkeys(i for i in (*ids, *known) if i is not None))
