"""Formats by name, for templates that don't show theirs: the names are those of vLLM's and SGLang's parsers.

What each format looks like is from the chat template of its models where tests/fixtures/templates has one, which proves
it: hermes, llama3_json, mistral, deepseek_v3 to v4, glm45, glm47, kimi_k2, openai, qwen3_coder, seed_oss, gemma4,
functionary_v3_2, cohere_command3, apertus and gigachat3. The others' is from what the peers read and show:

    llama4_pythonic olmo3 xlam phi4_mini_json hunyuan_a13b internlm    vLLM's examples/tool_chat_template_*.jinja
    pythonic granite granite4 granite-20b-fc jamba longcat             vLLM's tool parsers
    minimax_m2 step3 lfm2 hunyuan functiongemma                        SGLang's detectors, and models' own outputs
"""

from __future__ import annotations

from octavo.server.message.format import ReasoningFormat, ToolFormat

_HERMES = ToolFormat(
    "json",
    call_begin='<tool_call>\n{"name": "',
    name_to_arguments='", "arguments": ',
    call_end="}\n</tool_call>",
    between="\n",
    keys=("name", "arguments"),
)
_LLAMA3 = ToolFormat(
    "json",
    section_begin="<|python_tag|>",
    call_begin='{"name": "',
    name_to_arguments='", "parameters": ',
    call_end="}",
    between="; ",
    keys=("name", "parameters"),
    may_be_bare=True,
)
_PYTHONIC = ToolFormat(
    "pythonic",
    section_begin="[",
    section_end="]",
    name_to_arguments="(",
    key_to_value="=",
    call_end=")",
    between=", ",
    may_be_bare=True,
)
_LLAMA4_PYTHONIC = ToolFormat(
    "pythonic",
    section_begin="<|python_start|>[",
    section_end="]<|python_end|>",
    name_to_arguments="(",
    key_to_value="=",
    call_end=")",
    between=", ",
    may_be_bare=True,
)
_MISTRAL = ToolFormat(
    "json_array",
    section_begin="[TOOL_CALLS][",
    section_end="]",
    call_begin='{"name": "',
    name_to_arguments='", "arguments": ',
    call_end="}",
    between=", ",
    keys=("name", "arguments"),
    id_style="mistral",
)
_MISTRAL_ARGS = ToolFormat(
    "json",
    call_begin="[TOOL_CALLS]",
    name_to_arguments="[ARGS]",
    id_style="mistral",
)
_DEEPSEEK_V3 = ToolFormat(
    "json",
    section_begin="<｜tool▁calls▁begin｜>",
    section_end="<｜tool▁calls▁end｜>",
    call_begin="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    name_to_arguments="\n```json\n",
    call_end="\n```<｜tool▁call▁end｜>",
    between="\n",
)
_DEEPSEEK_V31 = ToolFormat(
    "json",
    section_begin="<｜tool▁calls▁begin｜>",
    section_end="<｜tool▁calls▁end｜>",
    call_begin="<｜tool▁call▁begin｜>",
    name_to_arguments="<｜tool▁sep｜>",
    call_end="<｜tool▁call▁end｜>",
)
_DEEPSEEK_V32 = ToolFormat(
    "params",
    section_begin="<｜DSML｜function_calls>",
    section_end="</｜DSML｜function_calls>",
    call_begin='<｜DSML｜invoke name="',
    name_to_arguments='">\n',
    call_end="</｜DSML｜invoke>",
    between="\n",
    key_begin='<｜DSML｜parameter name="',
    key_to_value='" string="{is_string}">',
    value_end="</｜DSML｜parameter>\n",
)
_DEEPSEEK_V4 = ToolFormat(
    "params",
    section_begin="<｜DSML｜tool_calls>",
    section_end="</｜DSML｜tool_calls>",
    call_begin='<｜DSML｜invoke name="',
    name_to_arguments='">\n',
    call_end="</｜DSML｜invoke>",
    between="\n",
    key_begin='<｜DSML｜parameter name="',
    key_to_value='" string="{is_string}">',
    value_end="</｜DSML｜parameter>\n",
)
_GLM45 = ToolFormat(
    "params",
    call_begin="<tool_call>",
    name_to_arguments="\n",
    call_end="</tool_call>",
    between="\n",
    key_begin="<arg_key>",
    key_to_value="</arg_key>\n<arg_value>",
    value_end="</arg_value>\n",
)
_GLM47 = ToolFormat(
    "params",
    call_begin="<tool_call>",
    call_end="</tool_call>",
    key_begin="<arg_key>",
    key_to_value="</arg_key><arg_value>",
    value_end="</arg_value>",
)
_KIMI_K2 = ToolFormat(
    "json",
    section_begin="<|tool_calls_section_begin|>",
    section_end="<|tool_calls_section_end|>",
    call_begin="<|tool_call_begin|>functions.",
    name_to_arguments=":{index}<|tool_call_argument_begin|>",
    call_end="<|tool_call_end|>",
    id_style="kimi",
)
_HARMONY = ToolFormat(
    "channel",
    section_begin="<|start|>assistant",
    section_end="<|end|>",
    call_begin=" to=functions.",
    name_to_arguments="<|message|>",
    call_end="<|call|>",
    between="<|constrain|>",
    key_begin="<|channel|>",
    value_end="<|return|>",
    may_repeat=False,
)
_GRANITE = ToolFormat(
    "json_array",
    section_begin="<|tool_call|>[",
    section_end="]",
    call_begin='{"name": "',
    name_to_arguments='", "arguments": ',
    call_end="}",
    between=", ",
    keys=("name", "arguments"),
)
_PHI4_MINI = ToolFormat(
    "json_array",
    section_begin="functools[",
    section_end="]",
    call_begin='{"name": "',
    name_to_arguments='", "arguments": ',
    call_end="}",
    between=", ",
    keys=("name", "arguments"),
)
_QWEN3_CODER = ToolFormat(
    "params",
    call_begin="<tool_call>\n<function=",
    name_to_arguments=">\n",
    call_end="</function>\n</tool_call>",
    between="\n",
    key_begin="<parameter=",
    key_to_value=">\n",
    value_end="\n</parameter>\n",
)
_MINIMAX_M2 = ToolFormat(
    "params",
    section_begin="<minimax:tool_call>",
    section_end="</minimax:tool_call>",
    call_begin='<invoke name="',
    name_to_arguments='">\n',
    call_end="</invoke>",
    between="\n",
    key_begin='<parameter name="',
    key_to_value='">',
    value_end="</parameter>\n",
)
_SEED_OSS = ToolFormat(
    "params",
    call_begin="<seed:tool_call>\n<function=",
    name_to_arguments=">\n",
    call_end="</function>\n</seed:tool_call>",
    between="\n",
    key_begin="<parameter=",
    key_to_value=">",
    value_end="</parameter>\n",
)
_GEMMA4 = ToolFormat(
    "pythonic",
    call_begin="<|tool_call>call:",
    name_to_arguments="{",
    key_to_value=":",
    call_end="}<tool_call|>",
    string_quote='<|"|>',
)
_LFM2 = ToolFormat(
    "pythonic",
    section_begin="<|tool_call_start|>[",
    section_end="]<|tool_call_end|>",
    name_to_arguments="(",
    key_to_value="=",
    call_end=")",
    between=", ",
)
_OLMO3 = ToolFormat(
    "pythonic",
    section_begin="<function_calls>",
    section_end="</function_calls>",
    name_to_arguments="(",
    key_to_value="=",
    call_end=")",
    between="\n",
)
_FUNCTIONGEMMA = ToolFormat(
    "pythonic",
    call_begin="<start_function_call>call:",
    name_to_arguments="{",
    key_to_value=":",
    call_end="}<end_function_call>",
    string_quote="<escape>",
)
_XLAM = ToolFormat(
    "json_array",
    section_begin="[",
    section_end="]",
    call_begin='{"name": "',
    name_to_arguments='", "arguments": ',
    call_end="}",
    between=", ",
    keys=("name", "arguments"),
    may_be_bare=True,
)
_JAMBA = ToolFormat(
    "json_array",
    section_begin="<tool_calls>[",
    section_end="]</tool_calls>",
    call_begin='{"name": "',
    name_to_arguments='", "arguments": ',
    call_end="}",
    between=", ",
    keys=("name", "arguments"),
)
_INTERNLM = ToolFormat(
    "json",
    call_begin='<|action_start|><|plugin|>\n{"name": "',
    name_to_arguments='", "parameters": ',
    call_end="}<|action_end|>",
    between="\n",
    keys=("name", "parameters"),
    may_repeat=False,
)
_STEP3 = ToolFormat(
    "params",
    section_begin="<｜tool_calls_begin｜>",
    section_end="<｜tool_calls_end｜>",
    call_begin='<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="',
    name_to_arguments='">\n',
    call_end="</steptml:invoke><｜tool_call_end｜>",
    between="\n",
    key_begin='<steptml:parameter name="',
    key_to_value='">',
    value_end="</steptml:parameter>\n",
)
_HUNYUAN = ToolFormat(
    "params",
    section_begin="<tool_calls>",
    section_end="</tool_calls>",
    call_begin="<tool_call>",
    name_to_arguments="<tool_sep>\n",
    call_end="</tool_call>",
    between="\n",
    key_begin="<arg_key>",
    key_to_value="</arg_key>\n<arg_value>",
    value_end="</arg_value>\n",
)
_LONGCAT = ToolFormat(
    "json",
    call_begin='<longcat_tool_call>\n{"name": "',
    name_to_arguments='", "arguments": ',
    call_end="}\n</longcat_tool_call>",
    between="\n",
    keys=("name", "arguments"),
)
_GRANITE_20B = ToolFormat(
    "json",
    call_begin='<function_call> {"name": "',
    name_to_arguments='", "arguments": ',
    call_end="}",
    between="\n",
    keys=("name", "arguments"),
)
_COHERE = ToolFormat(
    "json_array",
    section_begin="<|START_ACTION|>[",
    section_end="]<|END_ACTION|>",
    call_begin='{"tool_call_id": "{index}", "tool_name": "',
    name_to_arguments='", "parameters": ',
    call_end="}",
    between=",\n    ",
    keys=("tool_name", "parameters"),
)
_APERTUS = ToolFormat(
    "json_array",
    section_begin="<|tools_prefix|>[",
    section_end="]<|tools_suffix|>",
    call_begin='{"',
    name_to_arguments='": ',
    call_end="}",
    between=", ",
    keys=("", ""),
)
_GIGACHAT3 = ToolFormat(
    "json",
    call_begin='<|function_call|>{"name": "',
    name_to_arguments='", "arguments": ',
    call_end="}",
    keys=("name", "arguments"),
    may_repeat=False,
)
_FUNCTIONARY_V32 = ToolFormat(
    "json",
    call_begin=">>>",
    name_to_arguments="\n",
    content_name="all",
)

