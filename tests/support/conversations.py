"""What each client library does with a server, as its own documentation shows it: `python conversations.py NAME URL`.

Runs in the clients' environment, so nothing of octavo can be imported here. An answer's form is asserted, not its
sense: the model is small.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from pydantic import BaseModel

HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
PARIS: list[Any] = [{"role": "user", "content": "Paris is in France."}]


class City(BaseModel):
    city: str
    country: str


def weather(city: str) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}."


def openai(url: str) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    parsed = client.chat.completions.parse(model="m", messages=PARIS, response_format=City, max_tokens=200)
    assert isinstance(parsed.choices[0].message.parsed, City)
    with client.chat.completions.stream(model="m", messages=HELLO, max_tokens=20) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "content.delta")
        assert deltas == stream.get_final_completion().choices[0].message.content
    with client.responses.stream(model="m", input="Paris is in France.", text_format=City) as answer:
        texts = "".join(event.delta for event in answer if event.type == "response.output_text.delta")
        final = answer.get_final_response()
        assert texts == final.output_text
        assert isinstance(final.output_parsed, City)


def anthropic(url: str) -> None:
    from anthropic import Anthropic

    client = Anthropic(base_url=url, api_key="none")
    with client.messages.stream(model="m", max_tokens=20, messages=HELLO) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert [block.text for block in message.content if block.type == "text"] == [text]
    counted = client.messages.count_tokens(model="m", messages=HELLO)
    assert counted.input_tokens == message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)


def ollama(url: str) -> None:
    from ollama import Client

    client = Client(host=url)
    assert client.list().models
    pieces = list(client.chat(model="m", messages=HELLO, stream=True, options={"num_predict": 20}))
    assert pieces[-1].done
    answer = client.chat(model="m", messages=PARIS, format=City.model_json_schema())
    City.model_validate_json(answer.message.content or "")


def litellm(url: str) -> None:
    import litellm as library

    openai_route: dict[str, Any] = {"model": "openai/m", "api_base": f"{url}/v1", "api_key": "none"}
    chunks = list(
        library.completion(
            **openai_route, messages=HELLO, max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage.completion_tokens
    answer = library.completion(model="anthropic/m", api_base=url, api_key="none", messages=HELLO, max_tokens=8)
    assert answer.choices[0].message.content
    try:
        library.completion(**openai_route, messages=[{"role": "user", "content": "many words " * 30000}], max_tokens=8)
    except library.ContextWindowExceededError:
        return
    raise AssertionError("a full context was not recognized")


def langchain(url: str) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="m", base_url=f"{url}/v1", api_key="none", max_tokens=200)
    assert "".join(chunk.content for chunk in model.stream("Say hello."))
    assert isinstance(model.with_structured_output(City, method="json_schema").invoke("Paris is in France."), City)
    called = model.bind_tools([weather], tool_choice="weather").invoke("How is the weather in Paris?")
    assert [call["name"] for call in called.tool_calls] == ["weather"]


def instructor(url: str) -> None:
    import instructor as library
    from openai import OpenAI

    for mode in (library.Mode.TOOLS, library.Mode.JSON_SCHEMA):
        client = library.from_openai(OpenAI(base_url=f"{url}/v1", api_key="none"), mode=mode)
        found = client.chat.completions.create(model="m", response_model=City, max_tokens=200, messages=PARIS)
        assert isinstance(found, City)


def pydantic_ai(url: str) -> None:
    """Not through its Anthropic model, which can't make a message with anthropic 2.14 in Python 3.11."""
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        agent = Agent(kind("m", provider=provider), output_type=City, model_settings={"max_tokens": 200})
        assert isinstance(agent.run_sync("Paris is in France.").output, City)


def openai_agents(url: str) -> None:
    os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"
    from agents import (
        Agent,
        ModelSettings,
        OpenAIChatCompletionsModel,
        OpenAIResponsesModel,
        Runner,
        ToolCallOutputItem,
        function_tool,
    )
    from openai import AsyncOpenAI

    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        model = kind(model="m", openai_client=AsyncOpenAI(base_url=f"{url}/v1", api_key="none"))
        agent = Agent(
            name="forecaster",
            instructions="Answer with the tool.",
            model=model,
            tools=[function_tool(weather)],
            tool_use_behavior="stop_on_first_tool",
            model_settings=ModelSettings(tool_choice="required", max_tokens=200),
        )
        result = asyncio.run(Runner.run(agent, "How is the weather in Paris?"))
        assert any(isinstance(item, ToolCallOutputItem) for item in result.new_items)
        assert result.final_output.startswith("It is sunny in ")


CONVERSATIONS = {
    function.__name__: function
    for function in (openai, anthropic, ollama, litellm, langchain, instructor, pydantic_ai, openai_agents)
}

if __name__ == "__main__":
    CONVERSATIONS[sys.argv[1]](sys.argv[2])
