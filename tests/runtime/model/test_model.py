"""What a Model gives beside logits, and what its operators refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_oracle import CASES, make_hf, save

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.quantized_activation import ActivationQuant
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.device import Device
from octavo.runtime.model.hf.attention import HFModelError
from octavo.runtime.model.operators import REFERENCE, Ops
from octavo.runtime.model.select_operators import select_ops
from octavo.runtime.model.weights import load_model
from octavo.runtime.worker.kv_cache import allocate

IDS = [5, 17, 60, 3, 44, 9, 21]
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2"])
@torch.inference_mode()
def test_hidden_states_are_transformers_and_logits_follow_from_them(name: str, tmp_path: Path) -> None:
    """Of all tokens, and of the last alone, which is cut out in front of the last layer's MLP."""
    hf = make_hf(*CASES[name])
    model = load_model(EngineConfig(model=str(save(hf, tmp_path)), dtype="float32"))
    theirs = hf.model(torch.tensor([IDS]), use_cache=False).last_hidden_state[0]
    caches = allocate(model, 1, 16, torch.float32)
    every = StepInputs.prefill([len(IDS)], 16, token_ids=IDS, logits_index=range(len(IDS)))
    last = StepInputs.prefill([len(IDS)], 16, token_ids=IDS)
    for step, expected in ((every, theirs), (last, theirs[-1:])):
        hidden = model.hidden(step, caches)
        assert hidden.shape == (len(expected), model.hidden_size)
        torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-4 * float(theirs.abs().max()))
        assert torch.equal(model.logits(hidden), model.forward(step, caches))


def test_a_model_of_transformers_gives_no_hidden_states(tmp_path: Path) -> None:
    """Loudly: a tap that is never called, or logits in place of hidden states, would be measured as if they were."""
    directory = save(make_hf(*CASES["llama"]), tmp_path)
    model = load_model(EngineConfig(model=str(directory), dtype="float32", model_impl="hf"))
    step = StepInputs.prefill([3], 16, token_ids=IDS[:3])
    caches = allocate(model, 1, 16, torch.float32)
    assert not model.gives_hidden
    calls: list[Any] = [
        lambda: model.hidden(step, caches),
        lambda: model.logits(torch.zeros(1, model.hidden_size)),
        lambda: model.forward(step, caches, lambda *_: None),
    ]
    for call in calls:
        with pytest.raises(HFModelError, match=r"LlamaForCausalLM gives logits alone.*--model-impl octavo"):
            call()


@pytest.mark.parametrize("ops", [REFERENCE, select_ops(CPU, torch.float32)], ids=lambda ops: ops.name)
def test_bodies_that_do_not_quantize_refuse_to(ops: Ops) -> None:
    """A result that came back plain where codes were asked for would be multiplied as if it were codes."""
    x, weight, input_quant = torch.zeros(2, 32), torch.ones(32), ActivationQuant(torch.int8)
    calls: list[Any] = [
        lambda: ops.rms_norm(x, weight, 1e-6, input_quant),
        lambda: ops.add_rms_norm(x, x, weight, 1e-6, None, 1.0, input_quant),
        lambda: ops.silu_and_mul(x, input_quant),
        lambda: ops.gelu_tanh_and_mul(x, input_quant),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="only a GPU's operators quantize"):
            call()


def test_a_model_is_built_for_the_device_that_is_passed(fixtures: Path) -> None:
    device = Device(CPU, 0, lambda _: REFERENCE, notes=("a note of the device",))
    model = load_model(EngineConfig(model=str(fixtures / "tiny")), device)
    assert model.report_layers()[-1][-1] == "reference"
    assert "a note of the device" in model.notes
