"""What a program says, without a model: no server is started here."""

from __future__ import annotations

import pytest

import octavo.lang as sgl
from octavo.lang.ir import Gen, RoleBegin, RoleEnd, Select, Text
from octavo.lang.trace import Argument, Forked, Joined, Variable


@sgl.function
def capital(s: sgl.ProgramState, country: str) -> str:
    s += "The capital of " + country + " is "
    s += sgl.select("capital", ["Paris.", "London."])
    s += " It is a city" + sgl.gen("description", stop=".")
    return s["capital"]


def test_steps_stand_in_their_order() -> None:
    trace = capital.trace()
    kinds = [type(step) for step in trace.flatten_nodes()]
    assert kinds == [Text, Argument, Text, Select, Text, Gen]
    assert trace.prefix == "The capital of "
    assert capital.trace(country="France").prefix == "The capital of France is "
    assert capital.bind(country="France").trace().prefix == "The capital of France is "
    assert set(trace.variables) == {"capital", "description"}
    assert trace.last_node is not None
    lines = trace.last_node.print_graph_dfs().splitlines()
    assert len(lines) == 6
    assert lines[0] == "0: Text(value='The capital of ')"
    assert lines[1] == "1: Argument(name='country') after 0"


def test_turns() -> None:
    @sgl.function
    def talk(s: sgl.ProgramState) -> None:
        s += sgl.user("Who are you?")
        with s.assistant():
            s += sgl.gen("answer")

    asked, said = RoleBegin("user"), RoleEnd("user")
    steps = talk.trace().flatten_nodes()
    assert [steps[0], steps[2]] == [asked, said]
    assert talk.trace().prefix == ""


def test_forks_come_together() -> None:
    @sgl.function
    def tips(s: sgl.ProgramState, size: int = 3) -> None:
        s += "Tips:\n"
        forks = s.fork(size)
        for fork in forks:
            fork += "One is " + sgl.gen("tip")
        forks.join()
        s += "First: " + forks[0]["tip"]

    trace = tips.trace()
    assert [type(step) for step in trace.flatten_nodes()] == [Text, Joined, Text, Variable]
    assert trace.last_node is not None
    lines = trace.last_node.print_graph_dfs().splitlines()
    assert sum("Forked(" in line and line.endswith(" after 0") for line in lines) == 3
    (joined,) = [line for line in lines if "Joined(" in line]
    assert joined == "10: Joined(size=3, appends=False) after 0, 3, 6, 9"
    assert not any(isinstance(step, Forked) for step in tips.trace(size=1).flatten_nodes())


def test_programs_that_a_program_calls_are_traced() -> None:
    @sgl.function
    def expand(s: sgl.ProgramState, tip: str) -> None:
        s += "Expand: " + tip + "\n" + sgl.gen("detail")

    @sgl.function
    def both(s: sgl.ProgramState, topic: str) -> None:
        s += "Two tips for " + topic + ":" + sgl.gen("tip")
        detail = expand(tip=s["tip"])
        s += "Detail: " + detail["detail"]

    trace = both.trace()
    assert [len(call.nodes) for call in trace.calls] == [4]
    assert isinstance(trace.calls[0].flatten_nodes()[1], Variable)
    assert both.compile() is both


@pytest.mark.parametrize(
    "look",
    [
        lambda s, name: s.__iadd__(f"I ask {name}"),
        lambda s, name: s.__iadd__("a" if name else "b"),
        lambda s, name: s.__iadd__("a" if name == "b" else "b"),
        lambda s, name: s.__iadd__("a" * int(name)),
        lambda s, name: s.__iadd__("a" * len(name)),
        lambda s, name: s.__iadd__(str(name)),
        lambda s, name: s.__iadd__(", ".join(name)),
        lambda s, name: s.__iadd__(name + s.text()),
        lambda s, name: s.__iadd__([*s.messages(), name]),
    ],
)
def test_who_looks_into_what_is_not_known_is_told(look: object) -> None:
    def body(s: sgl.ProgramState, name: str) -> None:
        look(s, name)  # type: ignore[operator]

    with pytest.raises(TypeError, match=r"traced|f-string|iterable"):
        sgl.function(body).trace()


def test_after_a_trace_programs_run() -> None:
    with pytest.raises(TypeError):
        sgl.function(lambda s, name: s.__iadd__(f"{name}")).trace()
    with pytest.raises(ValueError, match="there is no backend"):
        capital.run(country="France")
