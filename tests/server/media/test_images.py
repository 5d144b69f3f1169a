"""Images in each dialect, by the official clients over a real socket; and media that nobody should send."""

from __future__ import annotations

import asyncio
import base64
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import ollama
import openai
import psutil
import pytest
import torch
from hostile_media import data_url, hostile_url
from octavo_server import Server, serving
from PIL import Image
from slow_cases import slow
from tiny_vision import MARKS, PLACEHOLDERS, TinyVision, as_png, make_tiny_vision, picture

import octavo.lang as sgl
from octavo.runtime.vision.recipes import VisionModel, WholeImage
from octavo.server.media.images import Images
from octavo.server.media.sources import ImageSource
from octavo.text.chat_template import ChatTemplate, ChatTemplateError

FIRST, SECOND = picture(1, 50, 37), picture(2, 31, 90)
NUM_TOKENS = 6
GREEDY = {"temperature": 0, "max_tokens": NUM_TOKENS}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyVision:
    return make_tiny_vision("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose files requests may name, with one of them."""
    directory = tmp_path_factory.mktemp("shared")
    (directory / "first.png").write_bytes(as_png(FIRST))
    return directory


@pytest.fixture(scope="module")
def seeing(tiny: TinyVision, shared: Path) -> Iterator[Server]:
    flags = ("--allowed-local-media-path", str(shared), "--limit-mm-per-prompt", '{"image": 3}')
    with serving(*flags, "--served-model-name", "llava", model=tiny.directory) as server:
        yield server


@pytest.fixture(scope="module")
def official(seeing: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(seeing: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=seeing.url, api_key="none", max_retries=0) as client:
        yield client


def url_of(image: Image.Image) -> str:
    return data_url(as_png(image))


def image_part(image: Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url_of(image), "detail": "low"}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def truth(tiny: TinyVision, text: str, *pictures: Image.Image) -> str:
    """What transformers answers to a prompt, in which `*` stands for an image."""
    ids = tiny.greedy(tiny.inputs(text.replace("*", tiny.placeholder), list(pictures)), NUM_TOKENS)
    return tiny.processor.tokenizer.decode(ids, skip_special_tokens=True)


def test_the_openai_client(official: openai.OpenAI, tiny: TinyVision) -> None:
    for pictures in ([FIRST], [SECOND], [FIRST, SECOND]):
        content = [text_part("what is "), *map(image_part, pictures), text_part(" here?")]
        answer = official.chat.completions.create(
            model="llava", messages=[{"role": "user", "content": content}], **GREEDY
        )
        prompt = f"user: what is {'*' * len(pictures)} here?\nassistant: "
        assert answer.choices[0].message.content == truth(tiny, prompt, *pictures)
        ids = tiny.inputs(prompt.replace("*", tiny.placeholder), pictures)["input_ids"]
        assert answer.usage.prompt_tokens == ids.shape[1]
        responded = official.responses.create(
            model="llava",
            input=[
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "what is "},
                        *({"type": "input_image", "image_url": url_of(one), "detail": "auto"} for one in pictures),
                        {"type": "input_text", "text": " here?"},
                    ],
                }
            ],
            temperature=0,
            max_output_tokens=NUM_TOKENS,
        )
        assert responded.output_text == answer.choices[0].message.content


@pytest.mark.parametrize("kind", [slow(kind) for kind in PLACEHOLDERS if kind != "llava"])
def test_other_models_by_the_openai_client(kind: str, tmp_path: Path) -> None:
    """The server's text and pixels, and the engine's answers, are transformers'."""
    tiny = make_tiny_vision(kind, tmp_path)
    with (
        serving("--max-model-len", "200", "--dtype", "float32", model=tmp_path) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        for pictures in ([FIRST], [SECOND], [FIRST, SECOND]):
            content = [text_part("what is "), *map(image_part, pictures), text_part(" here?")]
            messages = [{"role": "user", "content": content}]
            answer = client.chat.completions.create(model=str(tmp_path), messages=messages, **GREEDY)
            text = f"user: what is {MARKS[kind] * len(pictures)} here?\nassistant: "
            if kind.startswith("paligemma"):  # which is published without a template
                text = f"what is {MARKS[kind] * len(pictures)} here?"
            inputs = tiny.inputs(text, pictures)
            expected = tiny.processor.tokenizer.decode(tiny.greedy(inputs, NUM_TOKENS), skip_special_tokens=True)
            assert answer.choices[0].message.content == expected
            assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1]


