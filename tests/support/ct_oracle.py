"""compressed-tensors as the truth of its own formats: checkpoints that it writes, and the logits that it means."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils.helpers import (
    calculate_qparams,
    compute_dynamic_scales_and_zp,
    generate_gparam,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMATS = {4: "{}fp4-pack-quantized", 8: "{}fp8-quantized"}


def format_of(scheme: QuantizationScheme) -> str:
    """compressed-tensors' name of the layout of microscaled weights."""
    args = scheme.weights
    assert args is not None
    return FORMATS[args.num_bits].format("nv" if args.group_size == 16 else "mx")


def scheme_of(name: str) -> QuantizationScheme:
    """A preset, such as NVFP4, by compressed-tensors' own table."""
    scheme = preset_name_to_scheme(name, ["Linear"])
    scheme.format = format_of(scheme)
    return scheme


def compress(weight: Tensor, scheme: QuantizationScheme, input_absmax: float | None = None) -> dict[str, Tensor]:
    """A layer's tensors, as compressed-tensors rounds and packs its weight [N, K] float32."""
    args = scheme.weights
    assert args is not None
    assert args.group_size is not None
    tiles = weight.unflatten(-1, (-1, args.group_size))
    whole = generate_gparam(weight.amin(), weight.amax()) if args.group_size == 16 else None
    scale, _ = calculate_qparams(tiles.amin(-1), tiles.amax(-1), args, global_scale=whole)
    state = {"weight": weight, "weight_scale": scale}
    if whole is not None:
        state["weight_global_scale"] = whole
    packed = dict(BaseCompressor.get_value_from_registry(format_of(scheme)).compress(state, scheme))
    if scheme.input_activations is not None and args.group_size == 16:
        packed["input_global_scale"] = generate_gparam(torch.tensor(0.0), torch.tensor(input_absmax))
    return {name: tensor.contiguous() for name, tensor in packed.items()}


def decompress(tensors: dict[str, Tensor], scheme: QuantizationScheme) -> Tensor:
    """The weight [N, K] that a layer's tensors stand for, float32: with its own functions, whose default is bf16."""
    scale = tensors["weight_scale"]
    if scale.dtype == torch.uint8:
        scale = 2.0 ** (scale.float() - 127)
    codes = tensors.get("weight")
    if codes is None:
        n, half = tensors["weight_packed"].shape
        codes = unpack_fp4_from_uint8(tensors["weight_packed"], n, 2 * half, torch.float32)
    whole = tensors.get("weight_global_scale")
    return dequantize(codes.float(), scale.float(), args=scheme.weights, global_scale=whole, dtype=torch.float32)


def round_input(x: Tensor, args: QuantizationArgs, whole: Tensor | None) -> Tensor:
    """x as compressed-tensors rounds a layer's input, in float32."""
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity(), global_scale=whole)
    return fake_quantize(x, scale, zero, args, global_scale=whole)


def write_checkpoint(source: Path, out: Path, name: str) -> None:
    """A bf16 checkpoint's linear layers but the head, rounded and packed by compressed-tensors."""
    scheme = scheme_of(name)
    tensors = {}
    for key, tensor in load_file(source / "model.safetensors").items():
        module = key.removesuffix(".weight")
        if key.endswith("_proj.weight"):
            packed = compress(tensor.float(), scheme, input_absmax=8.0)
            tensors.update({f"{module}.{suffix}": value for suffix, value in packed.items()})
        else:
            tensors[key] = tensor
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    quantization = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=scheme.format,
        ignore=["lm_head"],
        quantization_status="compressed",
    )
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = json.loads(quantization.model_dump_json())
    (out / "config.json").write_text(json.dumps(config))


@torch.inference_mode()
def logits_of_checkpoint(directory: Path, name: str, token_ids: Tensor) -> Tensor:
    """[S, T, vocab] by transformers in float32, linear layers' weights and inputs as compressed-tensors has them.

    Its own float32 loading of such files fails: types of scales and inputs differ (0.20.1).
    """
    scheme = scheme_of(name)
    tensors = load_file(directory / "model.safetensors")
    modules = sorted({key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")})
    plain = directory.parent / f"{directory.name}-plain"
    shutil.rmtree(plain, ignore_errors=True)
    plain.mkdir()
    own: dict[str, dict[str, Tensor]] = {
        module: {key.removeprefix(f"{module}."): t for key, t in tensors.items() if key.startswith(f"{module}.")}
        for module in modules
    }
    kept = {key: t for key, t in tensors.items() if key.rpartition(".")[0] not in own}
    save_file(
        kept | {f"{module}.weight": decompress(parts, scheme) for module, parts in own.items()},
        plain / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, attn_implementation="eager"
    )
    args = scheme.input_activations
    if args is not None:
        for module, parts in own.items():
            whole = parts.get("input_global_scale")

            def rounded(_: Any, inputs: Any, whole: Tensor | None = whole) -> Any:
                return (round_input(inputs[0], args, whole), *inputs[1:])

            model.get_submodule(module).register_forward_pre_hook(rounded)
    return model(token_ids, use_cache=False).logits
