"""Tiny random encoders as sentence-transformers keeps them, with transformers as the truth of what they compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

WORDS = ["the", "cat", "sat", "on", "a", "mat", "query", ":", "red", "green", "blue", "##s", "##ing", "say", "run"]
WORDS += ["yes", "no"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [
    *SPECIAL,
    *WORDS,
    *"bcdefghijklmnopqrstuvwxyz0123456789",
    *(f"##{letter}" for letter in "abcdefghijklmnop"),
]
SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "attn_implementation": "eager",
}
PROMPTS = {"query": "query: ", "document": ""}
SIZE = 48  # of an embedding
CUTS = [16, 32]


def save_tokenizer(directory: Path) -> Tokenizer:
    """BERT's: WordPiece in lower case, [CLS] and [SEP] around a text, and a type for each text of a pair."""
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    (directory / "tokenizer_config.json").write_text(json.dumps(named | {"model_max_length": 40}))
    return tokenizer


def make(kind: str, directory: Path, **keys: Any) -> transformers.PreTrainedModel:
    """A BERT of this class whose weights make every part count, saved with its tokenizer."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.BertConfig(**SIZES, **keys)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.25 + (parameter.ndim == 1) * 0.5)
    model.save_pretrained(directory)
    return model


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))


class SentenceModel:
    """A sentence-transformers directory: the mean, a Dense layer with tanh, length 1; prompts; Matryoshka."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self.model = make("BertModel", directory)
        self.tokenizer = save_tokenizer(directory)
        self.dense = torch.randn(SIZE, 64, generator=torch.Generator().manual_seed(2)) * 0.2
        kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
        places = ["", "1_Pooling", "2_Dense", "3_Normalize"]
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(zip(kinds, places, strict=True))
        ]
        write(directory / "modules.json", modules)
        write(directory / "sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": False})
        write(directory / "1_Pooling/config.json", {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True})
        activation = "torch.nn.modules.activation.Tanh"
        dense = {"in_features": 64, "out_features": SIZE, "bias": False, "activation_function": activation}
        write(directory / "2_Dense/config.json", dense)
        save_file({"linear.weight": self.dense}, directory / "2_Dense/model.safetensors")
        write(directory / "config_sentence_transformers.json", {"prompts": PROMPTS, "default_prompt_name": None})
        config = json.loads((directory / "config.json").read_text())
        write(directory / "config.json", config | {"matryoshka_dimensions": CUTS})

    @torch.inference_mode()
    def embedding(self, text: str | list[int], size: int = SIZE) -> Tensor:
        """What the text's embedding must be."""
        ids = self.tokenizer.encode(text).ids if isinstance(text, str) else text
        hidden = self.model(torch.tensor([ids])).last_hidden_state[0]
        found = torch.tanh(self.dense @ hidden.mean(dim=0))[:size]
        return found / found.norm()


class CrossEncoder:
    """A classifier of pairs, with so many labels."""

    def __init__(self, directory: Path, num_labels: int = 1) -> None:
        self.directory = directory
        names = dict(enumerate(["bad", "so so", "good"][:num_labels]))
        self.model = make("BertForSequenceClassification", directory, num_labels=num_labels, id2label=names)
        self.tokenizer = save_tokenizer(directory)

    @torch.inference_mode()
    def logits(self, first: str, second: str | None = None) -> Tensor:
        """Those of a text, or of a pair."""
        found = self.tokenizer.encode(first, second)
        types = torch.tensor([found.type_ids])
        return self.model(torch.tensor([found.ids]), token_type_ids=types).logits[0]