TOOL_PRESETS = {
    "hermes": _HERMES,
    "qwen25": _HERMES,
    "qwen": _HERMES,
    "llama3_json": _LLAMA3,
    "llama3": _LLAMA3,
    "llama4_json": _LLAMA3,
    "llama4_pythonic": _LLAMA4_PYTHONIC,
    "pythonic": _PYTHONIC,
    "mistral": _MISTRAL_ARGS,
    "mistral_array": _MISTRAL,
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseekv3": _DEEPSEEK_V3,
    "deepseek_v31": _DEEPSEEK_V31,
    "deepseekv31": _DEEPSEEK_V31,
    "deepseek_v32": _DEEPSEEK_V32,
    "deepseekv32": _DEEPSEEK_V32,
    "deepseek_v4": _DEEPSEEK_V4,
    "deepseekv4": _DEEPSEEK_V4,
    "glm45": _GLM45,
    "glm": _GLM45,
    "glm47": _GLM47,
    "kimi_k2": _KIMI_K2,
    "openai": _HARMONY,
    "gpt-oss": _HARMONY,
    "granite": _GRANITE,
    "granite4": _HERMES,
    "granite-20b-fc": _GRANITE_20B,
    "phi4_mini_json": _PHI4_MINI,
    "qwen3_coder": _QWEN3_CODER,
    "qwen3_xml": _QWEN3_CODER,
    "step3p5": _QWEN3_CODER,
    "mimo": _QWEN3_CODER,
    "minimax_m2": _MINIMAX_M2,
    "minimax-m2": _MINIMAX_M2,
    "seed_oss": _SEED_OSS,
    "gemma4": _GEMMA4,
    "functiongemma": _FUNCTIONGEMMA,
    "lfm2": _LFM2,
    "olmo3": _OLMO3,
    "xlam": _XLAM,
    "jamba": _JAMBA,
    "hunyuan_a13b": _JAMBA,
    "hunyuan": _HUNYUAN,
    "hy_v3": _HUNYUAN,
    "internlm": _INTERNLM,
    "interns1": _INTERNLM,
    "step3": _STEP3,
    "longcat": _LONGCAT,
    "cohere_command3": _COHERE,
    "cohere_command4": _COHERE,
    "apertus": _APERTUS,
    "apertus2509": _APERTUS,
    "gigachat3": _GIGACHAT3,
    "functionary_v3_2": _FUNCTIONARY_V32,
}