def test_a_stream_and_a_conversation_that_goes_on(official: openai.OpenAI, tiny: TinyVision) -> None:
    messages = [
        {"role": "user", "content": [image_part(FIRST), text_part("this?")]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [text_part("and"), image_part(SECOND)]},
    ]
    stream = official.chat.completions.create(model="llava", messages=messages, stream=True, **GREEDY)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert said == truth(tiny, "user: *this?\nassistant: yes\nuser: and*\nassistant: ", FIRST, SECOND)


def test_the_anthropic_client(claude: anthropic.Anthropic, tiny: TinyVision) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(as_png(FIRST)).decode()}
    messages = [{"role": "user", "content": [{"type": "image", "source": source}, text_part("see?")]}]
    limits = {"max_tokens": NUM_TOKENS, "extra_body": {"temperature": 0}}
    answer = claude.messages.create(model="llava", system="Look.", messages=messages, **limits)
    prompt = "system: Look.\nuser: *see?\nassistant: "
    assert answer.content[0].text == truth(tiny, prompt, FIRST)
    counted = claude.messages.count_tokens(model="llava", system="Look.", messages=messages)
    ids = tiny.inputs(prompt.replace("*", tiny.placeholder), [FIRST])["input_ids"]
    assert counted.input_tokens == ids.shape[1]
    used = {"type": "tool_use", "id": "toolu_1", "name": "shoot", "input": {}}
    result = {
        "type": "tool_result",
        "tool_use_id": "toolu_1",
        "content": [text_part("it"), {"type": "image", "source": source}],
    }
    turns = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": [text_part("ok"), used]},
        {"role": "user", "content": [result]},
    ]
    answer = claude.messages.create(model="llava", messages=turns, **limits)
    assert answer.content[0].text == truth(tiny, "user: go\nassistant: ok\ntool: it*\nassistant: ", FIRST)


def test_the_ollama_client(seeing: Server, tiny: TinyVision) -> None:
    options = {"temperature": 0, "num_predict": NUM_TOKENS}
    messages = [{"role": "user", "content": "see?", "images": [as_png(SECOND)]}]
    expected = truth(tiny, "user: *see?\nassistant: ", SECOND)
    with ollama.Client(host=seeing.url) as client:
        assert client.chat(model="llava", messages=messages, options=options).message.content == expected
        made = client.generate(model="llava", prompt="see?", images=[as_png(SECOND)], options=options)
    assert made.response == expected


def test_sglang_s_generate(seeing: Server, tiny: TinyVision) -> None:
    params = {"temperature": 0, "max_new_tokens": NUM_TOKENS}
    data = base64.b64encode(as_png(SECOND)).decode()
    texts = ["<image>see", "see <image><image>", "see"]
    body = {"text": texts, "image_data": [url_of(FIRST), [data, url_of(FIRST)], None], "sampling_params": params}
    with seeing.client() as client:
        answers = client.post("/generate", json=body).json()
        pictures = ([FIRST], [SECOND, FIRST], [])
        assert [one["text"] for one in answers] == [
            truth(tiny, text.replace("<image>", "*"), *own) for text, own in zip(texts, pictures, strict=True)
        ]
        one = client.post("/generate", json={"text": texts[0], "image_data": url_of(FIRST), "sampling_params": params})
        assert one.json()["text"] == answers[0]["text"]
        for text in (texts[0], "<image>" * 16 + "see"):  # the image's mark, and all of its placeholders
            ids = tiny.processor.tokenizer(text)["input_ids"]
            by_ids = {"input_ids": ids, "image_data": url_of(FIRST), "sampling_params": params}
            assert client.post("/generate", json=by_ids).json()["text"] == answers[0]["text"]
        for fields, says in (
            ({"text": "see", "image_data": data}, "text: the prompt has '<image>' 0 times for 1 images"),
            ({"text": "<image>", "image_data": "http://127.0.0.1/"}, "image_data: image 1: nothing is fetched"),
            ({"input_ids": [1, 2], "image_data": data}, "input_ids: the prompt has token"),
            ({"input_ids": [1, 10**6], "image_data": data}, "input_ids: token id 1000000 is not below the vocabulary"),
            ({"input_ids": [[1], [2]], "image_data": [data]}, "image_data: 1 values for 2 prompts"),
            ({"text": ["a", "b"], "image_data": [data]}, "image_data: 1 values for 2 prompts"),
        ):
            refused = client.post("/generate", json=fields)
            assert refused.status_code == 400
            assert says in refused.text


