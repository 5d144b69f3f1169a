"""Real schemas answered by a real model at a temperature at which it writes noise: each answer is valid, or was cut."""

from __future__ import annotations

import gzip
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from octavo_server import started

from octavo.demo_models import fetch_model

SCHEMAS = Path(__file__).parents[2] / "fixtures" / "schemas" / "maskbench.jsonl.gz"
NUM_SCHEMAS = 200
NUM_SEEDS = 5


def schemas() -> list[Any]:
    with gzip.open(SCHEMAS, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["schema"] for line in lines]


@pytest.mark.slow
def test_answers_at_temperature_1_5_are_valid_or_cut() -> None:
    """Schemas in random order, until NUM_SCHEMAS of them were not refused."""
    chosen = schemas()
    random.Random(0).shuffle(chosen)
    with started("--max-model-len", "2048", model=fetch_model("smollm2", Path("models"))) as server:
        server.wait_until_ready()
        with server.client() as client, ThreadPoolExecutor(32) as pool:

            def answers(schema: Any) -> list[tuple[str, str]] | None:
                """(text, finish reason) of each; None where the schema is refused."""
                form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
                body = {"prompt": "JSON: ", "max_tokens": 200, "temperature": 1.5, "n": NUM_SEEDS, "seed": 1}
                response = client.post("/v1/completions", json=body | {"response_format": form})
                if response.status_code == 400:
                    return None
                assert response.status_code == 200, response.text
                return [(choice["text"], choice["finish_reason"]) for choice in response.json()["choices"]]

            found = zip(chosen, pool.map(answers, chosen), strict=True)
            answered = [(schema, given) for schema, given in found if given is not None][:NUM_SCHEMAS]
    assert len(answered) == NUM_SCHEMAS
    ends = {"stop": 0, "length": 0}
    for schema, given in answered:
        validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)(schema)
        for text, reason in given:
            ends[reason] += 1
            if reason == "stop":
                validator.validate(json.loads(text))
    assert ends["stop"] > NUM_SCHEMAS  # so that something was proved
