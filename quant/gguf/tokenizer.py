"""A GGUF file's tokenizer as tokenizer.json and tokenizer_config.json.

Source: ggml-org/llama.cpp, `src/llama-vocab.cpp` (which `tokenizer.ggml.pre` splits text how), and the tokenizers that
the models have on the Hub. gpt2: byte-level BPE by merges. llama: SentencePiece's BPE, where of all neighbors the pair
with the highest score is joined first; its merges are all pairs of pieces whose concatenation is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from octavo.quant.model_files import CheckpointError
from octavo.quant.printable import shown

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {  # tokenizer.ggml.pre: how text is split before bytes are joined; None: GPT-2's way
    "gpt-2": None,
    "smollm": "digits",
    "qwen2": _WORDS % "",
    "llama-bpe": _WORDS % "{1,3}",
}
NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def tokenizer_of(metadata: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """tokenizer.json and the content of tokenizer_config.json. Raises CheckpointError for a kind that isn't read."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError("it has no tokenizer.ggml.tokens")
    kinds = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise CheckpointError("tokenizer.ggml.token_type is not one number for each token")
    model = metadata.get("tokenizer.ggml.model")
    if model == "gpt2":
        backend = _byte_level(metadata, tokens)
    elif model == "llama":
        backend = _sentencepiece(metadata, tokens, kinds)
    else:
        raise CheckpointError(f"tokenizer.ggml.model is {shown(model)}; gpt2 and llama are read")
    _add_tokens(backend, tokens, kinds)
    return backend.to_str(), _config(metadata, tokens)


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in SPLITS:
        raise CheckpointError(f"tokenizer.ggml.pre is {shown(pre)}; {', '.join(SPLITS)} are read")
    merges: Any = [tuple(str(merge).split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges") or ()]
    backend = _bpe(tokens, merges, ignore_merges=pre == "llama-bpe")
    split = SPLITS[pre]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in (None, "digits"))
    if split is None:
        backend.pre_tokenizer = bytes_
    elif split == "digits":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), bytes_])
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError("tokenizer.ggml.scores is not one number for each token")
    unknown = _token(metadata, tokens, "unknown")
    merges = _merges(tokens, scores, kinds)
    backend = _bpe(tokens, merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in kinds)
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefixed else replace
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefixed else parts)
    return backend


def _merges(tokens: list[str], scores: list[float], kinds: list[int]) -> list[tuple[str, str]]:
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


def _token(metadata: Mapping[str, Any], tokens: list[str], name: str) -> str | None:
    """The text of a token that the metadata names by its id."""
    number = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if number is None:
        return None
    if type(number) is not int or not 0 <= number < len(tokens):
        raise CheckpointError(f"tokenizer.ggml.{name}_token_id is {shown(number)}, and there are {len(tokens)} tokens")
    return tokens[number]


def _config(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    named = {ours: _token(metadata, tokens, theirs) for theirs, ours in NAMED.items()}
    is_sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
    begins = is_sentencepiece or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    config: dict[str, Any] = {key: token for key, token in named.items() if token is not None}
    config |= {
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", begins)),
        "add_eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    template = metadata.get("tokenizer.chat_template")
    return config | ({"chat_template": template} if isinstance(template, str) else {})


def end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """Ids that end an answer: of a text, of a turn, of a message."""
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return list(dict.fromkeys(i for i in ids if type(i) is int))
