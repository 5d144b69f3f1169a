"""A tiny random Whisper that hears one second, with its tokenizer; transformers says what it computes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from octavo.audio.facts import RATE

END = 256  # behind the bytes
MARKS = ["startoftranscript", "en", "de", "haw", "translate", "transcribe", "startoflm", "startofprev", "nospeech"]
MARKS += ["notimestamps"]
IDS = {mark: END + 1 + place for place, mark in enumerate(MARKS)}
FIRST_TIME = END + 1 + len(MARKS)
POSITIONS = 50  # of the encoder: one second
VOCABULARY = FIRST_TIME + POSITIONS + 1
NUM_MELS = 80
SUPPRESSED = [1, 2, 7, *(IDS[mark] for mark in ("startoftranscript", "transcribe", "translate", "nospeech"))]
NEVER_FIRST = [32, END]
PREPROCESSOR = {"chunk_length": 1, "feature_size": NUM_MELS, "hop_length": 160, "n_fft": 400, "sampling_rate": RATE}


def make_whisper(directory: Path, *, is_multilingual: bool = True) -> transformers.WhisperForConditionalGeneration:
    """A model whose weights make every part count, saved in float32."""
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=NUM_MELS,
        d_model=64,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_layers=3,
        decoder_attention_heads=4,
        decoder_ffn_dim=96,
        max_source_positions=POSITIONS,
        max_target_positions=64,
        decoder_start_token_id=IDS["startoftranscript"],
        pad_token_id=END,
        bos_token_id=END,
        eos_token_id=END,
        attn_implementation="eager",
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # what is heard decides, and where it stands in the answer; text is likelier than marks and times
            size = 0.8 if "encoder_attn" in name or "decoder.embed_positions" in name else 0.2
            parameter.copy_(torch.randn_like(parameter) * size + (parameter.ndim == 1) * 0.3)
        model.model.decoder.embed_tokens.weight[END:] *= 0.5
        model.model.decoder.embed_tokens.weight[IDS["translate"]] *= 20  # this task is another one
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=IDS["startoftranscript"],
        eos_token_id=END,
        pad_token_id=END,
        max_length=64,
        is_multilingual=is_multilingual,
        lang_to_id={f"<|{code}|>": IDS[code] for code in ("en", "de", "haw")} if is_multilingual else None,
        task_to_id={task: IDS[task] for task in ("translate", "transcribe")} if is_multilingual else None,
        no_timestamps_token_id=IDS["notimestamps"],
        max_initial_timestamp_index=25,
        suppress_tokens=SUPPRESSED,
        begin_suppress_tokens=NEVER_FIRST,
        return_timestamps=False,
    )
    model.save_pretrained(directory)
    save_text_side(directory)
    return model


def save_text_side(directory: Path) -> None:
    """The tokenizer, bytes and Whisper's marks behind them, and how features are made."""
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["endoftext", *MARKS]
    tokenizer.add_special_tokens([AddedToken(f"<|{mark}|>", special=True) for mark in marks])
    times = [f"<|{0.02 * place:.2f}|>" for place in range(POSITIONS + 1)]
    tokenizer.add_tokens([AddedToken(time, special=False) for time in times])
    assert tokenizer.get_vocab_size() == VOCABULARY
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "model_max_length": 64}
    (directory / "tokenizer_config.json").write_text(json.dumps(named))


def tones(seconds: float, seed: int) -> np.ndarray:
    """Two tones that glide, and noise, of speech's loudness: samples in float32."""
    rng = np.random.default_rng(seed)
    at = np.arange(int(seconds * RATE)) / RATE
    voice = 0.3 * np.sin(2 * np.pi * (200 + 900 * at) * at) + 0.1 * np.sin(2 * np.pi * 3100 * at)
    return (voice + 0.01 * rng.standard_normal(len(at))).astype(np.float32)


def heard(samples: np.ndarray) -> Tensor:
    """Transformers' features of one second: [mels, 2 * POSITIONS]."""
    listen = transformers.WhisperFeatureExtractor(chunk_length=1)
    found: Tensor = listen(samples, sampling_rate=RATE, return_tensors="pt").input_features[0]
    return found


@torch.inference_mode()
def logits(model: transformers.WhisperForConditionalGeneration, features: Tensor, decoded: list[int]) -> Tensor:
    """[len(decoded), vocab] of transformers."""
    found: Tensor = model(input_features=features[None], decoder_input_ids=torch.tensor([decoded])).logits[0]
    return found
