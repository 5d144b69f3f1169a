"""Programs over language models, as SGLang's frontend language writes them: `import octavo.lang as sgl`.

    import octavo.lang as sgl

    sgl.set_default_backend(sgl.RuntimeEndpoint("http://127.0.0.1:8000"))

    @sgl.function
    def judged(s, essay):
        s += "Essay: " + essay + "\\n"
        s += "It is " + sgl.select("verdict", ["good", "bad"]) + ", since" + sgl.gen("reason", max_tokens=40, stop=".")

    print(judged.run(essay="...")["reason"])

docs/lang.md tells all of it. Needs no torch, and no server in this process.
"""

from octavo.lang.anthropic import Anthropic
from octavo.lang.api import (
    assistant,
    assistant_begin,
    assistant_end,
    flush_cache,
    function,
    gen,
    gen_int,
    gen_string,
    get_server_info,
    image,
    select,
    separate_reasoning,
    system,
    system_begin,
    system_end,
    user,
    user_begin,
    user_end,
    video,
)
from octavo.lang.backend import Backend, set_default_backend
from octavo.lang.child import Runtime
from octavo.lang.choices import (
    ChoicesDecision,
    ChoicesSamplingMethod,
    greedy_token_selection,
    token_length_normalized,
    unconditional_likelihood_normalized,
)
from octavo.lang.execution import CancelledProgramError
from octavo.lang.native import RuntimeEndpoint
from octavo.lang.openai import OpenAI
from octavo.lang.run import SglFunction
from octavo.lang.state import ProgramState, ProgramStateGroup
from octavo.lang.templates import RoleTexts
from octavo.lang.trace import Trace
from octavo.lang.wire import BackendError

__all__ = [
    "Anthropic",
    "Backend",
    "BackendError",
    "CancelledProgramError",
    "ChoicesDecision",
    "ChoicesSamplingMethod",
    "OpenAI",
    "ProgramState",
    "ProgramStateGroup",
    "RoleTexts",
    "Runtime",
    "RuntimeEndpoint",
    "SglFunction",
    "Trace",
    "assistant",
    "assistant_begin",
    "assistant_end",
    "flush_cache",
    "function",
    "gen",
    "gen_int",
    "gen_string",
    "get_server_info",
    "greedy_token_selection",
    "image",
    "select",
    "separate_reasoning",
    "set_default_backend",
    "system",
    "system_begin",
    "system_end",
    "token_length_normalized",
    "unconditional_likelihood_normalized",
    "user",
    "user_begin",
    "user_end",
    "video",
]
