"""Token ids of prompts with images: they become those that transformers' processors make of the text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import transformers
from PIL import Image
from slow_cases import slow
from tiny_vision import MARKS, PLACEHOLDERS, TinyVision, as_png, make_tiny_vision, picture

from octavo.runtime.vision.kinds import vision_model_of
from octavo.runtime.vision.preprocessing import Preprocessing
from octavo.runtime.vision.recipes import Lines, VisionModel
from octavo.server.media.frames import frames_of
from octavo.server.media.prompt import PlacesError, ReadImage, expanded_ids
from octavo.text.tokenizer import Tokenizer

FIRST, SECOND = picture(1, 50, 37), picture(2, 31, 90)
FAST = ("llava", "gemma3", "paligemma", "idefics3")


class Prompts:
    """What a kind of model makes of token ids and pictures."""

    def __init__(self, tiny: TinyVision) -> None:
        config = transformers.AutoConfig.from_pretrained(tiny.directory)
        self.tiny = tiny
        self.facts: VisionModel = vision_model_of(config, Preprocessing(tiny.directory), 4)[0]
        self.tokenizer = Tokenizer.open(tiny.directory)

    def expanded(self, ids: list[int], pictures: list[Image.Image]) -> list[int]:
        recipe = self.facts.recipe_for(len(pictures))
        decoded = [frames_of(as_png(one), recipe) for one in pictures]
        read = [ReadImage(b"", one.size, one.frames, one.pixels) for one in decoded]
        return expanded_ids(ids, read, self.facts, self.tokenizer)

    def processed(self, text: str, pictures: list[Image.Image]) -> list[int]:
        ids: list[int] = self.tiny.inputs(text, pictures)["input_ids"][0].tolist()
        return ids


@pytest.fixture(scope="module", params=[kind if kind in FAST else slow(kind) for kind in PLACEHOLDERS])
def prompts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return Prompts(make_tiny_vision(request.param, tmp_path_factory.mktemp(request.param)))


@pytest.mark.parametrize("text", ["look at *\n, then *\n\n!", "**", "* and\n*"])
def test_ids_become_those_of_the_processor(prompts: Prompts, text: str) -> None:
    """Whatever a tokenizer joins to what stands around an image; and those that are there already stay."""
    text = text.replace("*", MARKS[prompts.tiny.kind])
    wanted = prompts.processed(text, [FIRST, SECOND])
    assert prompts.expanded(prompts.tokenizer.encode(text), [FIRST, SECOND]) == wanted
    assert prompts.expanded(wanted, [FIRST, SECOND]) == wanted


def test_ids_that_no_text_becomes_are_kept(prompts: Prompts) -> None:
    """A word in letters, as a model may have written it, with the processor's ids of an image among them."""
    letters = [prompts.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "again"]
    mark = prompts.tokenizer.encode(MARKS[prompts.tiny.kind], add_special_tokens=False)
    wanted = prompts.processed(MARKS[prompts.tiny.kind], [FIRST])
    before, behind = prompts.tokenizer.frame
    if prompts.facts.begins_with is None:
        image = wanted[len(before) : len(wanted) - len(behind)]
        assert prompts.expanded([*letters, *mark, *letters], [FIRST]) == [*letters, *image, *letters]
    else:  # the image comes first, and a line's end last
        end = prompts.tokenizer.encode("\n", add_special_tokens=False)
        bos = prompts.tokenizer.token_id(prompts.facts.begins_with)
        for ids in (letters, [bos, *letters], [*mark, *letters], [*mark, bos, *letters, *end]):
            assert prompts.expanded(ids, [FIRST]) == [*wanted[: -len(end)], *letters, *end]


def test_marks_that_are_too_many_or_none(prompts: Prompts) -> None:
    mark = prompts.facts.mark_id
    for count in (1, 3) if prompts.facts.begins_with else (0, 1, 3):
        ids = [*prompts.tokenizer.encode("see"), *[mark] * count]
        with pytest.raises(PlacesError, match=f"{count} times for 2 images; once for each is wanted, or all of their"):
            prompts.expanded(ids, [FIRST, SECOND])


def test_a_picture_of_one_placeholder(tmp_path: Path) -> None:
    """Its mark is the same token: what stands behind it in a line tells whether it is there already."""
    prompts = Prompts(make_tiny_vision("mistral3", tmp_path))
    assert isinstance(prompts.facts.recipe, Lines)
    small = picture(3, prompts.facts.recipe.factor, prompts.facts.recipe.factor)
    mark, end = (prompts.tokenizer.token_id(token) for token in ("[IMG]", "[IMG_END]"))
    assert mark is not None
    assert prompts.expanded([mark, 40, mark, 41], [small, small]) == [mark, end, 40, mark, end, 41]
    assert prompts.expanded([mark, end, 40, mark, end], [small, small]) == [mark, end, 40, mark, end]


@pytest.mark.parametrize("prompts", ["llava", "gemma3"], indirect=True)
def test_any_ids_are_expanded_or_refused(prompts: Prompts) -> None:
    """With a mark anywhere among ids by chance, no id is lost but the mark."""
    chance = random.Random(0)
    num_tokens = prompts.tokenizer.num_tokens
    special = {prompts.facts.mark_id, prompts.facts.placeholder_id}
    for _ in range(50):
        ids = [token for token in chance.choices(range(num_tokens), k=9) if token not in special]
        place = chance.randrange(len(ids) + 1)
        made = prompts.expanded([*ids[:place], prompts.facts.mark_id, *ids[place:]], [FIRST])
        text = prompts.tokenizer.decode(ids[:place])
        assert made.count(prompts.facts.placeholder_id) == 16
        assert prompts.tokenizer.decode(made).startswith(text)
        assert prompts.tokenizer.decode(made).endswith(prompts.tokenizer.decode(ids[place:]))
