"""Good enough or not, what is to blame, and what would help."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from octavo.calibration.report.verdict import Verdict, default_max_kl, judge
from octavo.calibration.report.weight_error import LayerRow, layer_row
from octavo.calibration.verify import BlockSnr, Quality
from octavo.quant.scheme import PRESETS, QuantScheme, group

BAD = Quality("text", 256, 100, 10.0, 99.0, 5.0, 9.0, 0.1, (100,), (BlockSnr(0, 30.0), BlockSnr(1, 3.0)))


def rows(in_features: int = 96) -> list[LayerRow]:
    return [
        layer_row(
            f"model.layers.{i}.mlp.up_proj", i, "mlp.up_proj", (8, in_features), scheme="int4", bytes_before=2,
            bytes_after=1, error=(100.0, float(noise)), output_snr_db=output,
        )
        for i, (noise, output) in enumerate([(1, 5.0), (4, 30.0), (0, 40.0), (2, 20.0)])
    ]  # fmt: skip


def with_group(name: str, size: int) -> QuantScheme:
    scheme = PRESETS[name]
    return replace(scheme, weight=replace(scheme.weight, granularity=group(size)))


def with_bits(bits: int) -> QuantScheme:
    scheme = PRESETS["W4A16"]
    return replace(scheme, weight=replace(scheme.weight, dtype=f"int{bits}"))  # type: ignore[arg-type]


def advice(verdict: Verdict) -> str:
    return "; ".join(verdict.remedies)


def test_the_limit_itself_passes() -> None:
    verdict = judge(replace(BAD, mean_kl=0.25), [PRESETS["W4A16"]], 0.25)
    assert verdict == Verdict(True, 0.25, 0.25, "--max-kl")
    assert verdict.lines() == ["passed: mean KL 0.2500 is not above 0.25 (--max-kl)"]
    assert not judge(replace(BAD, mean_kl=0.2501), [PRESETS["W4A16"]], 0.25).passed


def test_coarser_schemes_may_cost_more() -> None:
    limits = [default_max_kl(PRESETS[name]) for name in ("W8A16", "W8A8", "FP8", "W4A16", "W4A8", "W3A16")]
    assert limits == sorted(limits)
    integers = [default_max_kl(with_bits(bits)) for bits in (8, 6, 5, 4)]
    assert all(one < other for one, other in itertools.pairwise(integers))
    assert limits[0] < limits[1]
    assert default_max_kl(PRESETS["W8A16"], "fp8_e4m3/tensor") > limits[0]
    assert 0 < default_max_kl(None) < limits[0]
    assert all(default_max_kl(scheme) <= 1 for scheme in PRESETS.values())


def test_a_mixture_is_judged_by_its_coarsest_scheme() -> None:
    verdict = judge(BAD, [PRESETS["W8A16"], PRESETS["W4A16"]])
    assert verdict.max_kl == default_max_kl(PRESETS["W4A16"])
    assert verdict.why == "the default for int4/g128"


def test_a_bad_one_names_the_worst_and_what_would_help() -> None:
    layers = [replace(row, output_snr_db=None) for row in rows()]
    verdict = judge(BAD, [PRESETS["W4A16"]], layers=layers)
    assert not verdict.passed
    assert verdict.worst_layers == tuple(f"model.layers.{i}.mlp.up_proj" for i in (1, 3, 0))  # by their weights
    assert verdict.worst_blocks == (1, 0)
    text = advice(verdict)
    assert "--algorithm gptq" in text
    assert "--group-size 32 " in text  # 64 doesn't divide 96
    assert "--scheme W8A16" in text
    assert "--ignore model.layers.1.mlp.up_proj model.layers.3.mlp.up_proj" in text
    assert verdict.lines()[1:3] == [
        "most of the noise comes from the blocks 1, 0",
        "worst layers: model.layers.1.mlp.up_proj, model.layers.3.mlp.up_proj, model.layers.0.mlp.up_proj",
    ]


def test_errors_of_outputs_count_more_than_those_of_weights() -> None:
    assert judge(BAD, [PRESETS["W4A16"]], layers=rows()).worst_layers[0] == "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("scheme", "algorithm", "told", "not_told"),
    [
        (PRESETS["W4A16"], "gptq", ["--group-size 64", "W8A16"], ["--algorithm"]),
        (with_group("W4A16", 32), "rtn", ["--algorithm gptq"], ["--group-size"]),
        (with_group("W3A16", -1), "awq+gptq", ["--group-size 128", "W4A16"], ["--algorithm"]),
        (PRESETS["W8A8"], "rtn", ["--algorithm smoothquant", "W8A16"], ["gptq", "--group-size"]),
        (PRESETS["W8A8"], "smoothquant", ["W8A16"], ["--algorithm"]),
        (PRESETS["W4A8"], "rtn", ["W8A8", "--algorithm gptq"], ["W8A16"]),
        (PRESETS["W4AFP8"], "gptq", ["FP8_DYNAMIC"], ["--algorithm"]),
        (PRESETS["FP8"], "rtn", ["FP8_DYNAMIC finds", "W8A16"], ["--algorithm", "--group-size"]),
        (PRESETS["W8A16"], "rtn", [], ["--algorithm", "--group-size", "--scheme"]),
    ],
)
def test_only_what_was_not_tried_is_advised(
    scheme: QuantScheme, algorithm: str, told: list[str], not_told: list[str]
) -> None:
    text = advice(judge(BAD, [scheme], algorithm=algorithm))
    assert all(word in text for word in told), text
    assert not any(word in text for word in not_told), text
    assert "--ignore '*.layers.1.*' '*.layers.0.*'" in text  # no layers are known, so blocks are named


def test_a_quantized_cache_may_be_to_blame() -> None:
    verdict = judge(BAD, [PRESETS["FP8"]], kv_cache="fp8_e4m3/tensor")
    assert verdict.why.endswith("with a KV cache in fp8_e4m3/tensor")
    assert "--kv-cache-dtype bfloat16" in advice(verdict)