@sgl.function
def looked(s: Any, first: Any, second: Any) -> None:
    s += sgl.system("Look.")
    s += sgl.user("a " + sgl.image(first) + " b")
    s += sgl.assistant(sgl.gen("one", max_tokens=NUM_TOKENS, temperature=0))
    s += sgl.user_begin() + "and "
    forks = s.fork(2)
    for fork, shown in zip(forks, (first, second), strict=True):
        fork += sgl.image(shown)
        fork += "?" + sgl.user_end() + sgl.assistant(sgl.gen("two", max_tokens=NUM_TOKENS, temperature=0))
    forks.join()


def test_programs_of_octavo_lang(seeing: Server, tiny: TinyVision, shared: Path) -> None:
    """By each API, with a file and with bytes; forks see an image each."""
    apis = (
        sgl.RuntimeEndpoint(seeing.url),
        sgl.OpenAI("llava", base_url=f"{seeing.url}/v1", api_key="none"),
        sgl.Anthropic("llava", base_url=seeing.url, api_key="none"),
    )
    begun = "system: Look.\nuser: a * b\nassistant: "
    one = truth(tiny, begun, FIRST)
    two = [truth(tiny, f"{begun}{one}\nuser: and *?\nassistant: ", FIRST, second) for second in (FIRST, SECOND)]
    for api in apis:
        state = looked.run(first=shared / "first.png", second=as_png(SECOND), backend=api)
        assert (state["one"], state["two"]) == (one, two)


def test_a_choice_behind_an_image(seeing: Server, tiny: TinyVision, shared: Path) -> None:
    """Its log-probabilities are transformers'."""

    @sgl.function
    def judged(s: Any) -> None:
        s += sgl.user(sgl.image(shared / "first.png") + "well?")
        s += sgl.assistant(sgl.select("it", choices=["good", "a bad one"]))

    state = judged.run(backend=sgl.RuntimeEndpoint(seeing.url))
    inputs = tiny.inputs(f"user: {tiny.placeholder}well?\nassistant: ", [FIRST])
    count = inputs["input_ids"].shape[1]
    for entries in state.get_meta_info("it")["input_token_logprobs"]:
        ids = [token for _, token, _ in entries]
        rows = tiny.logits(inputs, ids)[-len(ids) - 1 : -1].log_softmax(-1)
        assert len(rows) == len(ids) <= count
        expected = rows.gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor([logprob for logprob, _, _ in entries]), expected, rtol=0, atol=1e-3)


def test_where_a_program_s_image_may_not_be(seeing: Server, shared: Path) -> None:
    picture_of = sgl.image(shared / "first.png")
    endpoint = sgl.RuntimeEndpoint(seeing.url)
    for backend, body, says in (
        (endpoint, picture_of + sgl.gen("x"), "an image stands outside of a turn"),
        (sgl.RuntimeEndpoint(seeing.url, chat_template_name="chatml"),
         sgl.user(picture_of) + sgl.assistant(sgl.gen("x")), "leave out chat_template_name"),
        (sgl.RuntimeEndpoint(seeing.url, chat_template_name="chatml"),
         sgl.user(picture_of) + sgl.assistant(sgl.select("x", choices=["a", "b"])), "leave out chat_template_name"),
        (sgl.Anthropic("llava", base_url=seeing.url, api_key="none"),
         sgl.system(picture_of) + sgl.assistant(sgl.gen("x")), "an image stands in a system's turn"),
    ):  # fmt: skip

        @sgl.function
        def program(s: Any, said: Any) -> None:
            s += said

        with pytest.raises(ValueError, match=says):
            program.run(said=body, backend=backend)["x"]


def test_a_file_of_the_directory(seeing: Server, tiny: TinyVision, shared: Path) -> None:
    with seeing.client() as client:
        answer = asked(client, f"file://{shared}/first.png")
    assert answer.json()["choices"][0]["message"]["content"] == truth(tiny, "user: *\nassistant: ", FIRST)


def asked(client: httpx.Client, *urls: str, **fields: Any) -> httpx.Response:
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    body = {"messages": [{"role": "user", "content": content}], **GREEDY, **fields}
    return client.post("/v1/chat/completions", json=body)


