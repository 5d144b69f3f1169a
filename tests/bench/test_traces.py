"""Traces in each published format: what is read, when it is sent, and which tokens requests share."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from bench_server import asked_for_text, bench, completion, numbers, server_like_vllm, tokens_of
from scripted_server import serving

from octavo.bench.prompts import WORDS, PromptError, Vocabulary
from octavo.bench.traces import Row, read_trace, trace_prompts

PLAIN = Vocabulary(3, [(word, 1) for word in WORDS], exact=True, max_model_len=None)

MOONCAKE = """\
{"timestamp": 3000, "input_length": 700, "output_length": 5, "hash_ids": [0, 7]}
{"timestamp": 0, "input_length": 1100, "output_length": 3, "hash_ids": [0, 1, 2]}
{"timestamp": 6000, "input_length": 1400, "output_length": 4, "hash_ids": [0, 1, 9]}
"""
TIMED = """\
{"timestamp": 10.5, "input_length": 20, "output_length": 5}
{"timestamp": 12.0, "input_length": 30, "output_length": 6}
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
AZURE_2024 = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n"
BURSTGPT = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,GPT-4,1087,0,1087,Conversation log
118,ChatGPT,417,276,693,API log
"""
SHAREGPT = json.dumps(
    [
        {
            "id": "a",
            "conversations": [
                {"from": "human", "value": "say one two three"},
                {"from": "gpt", "value": "one two three four"},
                {"from": "human", "value": "and more of that"},
                {"from": "gpt", "value": "more and more and more"},
            ],
        },
        {"id": "b", "conversations": [{"from": "human", "value": "never answered"}]},
        {
            "id": "c",
            "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "too short a question"}],
        },
    ]
)
PROMPTS_CSV = 'prompt,output_tokens_count\n"one, two",7\nthree,8\n'


def written(folder: Path, content: str, name: str = "trace") -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("content", "kind", "rows"),
    [
        (MOONCAKE, "mooncake", [(0.0, 1100, 3), (3.0, 700, 5), (6.0, 1400, 4)]),
        (TIMED, "timed", [(0.0, 20, 5), (1.5, 30, 6)]),
        ("timestamp,input_length,output_length\n7,20,5\n9.5,30,6\n", "timed", [(0.0, 20, 5), (2.5, 30, 6)]),
        (AZURE, "azure", [(0.0, 374, 44), (4.314579, 396, 109)]),
        (AZURE_2024, "azure", [(0.0, 2162, 5)]),
        (BURSTGPT, "burstgpt", [(0.0, 472, 18), (113.0, 417, 276)]),
        (PROMPTS_CSV, "prompts", [(None, None, 7), (None, None, 8)]),
        (PROMPTS_CSV.replace("\n", "\r\n"), "prompts", [(None, None, 7), (None, None, 8)]),
        ('{"prompt": "x", "output_tokens": 9}\n{"prompt": "y"}\n', "prompts", [(None, None, 9), (None, None, None)]),
    ],
)
def test_formats_are_told_apart_and_read(
    content: str, kind: str, rows: list[tuple[float | None, int | None, int | None]], tmp_path: Path
) -> None:
    trace = read_trace(written(tmp_path, content))
    assert trace.format == kind
    found = [(row.arrival, row.input_len, row.output_len) for row in trace.rows]
    assert [row[1:] for row in found] == [row[1:] for row in rows]
    assert [row[0] for row in found] == [pytest.approx(row[0], abs=1e-6) for row in rows]
    packed = tmp_path / "packed.gz"
    packed.write_bytes(gzip.compress(content.encode("utf-8-sig")))
    assert read_trace(packed).rows == trace.rows


def test_a_file_of_lines_is_a_prompt_a_line(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, "{one}\n\ntwo, three \n", "lines.txt"))
    assert (trace.format, [row.texts for row in trace.rows]) == ("text", [("{one}",), ("two, three",)])


def test_conversations_of_sharegpt_are_their_turns(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, SHAREGPT))
    assert trace.format == "sharegpt"
    assert not trace.timed
    first, second, other = trace.rows
    assert (first.texts, first.answer) == (("say one two three",), "one two three four")
    assert second.texts == ("say one two three", "one two three four", "and more of that")
    assert (first.follows, second.follows, other.follows) == (False, True, False)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "begins like none of"),
        ("a,b\n1,2\n", "begins like none of sharegpt, mooncake"),
        ('{"timestamp": 1}\n', "neither input_length nor prompt nor conversations"),
        (TIMED + '{"timestamp": "x"}\n', "trace:3: not a request with timestamp, input_length, output_length"),
        (TIMED + "{nonsense\n", "trace:3: not JSON"),
        (TIMED + '{"timestamp": NaN, "input_length": 2, "output_length": 2}\n', "trace:3: .*nan is no time"),
        (TIMED + '{"timestamp": 1, "input_length": -2, "output_length": 2}\n', "trace:3: .*-2 is no number of tokens"),
        (TIMED + '{"timestamp": 1, "input_length": Infinity, "output_length": 2}\n', "trace:3: .*infinity"),
        (MOONCAKE.replace("[0, 7]", '[{"a": 1}]'), "trace:1: .*are not whole numbers in a list"),
        (MOONCAKE.replace("[0, 7]", '"abc"'), "trace:1: not a request"),
        ("TIMESTAMP,ContextTokens\n2023-11-16 18:15:46.68,374\n", "trace:2: .*: no 'GeneratedTokens'"),
        (AZURE + "2023-11-16 18:15:46.68,374\n", "trace:4: not a request with TIMESTAMP"),
        (BURSTGPT + "5,x,,3\n", "trace:5: not a request with Timestamp, Request tokens"),
        ('{"prompt": "x", "output_tokens": -4}\n', "trace:1: .*-4 is no number of tokens"),
        ('[{"conversations": null}]', "is not a trace in the format 'sharegpt'"),
        ("[]", "has no requests"),
    ],
)
def test_what_is_no_trace_is_refused_by_its_line(content: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=said):
        read_trace(written(tmp_path, content))


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", b"\x00\xff\xfe{}"), ("a.gz", gzip.compress(MOONCAKE.encode())[:-20])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PromptError, match=f"{name} can't be read as text"):
            read_trace(tmp_path / name)


def test_a_table_has_long_prompts_lists_of_blocks_and_answers_of_nothing(tmp_path: Path) -> None:
    long = "word " * 30_000
    (row,) = read_trace(written(tmp_path, f"prompt,output_tokens\n{long},0\n")).rows
    assert (row.texts, row.output_len) == ((long,), 0)
    (prompt,) = trace_prompts([row], PLAIN, random.Random(1), output_len=256)
    assert prompt.output_len == 1
    shared = 'timestamp,input_length,output_length,hash_ids\n0,40,3,"[7, 8]"\n1,40,3,\n'
    assert [row.blocks for row in read_trace(written(tmp_path, shared)).rows] == [(7, 8), ()]


def test_requests_share_the_tokens_of_the_blocks_that_they_share(tmp_path: Path) -> None:
    """Blocks are of 512 tokens, the chat template among those of the first."""
    rows = read_trace(written(tmp_path, MOONCAKE)).rows
    first, second, third = trace_prompts(rows, PLAIN, random.Random(1), output_len=1)
    assert [prompt.num_tokens for prompt in (first, second, third)] == [1100, 700, 1400]
    words = [prompt.text.split()[1:] for prompt in (first, second, third)]
    assert [len(own) for own in words] == [1097, 697, 1397]
    assert words[0][:1021] == words[2][:1021]
    assert words[0][1021:] != words[2][1021:1097]
    assert words[0][:509] == words[1][:509]
    assert words[0][509:697] != words[1][509:]
    again = trace_prompts(rows, PLAIN, random.Random(1), output_len=1)
    assert again == [first, second, third]
    assert trace_prompts(rows, PLAIN, random.Random(2), output_len=1) != again


def test_what_does_not_fit_the_context_is_cut() -> None:
    small = Vocabulary(3, PLAIN.words, exact=True, max_model_len=100)
    rows = [Row(0.0, 90, 60), Row(1.0, 20, 10)]
    cut, whole = trace_prompts(rows, small, random.Random(1), output_len=1)
    assert (cut.num_tokens, cut.output_len, cut.cut) == (75, 25, True)
    assert (whole.num_tokens, whole.output_len, whole.cut) == (20, 10, False)
    # a prompt has the three tokens of the smallest one, whatever the trace says
    (least,) = trace_prompts([Row(0.0, 1, 98)], small, random.Random(1), output_len=1)
    assert (least.num_tokens, least.output_len, least.cut) == (3, 25, True)
    none = Vocabulary(3, PLAIN.words, exact=True, max_model_len=3)
    with pytest.raises(PromptError, match="context of 3 tokens has no room"):
        trace_prompts(rows, none, random.Random(1), output_len=1)


def test_a_trace_is_replayed_at_its_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """60 times as fast as it was: 6 s in 0.1 s. Lengths are exact, and answers as long as the trace says."""
    trace = written(tmp_path, MOONCAKE)
    saved = tmp_path / "r.json"
    options = ("--trace", str(trace), "--trace-speed", "60", "--save-result", "--save-detailed")
    with serving(server_like_vllm(completion)) as server:
        assert bench(server, *options, "--result-dir", str(tmp_path), "--result-filename", "r.json") == 0
        asked = [(tokens_of(one.json["prompt"]), one.json["max_tokens"]) for one in asked_for_text(server)]
        assert all(one.json["ignore_eos"] for one in asked_for_text(server))
    assert asked == [(1100, 3), (700, 5), (1400, 4)]
    starts = json.loads(saved.read_text())["start_times"]
    assert [start - starts[0] for start in starts] == pytest.approx([0, 0.05, 0.1], abs=1e-6)
    assert json.loads(saved.read_text())["num_prompts"] == 3  # and not the 1,000 that it would take
    printed = capsys.readouterr().out
    assert "the first 3 of 3 requests in the format mooncake, 700 to 1400 tokens as the server's /tokenize" in printed
    assert numbers(printed)["Total input tokens"] == 3200
    with serving(server_like_vllm(completion)) as server:  # a rate takes the place of the times
        assert bench(server, "--trace", str(trace), "--request-rate", "100", "--num-prompts", "2") == 0
        assert len(asked_for_text(server)) == 2
    vllms = ("--dataset-name", "timed_trace", "--dataset-path", str(trace), "--timed-trace-sec-multiplier", "0.00001")
    with serving(server_like_vllm(completion)) as server:  # vLLM's names, and its blocks of 16 tokens
        assert bench(server, *vllms) == 0
        words = [one.json["prompt"].split() for one in asked_for_text(server)]
        assert words[0][:31] == words[2][:31]
        assert words[0][31:60] != words[2][31:60]


def test_sharegpt_is_asked_as_in_vllm_and_as_conversations(tmp_path: Path) -> None:
    """vLLM takes the first messages, without those under four tokens; a trace has all turns."""
    file = written(tmp_path, SHAREGPT)
    options = ("--num-prompts", "2", "--max-concurrency", "1")
    with serving(server_like_vllm(completion)) as server:
        assert bench(server, "--dataset-name", "sharegpt", "--dataset-path", str(file), *options) == 0
        asked = [(one.json["prompt"], one.json["max_tokens"]) for one in asked_for_text(server)]
        assert all("ignore_eos" not in one.json for one in asked_for_text(server))
    assert asked == [("say one two three", 4)] * 2
    with serving(server_like_vllm(completion)) as server:
        chat = ("--trace", str(file), "--backend", "openai-chat", "--no-oversample", "--disable-shuffle")
        assert bench(server, *chat, "--num-prompts", "3", "--max-concurrency", "1") == 0
        asked = [(one.json["messages"], one.json["max_completion_tokens"]) for one in asked_for_text(server)]
    assert [len(messages) for messages, _ in asked] == [1, 3, 1]
    assert [answer for _, answer in asked] == [4, 5, 4]
    assert asked[1][0][1] == {"role": "assistant", "content": "one two three four"}


def test_burstgpts_data_set_is_asked_at_once_as_in_vllm(tmp_path: Path) -> None:
    """It has lengths alone, which are repeated; as a trace, the second would be sent a second after the first."""
    file = written(tmp_path, BURSTGPT.replace("118,", "6,"))
    saved = ("--save-result", "--result-dir", str(tmp_path), "--result-filename", "r.json")
    with serving(server_like_vllm(completion)) as server:
        options = ("--dataset-name", "burstgpt", "--dataset-path", str(file), "--num-prompts", "4")
        assert bench(server, *options, *saved) == 0
        asked = sorted((tokens_of(one.json["prompt"]), one.json["max_tokens"]) for one in asked_for_text(server))
    assert asked == [(417, 276)] * 2 + [(472, 18)] * 2
    assert json.loads((tmp_path / "r.json").read_text())["latencies_from"] == "sent"


def test_a_file_of_prompts_says_how_long_answers_are_unless_the_flag_does(tmp_path: Path) -> None:
    file = written(tmp_path, PROMPTS_CSV)
    options = ("--dataset-name", "custom", "--dataset-path", str(file), "--num-prompts", "2", "--disable-shuffle")
    with serving(server_like_vllm(completion)) as server:
        assert bench(server, *options) == 0
        assert bench(server, *options, "--custom-output-len", "2") == 0
        asked = sorted((one.json["prompt"], one.json["max_tokens"]) for one in asked_for_text(server))
    assert asked == [("one, two", 2), ("one, two", 7), ("three", 2), ("three", 8)]
