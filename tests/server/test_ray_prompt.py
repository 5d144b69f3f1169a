"""What a Ray front reads of a request without a tokenizer, and the words that `build`'s arguments become."""

from __future__ import annotations

import json
import pickle

import pytest
from pydantic import ValidationError

from octavo.server.fleet.prefix_index import PIECE_TOKENS
from octavo.server.hop_headers import end_to_end
from octavo.server.ray_prompt import BYTES_PER_TOKEN, read_prompt
from octavo.server.ray_serve import Options, serve_arguments

LONG = "All work and no play makes Jack a dull boy. " * 100


def body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def shared(one: bytes, other: bytes) -> int:
    pairs = list(zip(read_prompt(one).names, read_prompt(other).names, strict=False))
    return next((depth for depth, (a, b) in enumerate(pairs) if a != b), len(pairs))


def test_turns_of_a_conversation_share_their_beginning() -> None:
    first = [{"role": "system", "content": LONG}, {"role": "user", "content": "Hello"}]
    later = [*first, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": LONG}]
    pieces = shared(body(messages=first), body(messages=later))
    assert pieces == len(LONG) // (BYTES_PER_TOKEN * PIECE_TOKENS)
    assert len(read_prompt(body(messages=later)).names) >= 2 * pieces


def test_what_is_not_the_prompt_does_not_matter() -> None:
    one = body(model="a", temperature=0, prompt=LONG, stream=True)
    other = body(prompt=LONG, model="b")
    assert read_prompt(one).names == read_prompt(other).names != ()


def test_tools_and_systems_come_before_messages() -> None:
    messages = [{"role": "user", "content": "Hello"}]
    one = body(messages=messages, tools=[{"name": LONG}])
    other = body(messages=[{"role": "user", "content": "Good bye"}], tools=[{"name": LONG}])
    assert shared(one, other) >= len(LONG) // (BYTES_PER_TOKEN * PIECE_TOKENS)


def test_salts_share_nothing() -> None:
    assert shared(body(prompt=LONG, cache_salt="a"), body(prompt=LONG, cache_salt="b")) == 0
    assert shared(body(prompt=LONG, cache_salt="a"), body(prompt=LONG, cache_salt="a")) > 0


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"{}", b'{"prompt": null}'])
def test_a_body_without_a_prompt_has_no_names(content: bytes) -> None:
    assert read_prompt(content).names == ()


def test_names_stay_with_the_router() -> None:
    prompt = read_prompt(body(prompt=LONG))
    sent = pickle.loads(pickle.dumps(prompt))
    assert (sent.key, sent.num_tokens, sent.names) == (prompt.key, prompt.num_tokens, ())


def test_other_arguments_are_flags_of_octavo_serve() -> None:
    options = Options.model_validate(
        {
            "model": "M",
            "max_replicas": "3",
            "num_gpus": "2",
            "tensor_parallel_size": "2",
            "enforce_eager": "true",
            "enable_prefix_caching": "false",
            "override_generation_config": {"temperature": 0},
        }
    )
    assert options.max_replicas == 3
    assert serve_arguments(options) == [
        "M",
        "--tensor-parallel-size",
        "2",
        "--enforce-eager",
        "--no-enable-prefix-caching",
        "--override-generation-config",
        '{"temperature": 0}',
    ]


def test_a_cell_without_a_gpu_has_a_thread_for_each_of_its_cpus() -> None:
    assert serve_arguments(Options(model="M")) == ["M", "--num-threads", "1"]
    sizes = {"num_cpus": "8", "data_parallel_size": "2", "tensor_parallel_size": 2}
    assert serve_arguments(Options.model_validate({"model": "M", **sizes}))[-2:] == ["--num-threads", "2"]
    sizes["pipeline_parallel_size"] = 2
    assert serve_arguments(Options.model_validate({"model": "M", **sizes}))[-2:] == ["--num-threads", "1"]
    assert serve_arguments(Options(model="M", num_cpus=4)) == ["M", "--num-threads", "4"]
    assert serve_arguments(Options.model_validate({"model": "M", "num_threads": 2})) == ["M", "--num-threads", "2"]


def test_a_cell_listens_where_its_replica_reaches_it() -> None:
    with pytest.raises(ValueError, match="port: a replica's server is reached through Ray alone"):
        serve_arguments(Options.model_validate({"model": "M", "port": "80"}))


def test_more_replicas_at_least_than_at_most_are_refused() -> None:
    with pytest.raises(ValidationError, match="min_replicas 3 is more than max_replicas 1"):
        Options(model="M", min_replicas=3)


def test_headers_of_one_connection_stay_there() -> None:
    headers = [("Content-Type", "text/plain"), ("Transfer-Encoding", "chunked"), ("Connection", "close")]
    assert end_to_end(headers) == [("Content-Type", "text/plain")]