def test_what_is_refused_says_why(seeing: Server, shared: Path, tmp_path: Path) -> None:
    good = url_of(FIRST)
    (tmp_path / "secret.png").write_bytes(as_png(FIRST))
    (shared / "link.png").symlink_to(tmp_path / "secret.png")
    cases: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
        ((good,) * 4, {}, "messages: image 4: 4 are there, and 3 the most (--limit-mm-per-prompt)"),
        ((good, "http://example.com/x.png"), {}, "messages: image 2: nothing is fetched from the network here"),
        ((f"file://{tmp_path}/secret.png",), {}, "the file doesn't lie below --allowed-local-media-path"),
        ((f"file://{shared}/link.png",), {}, "the file doesn't lie below --allowed-local-media-path"),
        ((f"file://{shared}/../x.png",), {}, "the file doesn't lie below --allowed-local-media-path"),
        ((f"file://{shared}/none.png",), {}, "the file can't be read: No such file or directory"),
        (("file://[x/y.png",), {}, "a file of this machine is wanted: file:///PATH"),
        ((data_url(b"hello"),), {}, "messages: image 1: it is no image of a kind that is read: PNG, JPEG"),
        ((good,), {"truncate_prompt_tokens": 5}, "truncate_prompt_tokens: a prompt with images is not cut"),
        ((good,), {"use_beam_search": True, "n": 2}, "use_beam_search: prompts with images are not searched"),
        ((), {"messages": [{"role": "user", "content": [image_part(FIRST), text_part("<image>")]}]}, "2 times for 1"),
    ]
    with seeing.client() as client:
        for urls, fields, says in cases:
            answer = asked(client, *urls, **fields)
            assert answer.status_code == 400, answer.text
            assert says in answer.json()["error"]["message"]


def test_who_hangs_up_leaves_the_queue() -> None:
    """Images are decoded one by one: of what nobody waits for any more, those go on that have begun.

    These are two at most: one that is decoded, and the one before it, whose answer is being checked.
    """
    vision = VisionModel(WholeImage((28, 28), 28, 3, 16), 5, 5, 3)

    async def left_over() -> int:
        images = Images(vision, "<image>", "<image>", None)
        source = ImageSource(url_of(FIRST), "messages", 1)
        known = asyncio.all_tasks()
        asking = [asyncio.create_task(images.read([source])) for _ in range(8)]
        assert len(await asking[0]) == 1
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        count = len(asyncio.all_tasks() - known)
        assert len(await images.read([source])) == 1
        images.close()
        return count

    assert asyncio.run(left_over()) <= 2


def test_a_template_of_text_alone_refuses_images() -> None:
    template = ChatTemplate({"default": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}, {})
    with pytest.raises(ChatTemplateError, match="takes text alone, and the messages have images"):
        template.render([{"role": "user", "content": [text_part("see"), {"type": "image"}]}])


def test_a_template_that_wants_parts_gets_them() -> None:
    """As LLaVA's and SmolVLM's, to which a text would be nothing."""
    walk = "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    template = ChatTemplate({"default": f"{{% for m in messages %}}{walk}{{% endfor %}}"}, {})
    assert template.render([{"role": "user", "content": "hello"}]) == "hello"


class Listener(http.server.BaseHTTPRequestHandler):
    """Notes who comes."""

    came: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.came.append(self.path)
        self.send_response(302)
        self.send_header("location", "http://127.0.0.1/")
        self.end_headers()


@pytest.fixture(scope="module")
def listener() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Listener) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{listening.server_port}"
        listening.shutdown()


@pytest.mark.parametrize(
    "seeds", [range(40), pytest.param(range(40, 1040), marks=pytest.mark.slow)], ids=["some", "a thousand"]
)
def test_hostile_media(seeing: Server, listener: str, tmp_path: Path, seeds: range) -> None:
    """Each is a 4xx, or an image after all; no request leaves, memory stays bounded, and the server goes on."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(as_png(FIRST))
    server = psutil.Process(seeing.process.pid)
    before = server.memory_info().rss
    most = 0
    with seeing.client() as client:
        for seed in seeds:
            url, may_be_one = hostile_url(seed, listener, str(secret))
            answer = asked(client, url, max_tokens=1)
            known = (200, 400, 413) if may_be_one else (400, 413)
            assert answer.status_code in known, (seed, url[:80], answer.text[:200])
            decoders = [child for child in server.children() if _is_decoder(child)]
            most = max([most, *(child.memory_info().rss for child in decoders)])
        assert asked(client, url_of(FIRST), max_tokens=1).status_code == 200
    assert Listener.came == []
    assert most < 1 << 30
    assert server.memory_info().rss - before < 256 << 20


def _is_decoder(process: psutil.Process) -> bool:
    try:
        return "octavo.server.media.process" in process.cmdline()
    except psutil.NoSuchProcess:
        return False