_THINK = ReasoningFormat("<think>", "</think>")
_THINK_FIRST = ReasoningFormat("<think>", "</think>", is_implied=True)
_SEED_THINK = ReasoningFormat("<seed:think>", "</seed:think>")
_MISTRAL_THINK = ReasoningFormat("[THINK]", "[/THINK]")
_GEMMA4_THINK = ReasoningFormat("<|channel>thought", "<channel|>")
_GRANITE_THINK = ReasoningFormat("Here is my thought process:", "Here is my response:")
_COHERE_THINK = ReasoningFormat("<|START_THINKING|>", "<|END_THINKING|>")
_APERTUS_THINK = ReasoningFormat("<|inner_prefix|>", "<|inner_suffix|>")

_KIMI_THINK = ReasoningFormat("◁think▷", "◁/think▷")

REASONING_PRESETS = {
    "qwen3": _THINK,
    "qwen3-thinking": _THINK_FIRST,
    "mimo": _THINK,
    "deepseek_r1": _THINK_FIRST,
    "deepseek-r1": _THINK_FIRST,
    "deepseek_v3": _THINK,
    "deepseek-v3": _THINK,
    "deepseek_v4": _THINK,
    "deepseek-v4": _THINK,
    "glm45": _THINK,
    "glm47": _THINK,
    "kimi_k2": _THINK,
    "kimi": _KIMI_THINK,
    "nemotron_v3": _THINK,
    "nemotron_3": _THINK,
    "interns1": _THINK,
    "olmo3": _THINK_FIRST,
    "minimax_m2": _THINK_FIRST,
    "minimax": _THINK_FIRST,
    "step3": _THINK_FIRST,
    "step3p5": _THINK_FIRST,
    "seed_oss": _SEED_THINK,
    "mistral": _MISTRAL_THINK,
    "gemma4": _GEMMA4_THINK,
    "granite": _GRANITE_THINK,
    "cohere_command": _COHERE_THINK,
    "cohere_command3": _COHERE_THINK,
    "cohere_command4": _COHERE_THINK,
    "apertus": _APERTUS_THINK,
    "apertus2509": _APERTUS_THINK,
}
# A family whose models write calls in several ways, by how all of these begin: the template tells which it is.
SEVERAL_WAYS = {"mistral": "[TOOL_CALLS]"}
CHANNEL_NAMES = ("openai_gptoss", "gpt-oss", "gpt_oss")
"""Names of reasoning that gpt-oss's channels tell: it has no format beside that of its calls."""
