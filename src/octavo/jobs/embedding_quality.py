"""What a quantization costs a model that makes embeddings or scores: the cosine of what both versions say of a text.

Both run as the server would, one after the other. The original computes in its own type, or in float32. Of a classifier
it is the cosine of what its labels are computed from: that of a single logit would be its sign.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from octavo.calibration.report.report import EmbeddingQuality
from octavo.calibration.verify import held_out_text
from octavo.jobs.quality import Facts, check_alike
from octavo.kernels.attention.step import StepInputs
from octavo.quant.checkpoint import read_config
from octavo.runtime.config import Dtype, EngineConfig
from octavo.runtime.messages import PoolingParams
from octavo.runtime.model.encoder import Encoder
from octavo.runtime.model.families.registry import ENCODER_DECODERS, ENCODERS, SPEECH
from octavo.runtime.model.weights import load_model
from octavo.text.tokenizer import Tokenizer

WORDS = (6, 12, 25, 50, 100)  # of the texts, in turns
NUM_TEXTS = 100
OF_SPEECH = "a speech model's shows in transcripts of recordings, beside those of the original"
OF_ANSWERS = "an encoder-decoder's shows in its answers, which octavo eval --data FILE.jsonl takes beside their prompts"


def is_encoder(directory: Path) -> bool:
    """Whether a checkpoint is one that this can measure."""
    return read_config(directory).get("model_type") in ENCODERS


def unmeasured(directory: Path) -> str | None:
    """Where the loss of a checkpoint shows that nothing here measures; None: something does."""
    model_type = read_config(directory).get("model_type")
    return OF_SPEECH if model_type in SPEECH else OF_ANSWERS if model_type in ENCODER_DECODERS else None


def measure_embeddings(original: Path, quantized: Path, *, dtype: Dtype = "auto") -> EmbeddingQuality:
    """dtype: of the quantized one. Raises ValueError for models that can't be loaded, and QualityError for others."""
    tokenizer = Tokenizer.open(original)
    before, vectors = _vectors(original, "float32", tokenizer)
    _, theirs = _vectors(quantized, dtype, tokenizer, like=(original, before))
    cosines = torch.cosine_similarity(vectors, theirs)
    return EmbeddingQuality(float(cosines.mean()), float(cosines.min()), len(cosines))


def _vectors(
    directory: Path, dtype: Dtype, tokenizer: Tokenizer, like: tuple[Path, Facts] | None = None
) -> tuple[Facts, Tensor]:
    """like: the original that it must be a quantization of."""
    model = load_model(EngineConfig(model=str(directory), dtype=dtype))
    if not isinstance(model, Encoder):
        raise ValueError(f"{directory} is no encoder")
    facts = Facts.of(model)
    if like is not None:
        check_alike(*like, directory, facts)
    return facts, vectors_of(model, held_out_texts(), tokenizer)


@torch.inference_mode()
def vectors_of(model: Encoder, texts: Iterable[str], tokenizer: Tokenizer) -> Tensor:
    """Of each text the embedding, or what a classifier's last layer makes logits of, [texts, size]."""
    pooler = model.pooler
    task = pooler.tasks[0]
    if task != "embed":
        pooler = replace(pooler, projections=pooler.projections[:-1])
    found = []
    for text in texts:
        ids = tokenizer.encode(text)[: model.max_position]
        rows = model.hidden(
            StepInputs.prefill([len(ids)], len(ids), token_ids=ids, logits_index=torch.arange(len(ids))), []
        )
        (vector,) = pooler.pool([rows], [PoolingParams(task, use_activation=False)])
        found.append(vector.mean(dim=0) if vector.ndim > 1 else vector)
    return torch.stack(found)


def held_out_texts() -> list[str]:
    """Of 6 to 100 words, out of the built-in text that no calibration sees."""
    words = held_out_text().split()
    texts = []
    begin = 0
    for number in range(NUM_TEXTS):
        count = WORDS[number % len(WORDS)]
        texts.append(" ".join(words[begin : begin + count]))
        begin = (begin + count) % (len(words) - max(WORDS))
    return texts
