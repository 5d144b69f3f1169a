"""Tiny random encoder-decoders of text, with their tokenizer; transformers says what they compute."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from octavo.kernels.attention.step import NewSource, SourceRows, StepInputs
from octavo.runtime.model.encdec import EncoderDecoder
from octavo.runtime.worker import kv_cache

PAD = 0
END = 1
VOCABULARY = 96
LONGEST = 64  # of a text, on either side
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:!?-()'"

T5_SIZES = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
T5_SIZES |= {"n_positions": LONGEST, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 24}
BART_SIZES = {"d_model": 64, "max_position_embeddings": LONGEST}
BART_SIZES |= {f"{stack}_ffn_dim": 96 for stack in ("encoder", "decoder")}
BART_SIZES |= {f"{stack}_attention_heads": 4 for stack in ("encoder", "decoder")}
BART_SIZES |= {"encoder_layers": 2, "decoder_layers": 3, "pad_token_id": PAD, "bos_token_id": PAD, "eos_token_id": END}
BART_SIZES |= {"decoder_start_token_id": END, "forced_eos_token_id": None}
GATED = {"feed_forward_proj": "gated-gelu"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", T5_SIZES | {"feed_forward_proj": "relu"}),
    "t5, FLAN's": ("T5", T5_SIZES | GATED | {"tie_word_embeddings": False}),
    "mt5": ("MT5", T5_SIZES | GATED),
    "umt5": ("UMT5", T5_SIZES | GATED),
    "bart": ("Bart", BART_SIZES),
    "bart, scaled": ("Bart", BART_SIZES | {"scale_embedding": True, "activation_function": "gelu_new"}),
    "mbart": ("MBart", BART_SIZES | {"scale_embedding": True}),
    "m2m_100": ("M2M100", BART_SIZES | {"pad_token_id": 2, "scale_embedding": False}),
    "m2m_100, scaled": ("M2M100", BART_SIZES | {"pad_token_id": 2}),
    "marian": ("Marian", BART_SIZES | {"decoder_start_token_id": PAD, "activation_function": "swish"}),
    "marian, scaled": ("Marian", BART_SIZES | {"decoder_start_token_id": PAD, "scale_embedding": True}),
}
"""The class's first half, and its config."""
NAMES = [name for name in CASES if "," not in name]


def make(name: str, directory: Path, *, spread: float = 1.0, **generation: Any) -> Any:
    """A model in float32 whose weights make every part count, saved with a tokenizer.

    spread: of weights; larger ones set tokens apart. generation: further keys of generation_config.json.
    """
    family, sizes = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, **sizes)
    config._attn_implementation = "eager"
    class_name = "MarianMTModel" if family == "Marian" else f"{family}ForConditionalGeneration"
    model = getattr(transformers, class_name)(config).eval()
    if name == "t5, FLAN's":  # a head of its own
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if not parameter.requires_grad:  # Marian's sines
                continue
            drawn = torch.randn_like(parameter) * _size(parameter_name) * spread
            is_scale = parameter_name.endswith("weight") and parameter.ndim == 1
            parameter.copy_(1 + 0.3 * drawn if is_scale else drawn)
        if "final_logits_bias" in dict(model.named_buffers()):
            model.final_logits_bias.copy_(torch.randn_like(model.final_logits_bias))
    start = getattr(config, "decoder_start_token_id", None)
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=PAD if start is None else start, eos_token_id=END, pad_token_id=PAD, **generation
    )
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return model


def _size(name: str) -> float:
    """What is read decides, and where a token stands; softmaxes stay soft, where nothing scales their scores."""
    if name.endswith((".q.weight", ".k.weight")):
        return 0.06
    if "EncDecAttention" in name or "encoder_attn" in name:
        return 0.25
    if "relative_attention_bias" in name or "embed_positions" in name:
        return 0.8
    return 0.7 if "shared" in name or "lm_head" in name else 0.15


def save_tokenizer(directory: Path) -> None:
    """Letters, as SentencePiece has them: a space stands in front of a text, and the end behind it."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    pieces += [(f"▁{word}", -1.0) for word in ("the", "a", "to", "is", "cat", "dog", "sat", "translate", "German")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in ("<pad>", "</s>", "<unk>")])
    assert tokenizer.get_vocab_size() <= VOCABULARY
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "model_max_length": LONGEST}
    (directory / "tokenizer_config.json").write_text(json.dumps(named))


def save_marian(directory: Path, **generation: Any) -> Any:
    """MarianMT with its own tokenizer's files, whose likeliest token is always the padding, as nothing else forbids."""
    model = make("marian", directory, spread=1.5, bad_words_ids=[[PAD]], **generation)
    model.final_logits_bias[0, PAD] = 30.0
    model.save_pretrained(directory)
    (directory / "tokenizer.json").unlink()
    for name in ("source.spm", "target.spm", "vocab.json", "tokenizer_config.json"):
        shutil.copyfile(Path(__file__).parent.parent / "fixtures" / "marian" / name, directory / name)
    return model


def texts(count: int, *, seed: int = 0) -> list[list[int]]:
    """Token ids of different lengths, each with the end behind it."""
    drawn = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, LONGEST - 1, (count,), generator=drawn).tolist()
    return [[*torch.randint(3, VOCABULARY, (length,), generator=drawn).tolist(), END] for length in lengths]


@torch.inference_mode()
def logits(model: Any, source: list[int], decoded: list[int]) -> Tensor:
    """[len(decoded), vocab] of transformers."""
    found: Tensor = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([decoded])).logits[0]
    return found


def generated(model: Any, source: list[int], max_tokens: int, **how: Any) -> list[int]:
    """Transformers' greedy answer, behind what the decoder begins with; the end token ends it."""
    ids = torch.tensor([source])
    begin = how.pop("begin", None)
    if begin is not None:
        how["decoder_input_ids"] = torch.tensor([begin])
    found = model.generate(input_ids=ids, do_sample=False, num_beams=1, max_new_tokens=max_tokens, **how)[0].tolist()
    said: list[int] = found[1 if begin is None else len(begin) :]
    return said[: said.index(END) + 1] if END in said else said


def computed(model: EncoderDecoder, source: list[int], decoded: list[int], size: int = LONGEST) -> Tensor:
    """[len(decoded), vocab] of octavo, in steps of so many tokens."""
    return computed_behind(model, torch.tensor(source), len(source), decoded, size)


def computed_behind(
    model: EncoderDecoder, source: Tensor, length: int, decoded: list[int], size: int = LONGEST
) -> Tensor:
    """The same of what any encoder reads, which becomes so many positions."""
    block_size = 16
    caches = kv_cache.allocate(model, LONGEST // block_size, block_size, model.dtype)
    rows = []
    new: tuple[NewSource, ...] = (NewSource((0,), source),)
    for begin in range(0, len(decoded), size):
        tokens = decoded[begin : begin + size]
        wanted = torch.arange(len(tokens))
        end = begin + len(tokens)
        step = StepInputs.prefill([end], block_size, sizes=[len(tokens)], token_ids=tokens, logits_index=wanted)
        rows.append(model.forward(replace(step, sources=SourceRows((0,), (length,), new)), caches))
        new = ()
    return torch.cat(rows)
