"""Checkpoints that are broken in each of their files, given to each command: one line that names the file and the rule.

A row of the table is what is done to a copy of a tiny checkpoint, the commands that read what was broken, and the words
that the line must have. Rows that hung, or ended in a traceback or in a line that didn't name the file, are why this
table is here; the rest hold what held. A run that isn't over in time is killed, and fails.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forked_commands import ForkedCommands, forked_commands

pytestmark = pytest.mark.long

Damage = Callable[[Path], None]
SECONDS = 300  # for a loaded machine; what hung took hours
NASTY = "\x1b[31m\x07\r\n\u202e[/red]"
INDEX = "model.safetensors.index.json"

# An engine takes seconds to start, and reads as `eval` does: `serve` is given what its own process reads, and samples.
WEIGHTS = ("inspect", "quantize", "convert", "eval")  # read config.json and the shards' headers
READERS = ("inspect", "convert", "eval")  # read a quantization_config; quantize refuses to round twice
TEXT = ("calibrate", "eval", "serve")  # read the tokenizer
MODEL = ("quantize", "eval")  # build the model that config.json describes
COMPRESSED = ("inspect-ct", "convert-ct", "eval-ct")
SERVE = ("serve",)
MAP_TO_NOWHERE = b"\0\4\0\0" + b"\0\xff\xff\xff" + bytes(1020)  # its first byte of a text leads out of 256 units


@dataclass(frozen=True)
class Case:
    """commands: which read it. words: of the one line, beside the file's name."""

    damage: Damage
    commands: tuple[str, ...]
    words: tuple[str, ...]


def write(name: str, content: str | bytes) -> Damage:
    """A file of this content."""
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda model: (model / name).write_bytes(raw) and None


