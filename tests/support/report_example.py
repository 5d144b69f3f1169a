"""A report with something in every field, for whoever prints, renders or reads one."""

from __future__ import annotations

from dataclasses import replace

from octavo.calibration.report.report import CalibrationText, Report, rounded, sizes_of
from octavo.calibration.report.verdict import Verdict
from octavo.calibration.report.weight_error import LayerRow, by_kind, in_order, layer_row
from octavo.calibration.verify import KL_EDGES, BlockSnr, Quality

QUALITY = Quality(
    text="octavo's held-out text",
    window=256,
    num_tokens=1000,
    perplexity_before=10.0,
    perplexity_after=10.5,
    mean_kl=0.02,
    p99_kl=0.3,
    top1_agreement=0.912,
    kl_histogram=(3, *range(len(KL_EDGES) - 1), 7),
    blocks=(BlockSnr(0, None), BlockSnr(1, 30.25), BlockSnr(2, -1.5)),
)


def row(block: int, kind: str, noise: float, scheme: str = "int4/g64") -> LayerRow:
    name = f"model.layers.{block}.{kind}"
    return layer_row(name, block, kind, (8, 64), scheme=scheme, bytes_before=1024, bytes_after=272, error=(100, noise))


def report(**changes: object) -> Report:
    layers = [row(1, "mlp.up_proj", 4.0), row(0, "mlp.up_proj", 1.0), row(0, "self_attn.q_proj", 0.0, "int8/g64")]
    built = Report(
        model="tiny",
        scheme="W4A16@64",
        format="compressed-tensors",
        algorithm="gptq",
        sizes=sizes_of(10_000, 2_500, layers),
        kinds=by_kind(layers),
        layers=in_order(layers),
        base_model="someone/tiny",
        architecture="LlamaForCausalLM",
        options={"search": "mse", "dampening": 0.01, "act_order": None},
        calibration=CalibrationText("self-generated", 32, 16384, 7, generated=True),
        quality=QUALITY,
        verdict=Verdict(False, 0.02, 0.01, "--max-kl", ("model.layers.1.mlp.up_proj",), (2, 1), ("--group-size 32",)),
        ignore=("lm_head",),
        warnings=("a warning",),
        seconds=rounded({"quantize": 1.2345}),
    )
    return replace(built, **changes)
