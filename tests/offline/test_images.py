"""Images in `octavo.LLM` and `octavo.AsyncLLM`, as vLLM takes them: what is answered is what transformers computes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hostile_media import data_url
from PIL import Image
from tiny_vision import TinyVision, as_png, make_tiny_vision, picture

from octavo import LLM, AsyncLLM, BeamSearchParams, RequestOutput, SamplingParams
from octavo.inputs import prompts_of
from octavo.offline import batch
from octavo.offline.requests import Job, asked_by

FIRST, SECOND = picture(1, 50, 37), picture(2, 31, 90)
NUM_TOKENS = 6
BLOCK = 16
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
SIZES: dict[str, Any] = {"max_model_len": 200, "limit_mm_per_prompt": {"image": 2}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyVision:
    return make_tiny_vision("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def seeing(tiny: TinyVision, forked: None, small: dict[str, Any]) -> Iterator[LLM]:  # noqa: ARG001
    with LLM(str(tiny.directory), **small | SIZES) as found:
        yield found


def truth(tiny: TinyVision, text: str, *pictures: Image.Image) -> str:
    ids = tiny.greedy(tiny.inputs(text, list(pictures)), NUM_TOKENS)
    return tiny.processor.tokenizer.decode(ids, skip_special_tokens=True)


def prompt_of(text: str, *pictures: Image.Image) -> dict[str, Any]:
    data = {"image": pictures[0] if len(pictures) == 1 else list(pictures)}
    return {"prompt": text, "multi_modal_data": data if pictures else None}


def said(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_prompts_with_images(seeing: LLM, tiny: TinyVision, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, one by one and many at once, which are decoded group by group."""
    cases = [("see <image>", FIRST), ("<image> or <image>?", FIRST, SECOND), ("see",), ("what <image> is", SECOND)]
    prompts = [prompt_of(*case) for case in cases]
    expected = [truth(tiny, *case) for case in cases]
    outputs = seeing.generate(prompts, GREEDY)
    assert said(outputs) == expected
    assert [output.prompt for output in outputs] == [text for text, *_ in cases]
    ids = tiny.inputs(cases[1][0], [FIRST, SECOND])["input_ids"]
    assert outputs[1].prompt_token_ids == ids[0].tolist()
    assert said(seeing.generate(prompts[0], GREEDY)) == expected[:1]
    monkeypatch.setattr(batch, "GROUP", 1)
    monkeypatch.setattr(batch, "OPEN_OF_SEQUENCES", 0)
    assert said(seeing.generate(prompts * 3, GREEDY)) == expected * 3


def test_token_ids_with_images(seeing: LLM, tiny: TinyVision) -> None:
    """With a placeholder for each image, and with all: what is told, cached and answered is the text's."""
    text = "the first <image>, then <image>?"
    first, second, third = picture(3, 50, 37), picture(4, 31, 90), picture(5, 40, 40)
    by_text = seeing.generate(prompt_of(text, first, second), GREEDY)
    (expected,) = said(by_text)
    assert expected == truth(tiny, text, first, second)
    whole = by_text[0].prompt_token_ids
    for ids in (tiny.processor.tokenizer(text)["input_ids"], whole):
        prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": [first, second]}, "prompt": "told"}
        (output,) = seeing.generate(prompt, GREEDY)
        assert output.prompt_token_ids == whole
        assert output.prompt == "told"
        assert output.outputs[0].text == expected
        assert output.num_cached_tokens == (len(whole) - 1) // BLOCK * BLOCK
    prompt = {"prompt_token_ids": whole, "multi_modal_data": {"image": [first, third]}}
    (output,) = seeing.generate(prompt, GREEDY)
    assert said([output]) == [truth(tiny, text, first, third)]
    assert 0 < output.num_cached_tokens < len(whole) - 1 - 16  # up to the second image's 16 tokens


