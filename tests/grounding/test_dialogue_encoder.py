"""Which tokens are answers, under several chat templates; images in their places; mistakes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from preceptor.data.grounding.box_formats import find_boxes
from preceptor.data.types import Dialogue
from preceptor.errors import UserError
from preceptor.grounding.dialogue_encoder import IGNORED, DialogueEncoder, LongDialogue
from preceptor.grounding.modality_clip import of_dialogue
from preceptor.grounding.new_vlm import CHAT_TEMPLATE, train_tokenizer
from tests.grounding.conftest import CORPUS

# As Qwen2-VL's checkpoints have it, less its video branch.
QWEN2_VL = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: "
    "{% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = (
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|image_pad|>{% else %}{{ c['text'] | trim }}{% endif %}"
    "{% endfor %}"
)
# Llama's brackets: the answer begins after a blank, and is ended by a token without a line break.
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
    + _TEXT
    + " [/INST]{% else %} "
    + _TEXT
    + "<|endoftext|>{% endif %}{% endfor %}"
)
# Words for roles and no end mark at all.
ROLES = (
    "{% for m in messages %}{{ m['role'] }}: " + _TEXT + "{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# The last answer is written otherwise than the ones before.
FORGETFUL = (
    "{% for m in messages %}{{ m['role'] }}: {% if loop.last and m['role'] == 'assistant' %}(thought) {% endif %}"
    + _TEXT
    + "\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(CORPUS, 600)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, found = tmp_path_factory.mktemp("pictures"), []
    rng = np.random.default_rng(0)
    for number, (width, height, mode) in enumerate([(60, 40, "RGB"), (90, 30, "L"), (28, 200, "RGB")]):
        shape = (height, width) if mode == "L" else (height, width, 3)
        found.append(folder / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(found[-1])
    return found


def encoder(tokenizer: Any, template: str = CHAT_TEMPLATE, **options: Any) -> DialogueEncoder:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer.chat_template = template
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 112 * 112})
    return DialogueEncoder(tokenizer, processor, tokenizer.convert_tokens_to_ids("<|image_pad|>"), **options)


def dialogue(*turns: tuple[str, str], images: tuple[Path, ...] = ()) -> Dialogue:
    return Dialogue("d1", images, turns, "mia", "ct", "g1", "train")


TURNS = (
    ("Where is the liver?", "It is at <|box_start|>(120,345),(567,890)<|box_end|>."),
    ("Is  the heart\nenlarged?", "No."),
    ("No.", "Nein, 心脏正常"),
)


@pytest.mark.parametrize(
    ("template", "end"), [(CHAT_TEMPLATE, "<|im_end|>"), (QWEN2_VL, "<|im_end|>"), (BRACKETS, "<|endoftext|>")]
)
@pytest.mark.parametrize("images", [0, 1, 3])
def test_answers_with_their_end_are_learnt_and_nothing_else(
    template: str, end: str, images: int, tokenizer: Any, pictures: list[Path]
):
    coder = encoder(tokenizer, template)
    for count in (1, 2, 3):
        row = coder.encode(dialogue(*TURNS[:count], images=tuple(pictures[:images])))
        learnt = row.labels != IGNORED
        assert torch.equal(row.labels[learnt], row.input_ids[learnt])
        spans = _runs(learnt.tolist())
        texts = [tokenizer.decode(row.input_ids[a:b].tolist()) for a, b in spans]
        blank = " " if template == BRACKETS else ""
        assert texts == [f"{blank}{answer}{end}" for _, answer in TURNS[:count]]
        assert (row.image_grid_thw is None) == (images == 0)


def test_where_nothing_ends_an_answer_all_that_the_template_adds_is_learnt(tokenizer: Any):
    row = encoder(tokenizer, ROLES).encode(dialogue(*TURNS[:2]))
    learnt = row.labels != IGNORED
    texts = [tokenizer.decode(row.input_ids[a:b].tolist()) for a, b in _runs(learnt.tolist())]
    assert texts == [f"{answer}\n\n" for _, answer in TURNS[:2]]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, QWEN2_VL])
def test_the_tokens_are_those_of_the_whole_text(template: str, tokenizer: Any, pictures: list[Path]):
    coder = encoder(tokenizer, template)
    row = coder.encode(dialogue(*TURNS, images=tuple(pictures)))
    messages = []
    for number, (question, answer) in enumerate(TURNS):
        content = [{"type": "image"}] * 3 * (number == 0) + [{"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    pad = coder.image_token_id
    want: list[int] = []
    counts = iter((row.image_grid_thw.prod(1) // 4).tolist())
    for token in tokenizer(whole, add_special_tokens=False)["input_ids"]:
        want += [pad] * (next(counts) if token == pad else 1) if token == pad else [token]
    assert row.input_ids.tolist() == want


def test_images_have_as_many_placeholders_as_upstream_writes(tokenizer: Any, pictures: list[Path]):
    from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

    coder = encoder(tokenizer)
    row = coder.encode(dialogue(*TURNS, images=tuple(pictures)))
    upstream = Qwen2VLProcessor.__new__(Qwen2VLProcessor)  # its video processor cannot be had without torchvision
    upstream.image_processor, upstream.image_token = coder.image_processor, "<|image_pad|>"
    written = [upstream.replace_image_token({"image_grid_thw": row.image_grid_thw}, i) for i in range(3)]
    ids = row.input_ids.tolist()
    assert [b - a for a, b in _runs([i == coder.image_token_id for i in ids])] == [
        len(text) // len("<|image_pad|>") for text in written
    ]
    # 60 x 40 pixels are 2 x 1 tokens of 28; 90 x 30: 3 x 1; 28 x 200: 1 x 7
    assert row.image_grid_thw.tolist() == [[1, 2, 4], [1, 2, 6], [1, 14, 2]]
    assert row.pixel_values is not None
    assert row.pixel_values.shape == (8 + 12 + 28, 3 * 2 * 14 * 14)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, QWEN2_VL, BRACKETS, ROLES])
@given(
    st.lists(
        st.tuples(st.text("aé. \n1心", max_size=6), st.text("ab\n 1心", min_size=1, max_size=6)), min_size=1, max_size=3
    )
)
def test_a_prompt_is_the_beginning_of_its_row(template: str, tokenizer: Any, turns: list[tuple[str, str]]):
    coder = encoder(tokenizer, template)
    for one in turns:
        if not one[1].strip():
            with pytest.raises(UserError, match="has no answer"):
                coder.encode(dialogue(*turns))
            return
    row = coder.encode(dialogue(*turns))
    prompt = coder.encode(dialogue(*turns[:-1], (turns[-1][0], "")), prompt=True)
    size = len(prompt.input_ids)
    assert torch.equal(row.input_ids[:size], prompt.input_ids)
    assert torch.equal(row.labels[:size], prompt.labels)
    assert row.labels[size] != IGNORED
    assert len(_runs((row.labels != IGNORED).tolist())) == len(turns)


def test_both_paddings(tokenizer: Any, pictures: list[Path]):
    coder = encoder(tokenizer)
    rows = [
        coder.encode(dialogue(*TURNS[:1], images=tuple(pictures[:2]))),
        coder.encode(dialogue(*TURNS[1:2])),
        coder.encode(dialogue(*TURNS[:2], images=tuple(pictures[2:]))),
    ]
    for side in ("left", "right"):
        batch = coder.collate(rows, side)  # type: ignore[arg-type]
        for i, row in enumerate(rows):
            there = batch["attention_mask"][i].bool()
            assert torch.equal(batch["input_ids"][i, there], row.input_ids)
            assert torch.equal(batch["labels"][i, there], row.labels)
            assert (batch["labels"][i, ~there] == IGNORED).all()
            assert there.tolist() == sorted(there.tolist(), reverse=side == "right")
        assert torch.equal(batch["mm_token_type_ids"].bool(), batch["input_ids"] == coder.image_token_id)
        assert batch["image_grid_thw"].shape == (3, 3)
    assert "pixel_values" not in coder.collate(rows[1:2])


def test_a_placeholder_as_padding_is_no_image(tokenizer: Any):
    coder = encoder(tokenizer)
    rows = [coder.encode(dialogue(*TURNS[:2])), coder.encode(dialogue(*TURNS[1:2]))]
    kept = tokenizer.pad_token
    try:
        tokenizer.pad_token = "<|image_pad|>"
        assert not coder.collate(rows)["mm_token_type_ids"].any()
    finally:
        tokenizer.pad_token = kept


def test_a_row_longer_than_the_maximum_is_refused_whole(tokenizer: Any, pictures: list[Path]):
    row = dialogue(*TURNS[:1], images=(pictures[2],))
    length = len(encoder(tokenizer).encode(row).input_ids)
    assert len(encoder(tokenizer, max_length=length).encode(row).input_ids) == length
    with pytest.raises(LongDialogue, match=rf"has {length} tokens \(7 of them for images\)") as caught:
        encoder(tokenizer, max_length=length - 1).encode(row)
    assert caught.value.tokens == length


def test_an_encoder_works_in_a_loaders_process(tokenizer: Any, pictures: list[Path]):
    coder = encoder(tokenizer, modality_rows=of_dialogue)
    rows = [dialogue(*TURNS[:1], images=(path,)) for path in pictures]
    loader = DataLoader(rows, batch_size=3, num_workers=1, collate_fn=Encode(coder))  # type: ignore[arg-type]
    (batch,) = loader
    want = coder.collate([coder.encode(row) for row in rows])
    assert batch.keys() == want.keys()
    assert all(torch.equal(batch[name], value) for name, value in want.items())
    assert batch["modalities"].tolist() == [[1, 0, 0, 0, 0, 0, 0, 0]] * 3
    coder.max_length = 5
    with pytest.raises(LongDialogue, match="more than the maximum of 5"):
        list(DataLoader(rows, num_workers=1, collate_fn=Encode(coder)))  # type: ignore[arg-type]


class Encode:
    """As a function of the module would be: it must survive pickling."""

    def __init__(self, coder: DialogueEncoder) -> None:
        self.coder = pickle.loads(pickle.dumps(coder))

    def __call__(self, rows: list[Dialogue]) -> dict[str, Any]:
        return self.coder.collate([self.coder.encode(row) for row in rows])


def test_a_text_keeps_its_boxes_and_loses_its_structure(tokenizer: Any):
    coder = encoder(tokenizer)
    text = "at <|object_ref_start|>liver<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
    ids = tokenizer(f"<|im_start|> {text}<|im_end|><|endoftext|>")["input_ids"]
    assert coder.decode(ids) == text


@pytest.mark.parametrize(
    ("change", "template", "message"),
    [
        (lambda d: replace(d, turns=(("q<|im_end|>", "a"),)), CHAT_TEMPLATE, "special token '<|im_end|>'"),
        (lambda d: replace(d, turns=(("q", "a<|image_pad|>"),)), CHAT_TEMPLATE, r"special token '<\|image_pad\|>'"),
        (
            lambda d: replace(d, turns=(("<image><image>q", "a"),)),
            CHAT_TEMPLATE,
            "contain 2 marks <image>, and there are",
        ),
        (lambda d: replace(d, turns=(("q", " "),)), CHAT_TEMPLATE, "turn 1 of dialogue 'd1' has no answer"),
        (lambda d: d, FORGETFUL, "renders a turn differently if others follow"),
        (lambda d: d, CHAT_TEMPLATE.replace("part['text']", "part['text'] | upper"), "changes the answer 'It is at"),
        (lambda d: d, CHAT_TEMPLATE.replace("<|image_pad|>", ""), "does not write one image placeholder"),
        (lambda d: d, CHAT_TEMPLATE.replace("<|image_pad|>", "<|image_pad|>" * 2), "one image placeholder for each"),
    ],
)
def test_mistakes_are_named(change: Callable, template: str, message: str, tokenizer: Any, pictures: list[Path]):
    with pytest.raises(UserError, match=message.replace("<|im_end|>", r"<\|im_end\|>")):
        encoder(tokenizer, template).encode(change(dialogue(*TURNS, images=(pictures[0],))))


def test_a_thin_image_is_named(tokenizer: Any, tmp_path: Path):
    Image.new("L", (1, 300)).save(tmp_path / "thin.png")
    with pytest.raises(UserError, match=r"thin.png: 1 x 300 pixels exceed the largest aspect ratio"):
        encoder(tokenizer).encode(dialogue(*TURNS, images=(tmp_path / "thin.png",)))


BOX_TURN = ("Where is <|object_ref_start|>it<|object_ref_end|>?", "<|box_start|>(250,500),(500,1000)<|box_end|>")


@pytest.mark.parametrize(
    ("box_format", "answer"),
    [
        ("qwen2-vl", "<|box_start|>(250,500),(500,1000)<|box_end|>"),
        ("bird", "<box>(250,500),(500,1000)</box>"),
        ("qwen3-vl", '[{"bbox_2d": [250, 500, 500, 1000]}]'),
        ("qwen2.5-vl", '[{"bbox_2d": [14, 28, 28, 56]}]'),  # the encoder resizes the image to 56 x 56
        ("gemma", '[{"box_2d": [500, 250, 1000, 500]}]'),
    ],
)
def test_targets_are_in_the_format_of_the_model(box_format: str, answer: str, tokenizer: Any, tmp_path: Path):
    Image.new("L", (61, 52)).save(tmp_path / "a.png")
    row = dialogue(BOX_TURN, images=(tmp_path / "a.png",))
    coder = encoder(tokenizer)
    coder.box_format = box_format
    encoded = coder.encode(row)
    text = tokenizer.decode(encoded.labels[encoded.labels != IGNORED])
    assert text.removesuffix("<|im_end|>").strip() == answer
    stored = coder.read_answer(answer, encoded)
    assert find_boxes(stored)[0].box == (250, 500, 500, 1000)
    assert (stored == answer) == (box_format == "qwen2-vl")


def test_boxes_in_pixels_of_several_images_are_refused_in_training(tokenizer: Any, pictures: list[Path]):
    coder = encoder(tokenizer)
    row = dialogue(BOX_TURN, images=(pictures[0], pictures[2]))
    coder.require_one_box_size(row, coder.encode(row))
    coder.box_format = "qwen2.5-vl"
    with pytest.raises(UserError, match=r"has boxes and images of 2 sizes, and this model writes boxes in pixels"):
        coder.require_one_box_size(row, coder.encode(row))


def test_system_messages_and_images_keep_their_positions(tokenizer: Any, pictures: list[Path]):
    coder = encoder(tokenizer)
    row = dialogue(("Hello", "Yes?"), ("See <image> and <image>.", "No."), images=tuple(pictures[:2]))
    rendered = "".join(text for text, _ in coder.parts(replace(row, system="Be brief.")))
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert rendered.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>")
    assert f"<|im_start|>user\nSee {image} and {image}.<|im_end|>" in rendered
    assert [answer for text, answer in coder.parts(replace(row, system="Be brief."))].count(True) == 2
    ids = coder.encode(row).input_ids
    assert tokenizer.decode(ids[: (ids == coder.image_token_id).nonzero()[0]]).endswith("See <|vision_start|>")
    with pytest.raises(UserError, match="system message of dialogue 'd1' contains the special token"):
        coder.encode(replace(row, system="<|im_end|>"))
    silent = CHAT_TEMPLATE.replace("{% for message in messages %}", "{% for message in messages[-2:] %}")
    for template in (silent, BRACKETS):
        with pytest.raises(UserError, match="has no system messages"):
            encoder(tokenizer, template).encode(replace(dialogue(("a", "b")), system="Be brief."))


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    edges = [i for i, (a, b) in enumerate(zip([False, *flags], [*flags, False], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))