def cut(name: str) -> Damage:
    """The first half of a file, as an interrupted download leaves it."""

    def damage(model: Path) -> None:
        raw = (model / name).read_bytes() if (model / name).exists() else b'{"a": [1, 2]}'
        (model / name).write_bytes(raw[: len(raw) // 2])

    return damage


def fifo(name: str) -> Damage:
    """A pipe that nobody writes into."""

    def damage(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)

    return damage


def changed(name: str, **changes: Any) -> Damage:
    """Keys of a JSON file replaced. Text after a value that begins with 'RAW ' is written as it is."""

    def damage(model: Path) -> None:
        path = model / name
        content = json.loads(path.read_text()) if path.exists() else {}
        text = json.dumps(content | changes)
        for value in changes.values():
            if isinstance(value, str) and value.startswith("RAW "):
                text = text.replace(json.dumps(value), value.removeprefix("RAW "))
        path.write_text(text)

    return damage


def config(**changes: Any) -> Damage:
    return changed("config.json", **changes)


def rope(**parameters: Any) -> Damage:
    return config(rope_parameters={"rope_theta": 10000.0, **parameters})


def quantization(**changes: Any) -> Damage:
    """The quantization_config with other values."""

    def damage(model: Path) -> None:
        content = json.loads((model / "config.json").read_text())
        content["quantization_config"] = content.get("quantization_config", {}) | changes
        (model / "config.json").write_text(json.dumps(content))

    return damage


def compressed(**changes: Any) -> Damage:
    """A compressed-tensors config, with weights that have scales, so that it is asked for each layer."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
    whole = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}} | changes
    return config(quantization_config=whole)


def header(content: str | bytes, data: bytes = b"", length: int | None = None) -> Damage:
    """A model.safetensors of this header."""
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    size = len(raw) if length is None else length
    return write("model.safetensors", size.to_bytes(8, "little") + raw + data)


def index(content: Any) -> Damage:
    """An index in place of the single file."""

    def damage(model: Path) -> None:
        (model / "model.safetensors").rename(model / "model-1.safetensors")
        (model / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))

    return damage


def tensor(name: str = "a", dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> str:
    return json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


CASES: dict[str, Case] = {
    # config.json
    "config cut": Case(cut("config.json"), (*WEIGHTS, *SERVE), ("config.json is not JSON", "anew")),
    "config empty": Case(write("config.json", ""), (*WEIGHTS, *SERVE), ("config.json is empty",)),
    "config array": Case(
        write("config.json", "[]"), (*WEIGHTS, *SERVE), ("config.json holds a JSON array, not an object",)
    ),
    "config not text": Case(write("config.json", b"\xff\xfe{"), (*WEIGHTS, *SERVE), ("config.json is not UTF-8 text",)),
    "config deep": Case(
        write("config.json", "[" * 100_000), (*WEIGHTS, *SERVE), ("config.json is not JSON: it is nested",)
    ),
    "config long number": Case(write("config.json", "1" * 5_000), (*WEIGHTS, *SERVE), ("config.json is not JSON",)),
    "config fifo": Case(fifo("config.json"), (*WEIGHTS, *SERVE), ("config.json is a FIFO", "a regular file")),
    "config nested value": Case(config(text_config=[1]), WEIGHTS, ("config.json: text_config is [1]; an object",)),
    "config control characters": Case(
        config(architectures=NASTY), WEIGHTS, ("config.json: architectures is ", r"\x1b[31m", "an array or null")
    ),
    "config endless value": Case(
        config(architectures="x" * 1_000_000), WEIGHTS, ("config.json: architectures is", "characters left out")
    ),
    "config half a surrogate": Case(
        write("config.json", '{"model_type": "llama", "architectures": "\\ud800"}'), WEIGHTS, ("config.json: arch",)
    ),
    "hidden_size text": Case(config(hidden_size="128"), MODEL, ("config.json: Expected `int", "`hidden_size`")),
    "heads 0": Case(config(num_attention_heads=0), MODEL, ("config.json", "`int` >= 1", "`num_attention_heads`")),
    "heads negative": Case(config(num_attention_heads=-1), MODEL, ("config.json", "`num_attention_heads`")),
    "heads true": Case(config(num_attention_heads=True), MODEL, ("config.json", "`num_attention_heads`")),
    "heads fraction": Case(config(num_attention_heads=1.5), MODEL, ("config.json", "`num_attention_heads`")),
    "layers huge": Case(config(num_hidden_layers=10**30), MODEL, ("config.json", "`num_hidden_layers`")),
    "layers many": Case(config(num_hidden_layers=9_999), MODEL, ("has no weights for model.layers.2",)),
    "vocabulary huge": Case(config(vocab_size=1 << 31), MODEL, ("model.embed_tokens.weight is [1024, 128]",)),
    "head_dim huge": Case(config(head_dim=1 << 31), MODEL, ("config.json", "head_dim 2147483648", "65536")),
    "head_dim 65536": Case(config(head_dim=1 << 16), MODEL, ("q_proj", "config.json makes it")),
    "eps NaN": Case(config(rms_norm_eps="RAW NaN"), MODEL, ("config.json", "`rms_norm_eps`")),
    "eps 1e400": Case(config(rms_norm_eps="RAW 1e400"), MODEL, ("config.json", "`rms_norm_eps`")),
    "eps object": Case(config(rms_norm_eps={"a": 1}), MODEL, ("config.json", "`rms_norm_eps`")),
    "yarn theta 1": Case(
        rope(rope_theta=1, rope_type="yarn", factor=4.0, original_max_position_embeddings=128),
        (*MODEL, *SERVE),
        ("config.json", "yarn: rope_theta 1.0 must be above 1"),
    ),
    "longrope original 1": Case(
        rope(
            rope_type="longrope",
            short_factor=[1.0] * 16,
            long_factor=[1.0] * 16,
            original_max_position_embeddings=1,
        ),
        MODEL,
        ("config.json", "original_max_position_embeddings 1", "2 or more"),
    ),
    "theta tiny": Case(rope(rope_theta=1e-300), MODEL, ("config.json", "rope_theta 1e-300", "radians")),
    # quantization_config
    "backreference": Case(
        quantization(ignore=[r"re:(\w*)*\1"]), COMPRESSED, ("config.json", "ignore", "RE2", "without backreferences")
    ),
    "targets endless": Case(
        compressed(config_groups={"g": {"targets": ["re:" + "x" * 200_000]}}),
        READERS,
        ("config.json", "config_groups.g.targets", "100,000"),
    ),
    "dynamic": Case(
        quantization(quant_method="gptq", bits=4, group_size=32, dynamic={"-:((a+)+": {}}),
        READERS,
        ("config.json", "dynamic", "not a regex"),
    ),
    "bits text": Case(
        quantization(quant_method="gptq", bits="4", group_size=32),
        READERS,
        ("config.json: quantization_config", "`bits`"),
    ),
    "bits huge": Case(quantization(quant_method="gptq", bits=10**30, group_size=32), READERS, ("config.json", "bits")),
    "group size 0": Case(
        quantization(quant_method="gptq", bits=4, group_size=0), READERS, ("config.json", "group_size", "0")
    ),
    "group size huge": Case(
        quantization(quant_method="gptq", bits=4, group_size=10**12),
        ("convert",),
        ("down_proj: scales is [", "g1000000"),
    ),
    "method unknown": Case(
        quantization(quant_method=NASTY), READERS, ("config.json: quant_method", "compressed-tensors, gptq")
    ),
    # safetensors headers
    "header length 2^63": Case(header("{}", length=1 << 63), WEIGHTS, ("model.safetensors is truncated", "anew")),
    "header cut": Case(cut("model.safetensors"), (*WEIGHTS, *SERVE), ("model.safetensors is truncated",)),
    "header not JSON": Case(header("{"), WEIGHTS, ("model.safetensors: its header is not JSON",)),
    "header array": Case(header("[]"), WEIGHTS, ("model.safetensors: its header is not a JSON object",)),
    "dtype unknown": Case(header(tensor(dtype="F4"), b"abcd"), WEIGHTS, ("model.safetensors", "dtype F4", "known are")),
    "overlap": Case(
        header(
            '{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, '
            '"b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}}',
            b"abcdef",
        ),
        WEIGHTS,
        ("model.safetensors: its header has another tensor's bytes in b",),
    ),
    "past the end": Case(
        header(tensor(shape=[100], offsets=[0, 400]), b"abcd"), WEIGHTS, ("model.safetensors is truncated",)
    ),
    "key twice": Case(
        header('{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": 1}', b"a"),
        WEIGHTS,
        ("model.safetensors", "the key 'a' twice"),
    ),
    "dimension huge": Case(header(tensor(shape=[0, 10**30], offsets=[0, 0])), WEIGHTS, ("model.safetensors", "shape")),
    "dimensions many": Case(header(tensor(shape=[0] * 99, offsets=[0, 0])), WEIGHTS, ("model.safetensors", "shape")),
    "negative offsets": Case(header(tensor(offsets=[-4, 0]), b"abcd"), WEIGHTS, ("model.safetensors", "offsets")),
    "name of half a surrogate": Case(
        header('{"\\ud800": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b"a"),
        WEIGHTS,
        ("model.safetensors: malformed header entry",),
    ),
    "name with control characters": Case(
        header(tensor(name=NASTY, dtype="F4"), b"abcd"), WEIGHTS, ("model.safetensors", r"\x1b[31m", "dtype F4")
    ),
    "name endless": Case(
        header(tensor(name="x" * 5_000_000), b"abcd"), WEIGHTS, ("model.safetensors", "left out", "10,000 are the most")
    ),
    "tensors without end": Case(
        header("{" + ",".join(f'"{i}":0' for i in range(400_001)) + "}"),
        WEIGHTS,
        ("model.safetensors: its header has 400,001 tensors; 400,000 are the most",),
    ),
    # index
    "index cut": Case(index('{"weight_map": {'), WEIGHTS, (f"{INDEX} is not JSON",)),
    "index without map": Case(index({}), WEIGHTS, (f"{INDEX} has no weight_map",)),
    "index of numbers": Case(index({"weight_map": {"a": 1}}), WEIGHTS, (f"{INDEX} has no weight_map",)),
    "shard missing": Case(
        index({"weight_map": {"a": "model-2.safetensors"}}),
        (*WEIGHTS, *SERVE),
        (INDEX, "model-2.safetensors", "incomplete"),
    ),
    "shards missing": Case(
        index({"weight_map": {f"a{i}": f"model-{i + 2}.safetensors" for i in range(10_000)}}),
        WEIGHTS,
        (INDEX, "and 9,996 more", "incomplete"),
    ),
    "shard elsewhere": Case(
        index({"weight_map": {"a": "../model.safetensors"}}), WEIGHTS, (INDEX, "'../model.safetensors'", "beside it")
    ),
    "tensor not in shard": Case(
        index({"weight_map": {NASTY: "model-1.safetensors"}}), WEIGHTS, ("model-1.safetensors lacks", INDEX)
    ),
    # tokenizer
    "tokenizer cut": Case(cut("tokenizer.json"), TEXT, ("tokenizer.json is not a tokenizer.json", "anew")),
    "tokenizer empty": Case(write("tokenizer.json", ""), TEXT, ("tokenizer.json is not a",)),
    "tokenizer array": Case(write("tokenizer.json", "[]"), TEXT, ("tokenizer.json is not a",)),
    "tokenizer not text": Case(write("tokenizer.json", b"\xff"), TEXT, ("tokenizer.json is not a",)),
    "tokenizer fifo": Case(fifo("tokenizer.json"), ("eval", "serve"), ("tokenizer.json is a FIFO",)),
    "tokenizer fifo to copy": Case(
        fifo("tokenizer.json"), ("quantize", "convert", "calibrate"), ("tokenizer.json is no regular file", "a pipe")
    ),
    "tokenizer deep": Case(write("tokenizer.json", '{"a":' * 100_000), TEXT, ("tokenizer.json is not a",)),
    "tokenizer without decoder": Case(
        changed("tokenizer.json", decoder=None), TEXT, ("tokenizer.json has no decoder",)
    ),
    "tokenizer without tokens": Case(
        changed("tokenizer.json", added_tokens=[], model={"type": "BPE", "vocab": {}, "merges": []}),
        TEXT,
        ("tokenizer",),
    ),
    "tokenizer with a damaged map": Case(
        changed(
            "tokenizer.json",
            normalizer={"type": "Precompiled", "precompiled_charsmap": base64.b64encode(MAP_TO_NOWHERE).decode()},
        ),
        TEXT,
        ("tokenizer.json: its map of characters is damaged", "anew"),
    ),
    "tokenizer_config cut": Case(
        cut("tokenizer_config.json"), (*TEXT, "quantize", "convert"), ("tokenizer_config.json is not JSON", "anew")
    ),
    "tokenizer_config array": Case(
        write("tokenizer_config.json", "[]"), TEXT, ("tokenizer_config.json holds a JSON array, not an object",)
    ),
    "tokenizer_config fifo": Case(
        fifo("tokenizer_config.json"), ("eval", "serve"), ("tokenizer_config.json is a FIFO",)
    ),
    "tokenizer_config fifo to copy": Case(
        fifo("tokenizer_config.json"),
        ("quantize", "convert", "calibrate"),
        ("tokenizer_config.json is no regular file", "a pipe", "remove it"),
    ),
    "eos_token number": Case(
        changed("tokenizer_config.json", eos_token=5), TEXT, ("tokenizer_config.json: eos_token is 5", "a string")
    ),
    "bos_token template": Case(
        changed("tokenizer_config.json", bos_token="$A", add_bos_token=True), TEXT, ("tokenizer_config.json", "'$A'")
    ),
    "add_bos_token text": Case(
        changed("tokenizer_config.json", add_bos_token="yes"), TEXT, ("tokenizer_config.json: add_bos_token is 'yes'",)
    ),
    "added_tokens_decoder array": Case(
        changed("tokenizer_config.json", added_tokens_decoder=[1]),
        TEXT,
        ("tokenizer_config.json: added_tokens_decoder",),
    ),
    "added token's id": Case(
        changed("tokenizer_config.json", added_tokens_decoder={"x": {"content": "a"}}), TEXT, ("the id 'x'",)
    ),
    "added token's content": Case(
        changed("tokenizer_config.json", added_tokens_decoder={"7": {"content": [NASTY]}}), TEXT, ("token 7", r"\x1b")
    ),
    "added token's flag": Case(
        changed("tokenizer_config.json", added_tokens_decoder={"7": {"content": "a", "special": "yes"}}),
        TEXT,
        ("special of token 7 is 'yes'",),
    ),
    # what only a server reads
    "generation_config cut": Case(
        cut("generation_config.json"), (*SERVE, "quantize"), ("generation_config.json is not",)
    ),
    "generation_config array": Case(write("generation_config.json", "[]"), SERVE, ("generation_config.json holds a",)),
    "generation_config fifo": Case(fifo("generation_config.json"), SERVE, ("generation_config.json is a FIFO",)),
    "temperature text": Case(
        changed("generation_config.json", temperature="hot"), SERVE, ("generation_config.json", "temperature")
    ),
    "temperature NaN": Case(
        changed("generation_config.json", temperature="RAW NaN"), SERVE, ("generation_config.json", "temperature")
    ),
    "top_k nested": Case(changed("generation_config.json", top_k=[[1]]), SERVE, ("generation_config.json", "top_k")),
    "template cut": Case(write("chat_template.jinja", "{% for a in"), SERVE, ("chat_template.jinja",)),
    "template not text": Case(write("chat_template.jinja", b"\xff"), SERVE, ("chat_template.jinja is not UTF-8",)),
    "template fifo": Case(fifo("chat_template.jinja"), SERVE, ("chat_template.jinja is a FIFO",)),
    "template number": Case(
        changed("tokenizer_config.json", chat_template=5),
        SERVE,
        ("tokenizer_config.json", "chat_template must be a string"),
    ),
    "template list": Case(
        changed("tokenizer_config.json", chat_template=[5]), SERVE, ("tokenizer_config.json", "chat_template")
    ),
}


@pytest.fixture(scope="module")
def commands() -> ForkedCommands:
    return forked_commands()


@pytest.fixture(scope="module")
def bases(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with all files: a dense one, and what GPTQModel and llm-compressor made of it."""
    root = tmp_path_factory.mktemp("bases")
    sources = {"dense": "tiny", "gptq": "tiny--gptqmodel-w4g32", "ct": "tiny--llmc-w4a16-g32"}
    for kind, name in sources.items():
        shutil.copytree(fixtures / "tiny", root / kind, ignore=shutil.ignore_patterns("expected.safetensors"))
        for file in ("config.json", "model.safetensors"):
            shutil.copy(fixtures / name / file, root / kind)
    return {kind: root / kind for kind in sources}


def arguments(command: str, model: Path) -> list[object]:
    out = model.parent / "out"
    quantize = ["quantize", model, "-o", out, "--no-eval", "--scheme", "W4A16", "--group-size", "32"]
    return {
        "inspect": ["inspect", model],
        "quantize": [*quantize, "--algorithm", "rtn"],
        "calibrate": [*quantize, "--algorithm", "gptq"],
        "convert": ["convert", model, out, "--format", "gptq_v2"],
        "eval": ["eval", model, "--max-tokens", "32"],
        "serve": ["serve", model, "--port", "0"],
    }[command]


def is_left_out(number: int, place: int, commands: tuple[str, ...]) -> bool:
    """Each case is given to its first command and to one of the others in turn, by default; a server reads by itself.

    They read by the same functions, so what a case is about is proven by two of them. `pytest -m slow` has all.
    """
    return place > 0 and commands[place] != "serve" and place != 1 + number % (len(commands) - 1)


ROWS = [
    pytest.param(name, command, id=f"{name}-{command}", marks=[pytest.mark.slow] * is_left_out(number, place, commands))
    for number, (name, commands) in enumerate((name, case.commands) for name, case in CASES.items())
    for place, command in enumerate(commands)
]


@pytest.mark.parametrize(("name", "command"), ROWS)
def test_one_line_says_what_is_wrong(
    commands: ForkedCommands, bases: dict[str, Path], tmp_path: Path, name: str, command: str
) -> None:
    model = tmp_path / "model"
    command, _, kind = command.partition("-")
    shutil.copytree(bases[kind or ("gptq" if command == "convert" else "dense")], model)
    CASES[name].damage(model)
    done = commands.run(*arguments(command, model), seconds=SECONDS)
    assert done.code in (1, 2), done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done
    line = lines[0]
    assert line.startswith(f"octavo {'quantize' if command == 'calibrate' else command}: ")
    assert len(line) < 3_000
    assert line.isprintable()
    for word in CASES[name].words:
        assert word in line


HANGS = r"re:(\w*\.?)*(\w*\.?)*(\w*\.?)*#"  # for hours, in `re`


@pytest.mark.parametrize("command", ["inspect", "convert"])
@pytest.mark.parametrize("place", ["ignore", "targets"])
def test_no_regex_hangs(
    commands: ForkedCommands, bases: dict[str, Path], tmp_path: Path, command: str, place: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(bases["ct"], model)
    content = json.loads((model / "config.json").read_text())
    owner = content["quantization_config"]
    owner = owner if place == "ignore" else owner["config_groups"]["group_0"]
    owner[place].append(HANGS)
    (model / "config.json").write_text(json.dumps(content))
    done = commands.run(*arguments(command, model), seconds=SECONDS)
    assert done.code == 0, done.stderr


@pytest.mark.parametrize("command", ["calibrate", "eval"])
def test_a_tokenizer_that_gives_up_on_a_text(
    commands: ForkedCommands, bases: dict[str, Path], tmp_path: Path, command: str
) -> None:
    """Its pattern meets the library's limit of steps; the library prints a panic of its own above the line."""
    model = tmp_path / "model"
    shutil.copytree(bases["dense"], model)
    content = json.loads((model / "tokenizer.json").read_text())
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [pattern, content["pre_tokenizer"]]}
    (model / "tokenizer.json").write_text(json.dumps(content))
    text = tmp_path / "text.txt"
    text.write_text(("a" * 40 + "b\n\n") * 100)
    flags = ["--data", text] if command == "eval" else ["--dataset", text, "--max-seq-length", "32"]
    done = commands.run(*arguments(command, model), *flags, seconds=SECONDS)
    assert done.code == 1
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert "tokenizer.json: the tokenizer gives up on this text" in line
    assert "other text works" in line


def test_names_on_the_terminal_are_bounded_and_plain(commands: ForkedCommands, tmp_path: Path) -> None:
    """A header of many tensors, each a kind of its own, with names that would move the cursor."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": NASTY, "architectures": [NASTY]}))
    count = 100_000
    entries = (
        f'"{i:x}\\u001b[2J[/red]":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(count)
    )
    header("{" + ",".join(entries) + "}", bytes(count))(model)
    done = commands.run("inspect", model, seconds=SECONDS)
    assert done.code == 0, done.stderr
    assert all(line.isprintable() for line in done.stdout.splitlines())
    assert r"\x1b[2J[/red]" in done.stdout
    assert f"{count:,} tensors" in done.stdout
    assert len(done.stdout) < 200_000