def test_images_that_wait_have_so_many_bytes(seeing: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one image: besides that one prompt is made, one waits in line, and one for the room."""
    one = prompt_of("see <image>", FIRST)
    jobs = [Job(str(number), given, asked_by(GREEDY)) for number, given in enumerate(prompts_of([one] * 12))]
    num_read = 0
    waiting = []
    ended = []
    whole = batch.written

    async def counted(given: Any, model: Any) -> Any:
        nonlocal num_read
        num_read += 1
        waiting.append(num_read - len(ended))
        return await whole(given, model)

    monkeypatch.setattr(batch, "written", counted)
    monkeypatch.setattr(batch, "MOST_MEDIA", 1)
    monkeypatch.setattr(batch, "GROUP_MEDIA", 1)

    async def run() -> list[RequestOutput]:
        return await batch.Batch(seeing._model, ended.append).run(jobs)

    assert len(set(said(seeing._thread.call(run())))) == 1
    assert len(ended) == num_read == len(jobs)
    assert max(waiting) <= 4


def test_conversations_with_images(seeing: LLM, tiny: TinyVision) -> None:
    url = {"type": "image_url", "image_url": {"url": data_url(as_png(SECOND))}}
    content = [{"type": "image_pil", "image_pil": FIRST}, {"type": "text", "text": " and "}, url]
    outputs = seeing.chat([{"role": "user", "content": content}], GREEDY)
    assert said(outputs) == [truth(tiny, "user: <image> and <image>\nassistant: ", FIRST, SECOND)]


def test_images_of_other_modes(seeing: LLM, tiny: TinyVision) -> None:
    """As transformers' processor takes them, and turned as their EXIF data say."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = FIRST.copy()
    turned.getexif()[0x0112] = 6
    faded = FIRST.convert("RGBA")
    faded.putalpha(SECOND.resize(FIRST.size).convert("L"))
    cases = [*(FIRST.convert(mode) for mode in ("L", "CMYK", "YCbCr")), FIRST.quantize(16), faded]
    outputs = seeing.generate([prompt_of("see <image>", one) for one in (*cases, turned)], GREEDY)
    upright = FIRST.transpose(Image.Transpose.ROTATE_270)
    assert said(outputs) == [truth(tiny, "see <image>", one) for one in (*cases, upright)]


@pytest.mark.slow
def test_answers_that_come_one_by_one(seeing: LLM, tiny: TinyVision, small: dict[str, Any]) -> None:  # noqa: ARG001
    async def last() -> str:
        async with AsyncLLM(str(tiny.directory), **small | SIZES) as llm:
            text = ""
            async for output in llm.generate(prompt_of("see <image>", FIRST), GREEDY, "a"):
                text = output.outputs[0].text
            return text

    assert asyncio.run(last()) == truth(tiny, "see <image>", FIRST)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (prompt_of("<image>" * 3, *[FIRST] * 3), "image 3: 3 are there, and 2 the most (limit_mm_per_prompt)"),
        (prompt_of("see", FIRST), "prompt: the prompt has '<image>' 0 times for 1 images"),
        (prompt_of("<image>", Image.new("1", (9000, 9000))), "image 1: 9000 x 9000 pixels; 67108864 are the most"),
        ({"prompt": "<image>", "multi_modal_data": {"image": b"png"}}, "bytes is no image; a PIL.Image.Image is"),
        ({"prompt": "a", "multi_modal_data": {"video": [FIRST]}}, "multi_modal_data has 'video', and 'image' alone"),
        ({"prompt": "a", "multi_modal_data": [FIRST]}, "'multi_modal_data' must be a dictionary"),
        (
            {"prompt_token_ids": [5], "multi_modal_data": {"image": FIRST}},
            "(<image>) 0 times for 1 images; once for each is wanted, or all of their 16 placeholders",
        ),
        ({"prompt_token_ids": [10**7], "multi_modal_data": {"image": FIRST}}, "token id 10000000 is not below"),
        ({"prompt": "a", "multi_modal_uuids": {"image": ["x"]}}, "octavo does not support 'multi_modal_uuids'"),
    ],
)
def test_what_is_wrong_is_said(seeing: LLM, prompt: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        seeing.generate(prompt, GREEDY)


def test_what_is_not_done_with_images(seeing: LLM) -> None:
    prompt = prompt_of("see <image>", FIRST)
    with pytest.raises(ValueError, match="prompts with images are not searched"):
        seeing.beam_search([prompt], BeamSearchParams(beam_width=2, max_tokens=2))
    with pytest.raises(ValueError, match="truncate_prompt_tokens: a prompt with images is not cut"):
        seeing.generate(prompt, SamplingParams(truncate_prompt_tokens=4))
    url = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
    with pytest.raises(ValueError, match="reads no files"):
        seeing.chat([{"role": "user", "content": [url]}])


def test_a_model_of_text_alone_refuses_images(llm: LLM) -> None:
    with pytest.raises(ValueError, match="image 1: this model reads text alone"):
        llm.generate(prompt_of("<image>", FIRST))
    with pytest.raises(ValueError, match="image 1: this model reads text alone"):
        llm.chat([{"role": "user", "content": [{"type": "image_pil", "image_pil": FIRST}]}])
