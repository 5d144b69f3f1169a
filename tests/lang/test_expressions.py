"""What can be written down, and what is refused by its name, before anything is asked of a server."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

import octavo.lang as sgl
from octavo.lang.child import words_of
from octavo.lang.ir import DTYPES, Gen, Joined, RoleBegin, RoleEnd, Select, Text, value_of
from octavo.lang.reasoning import MARKS


def test_expressions_join() -> None:
    gen = sgl.gen("a", max_tokens=3)
    assert "x" + gen + "y" == Joined((Text("x"), Gen("a", {"max_new_tokens": 3}), Text("y")))
    assert sgl.user("x" + gen) == Joined((RoleBegin("user"), Text("x"), gen, RoleEnd("user")))
    assert sgl.assistant_begin() + gen + sgl.assistant_end() == sgl.assistant(gen)
    assert sgl.select("a", ["b"]) == Select("a", ("b",), sgl.token_length_normalized)
    assert sgl.gen("a", choices=["b"]) == sgl.select("a", ["b"])


def nothing(s: sgl.ProgramState) -> None:
    s += ""


@pytest.mark.parametrize(
    ("write", "error", "said"),
    [
        (lambda: sgl.gen("a", max_token=3), TypeError, "gen has no option 'max_token'"),
        (lambda: sgl.gen("a", max_tokens="3"), TypeError, r"Expected `int \| null`, got `str`"),
        (lambda: sgl.gen("a", regex="("), re.error, "missing"),
        (lambda: sgl.gen("a", json_schema="{"), ValueError, "Expecting"),
        (lambda: sgl.gen("a", regex="a", dtype=int), ValueError, "dtype and regex both say"),
        (lambda: sgl.gen("a", dtype=dict), ValueError, "dtype 'dict' is none of int, float, bool, str"),
        (lambda: sgl.gen("a", choices_method=sgl.greedy_token_selection), ValueError, "goes with choices"),
        (lambda: f"{sgl.gen('a')}", TypeError, "in an f-string"),
        (lambda: "a" + sgl.gen("b") + 1, TypeError, "int was appended"),
        (lambda: sgl.image("a.txt"), ValueError, "image: the name of 'a.txt' ends as no image's does"),
        (lambda: sgl.image("none.png"), FileNotFoundError, "none.png"),
        (lambda: sgl.video("a.mp4", 3), NotImplementedError, r"video\('a.mp4', 3\)"),
        (lambda: sgl.function(num_api_spec_tokens=64), ValueError, "num_api_spec_tokens"),
        (lambda: sgl.function(len), TypeError, "first parameter is s"),
        (lambda: sgl.separate_reasoning(sgl.gen("a")), ValueError, "model_type None is none of deepseek-r1"),
        (lambda: sgl.separate_reasoning(sgl.gen("a"), "gpt-oss"), ValueError, "model_type 'gpt-oss'"),
        (lambda: sgl.set_default_backend("http://x"), TypeError, "and no str"),
        (lambda: sgl.function(nothing).trace(a=1), TypeError, "nothing has no parameter 'a'"),
        (lambda: sgl.function(nothing).run_batch([], temprature=1), TypeError, "no option 'temprature'"),
        (lambda: sgl.Runtime("m", port=1), ValueError, "port: Runtime chooses it"),
        (lambda: sgl.RuntimeEndpoint("http://x", verify="ca.pem"), ValueError, "SSL_CERT_FILE"),
    ],
)
def test_refusals(write: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        write()


class Nowhere(sgl.Backend):
    """Of programs that ask for nothing."""

    max_connections = 1

    async def generate(self, *_: object) -> Any:
        raise sgl.BackendError("nothing is here")


def test_refusals_of_a_state() -> None:
    def run(body: Any) -> sgl.ProgramState:
        return sgl.function(body).run(backend=Nowhere())

    with pytest.raises(ValueError, match="None was appended"):
        run(lambda s: s.__iadd__(None))
    with pytest.raises(TypeError, match="a list was appended"):
        run(lambda s: s.__iadd__(["a"]))
    with pytest.raises(ValueError, match="position_ids_offset"):
        run(lambda s: s.fork(2, position_ids_offset=[0, 1]))
    with pytest.raises(ValueError, match=r"fork\(0\)"):
        run(lambda s: s.fork(0))
    with pytest.raises(ValueError, match="mode 'sum'"):
        run(lambda s: s.fork(2).join("sum"))
    with pytest.raises(ValueError, match="3 expressions were appended to 2 forks"):
        run(lambda s: s.fork(2).__iadd__(["a", "b", "c"]))
    assert str(run(lambda s: s.__iadd__(sgl.gen("a"))).error()) == "nothing is here"


def test_a_program_without_a_model() -> None:
    """What is known needs no server."""

    @sgl.function
    def known(s: sgl.ProgramState, name: str) -> int:
        s += "Hello, "
        with s.var_scope("who"):
            s += name
        for fork in s.fork(2):
            fork += "!"
        s["number"] = 7
        return s["number"] + len(s["who"])

    for state in (known("you", backend=Nowhere()), *known.run_batch([["you"]] * 50, backend=Nowhere())):
        assert state.text() == "Hello, you"
        assert state.ret_value == 10
        assert state.get_meta_info("number") is None


@pytest.mark.parametrize(
    ("kind", "text", "thoughts", "said"),
    [
        ("qwen3", "<think>\na\n</think>\n\nb", "a", "b"),
        ("qwen3", "b", "", "b"),
        ("qwen3", "<think>a", "a", ""),
        ("qwen3-thinking", "a</think>b", "a", "b"),
        ("deepseek-r1", "a", "a", ""),
        ("deepseek-r1", "<think>a</think>b", "a", "b"),
        ("kimi_k2", "◁think▷a◁/think▷b", "a", "b"),
    ],
)
def test_marks_of_thoughts(kind: str, text: str, thoughts: str, said: str) -> None:
    assert MARKS[kind].split(text) == (thoughts, said)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("int", ["1", "-20", "+3 hours", "1.5", "2\n"], ["", "a", " 1", "1,000"]),
        ("float", ["1", "-2.5", ".5 and", "3\n"], ["", "1.", "e", "1.5."]),
        ("bool", ["True", "False"], ["true", ""]),
        ("str", ['"a b"', '""'], ["a", '"a', '"a"b"']),
    ],
)
def test_types(name: str, good: list[str], bad: list[str]) -> None:
    form = DTYPES[name]
    assert [bool(re.fullmatch(form.regex, text)) for text in good + bad] == [True] * len(good) + [False] * len(bad)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("int", "+3 hours", "+3"),
        ("int", "24.", "24"),
        ("int", "1.5", "1"),
        ("int", "-", "-"),
        ("float", "2.5 and", "2.5"),
        ("float", ".5\n", ".5"),
        ("bool", "True", "True"),
        ("str", '"a 1"', '"a 1"'),
    ],
)
def test_values(name: str, text: str, value: str) -> None:
    """What the model went on to is no part of a number, and ends it."""
    assert value_of(text, {"dtype": name}) == value
    assert value_of(text, {}) == text
    end = DTYPES[name].end
    assert end is None or re.split(end, text)[0].startswith(value)


def test_flags_of_a_runtime() -> None:
    flags = {"tp_size": 2, "enable_prefix_caching": False, "no_ui": True, "seed": None, "served_model_name": ["a", "b"]}
    words = ["--tp-size", "2", "--no-enable-prefix-caching", "--no-ui", "--served-model-name", "a", "b"]
    assert words_of(flags) == words
    assert words_of({"override": {"a": 1}}) == ["--override", '{"a": 1}']


def test_the_import_is_light() -> None:
    program = (
        "import sys, octavo.lang\n"
        "heavy = {'torch', 'numpy', 'transformers', 'tokenizers', 'pydantic', 'fastapi', 'httpx', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert not [name for name in sys.modules if name.startswith(('octavo.server', 'octavo.runtime'))]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd="src")
