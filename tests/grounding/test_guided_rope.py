"""Guided positions against upstream, against brute force and against rotations by hand."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preceptor.errors import UserError
from preceptor.grounding.guided_rope import FAMILIES, MODALITIES, Guidance, attach, positions

PAD, TEXT, START, END, IMAGE = 0, 5, 6, 7, 8


def upstream(family: str) -> Any:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    return {"qwen2_5_vl": Qwen2_5_VLModel, "qwen3_vl": Qwen3VLModel}.get(family, Qwen2VLModel)


def configuration(family: str) -> Any:
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=4)
    return SimpleNamespace(model_type=family, vision_config=vision, image_token_id=IMAGE, video_token_id=9)


def bare(family: str) -> Any:
    """Return the upstream model without weights: its position methods read nothing but the configuration."""
    model = upstream(family).__new__(upstream(family))
    torch.nn.Module.__init__(model)
    model.config = configuration(family)
    return model


def layout(seed: int, rows: int = 3, side: str = "left") -> dict[str, Any]:
    """Return a random batch: text before, between and after images, or none of these; rows padded to one length."""
    rng = random.Random(seed)
    sequences, grids = [], []
    for _ in range(rows):
        tokens = [TEXT] * rng.choice([0, 0, 1, 4])
        for _ in range(rng.choice([0, 1, 1, 2, 3])):
            h, w = rng.randint(1, 5), rng.randint(1, 5)
            grids.append([1, 2 * h, 2 * w])
            tokens += [START] * bool(tokens) + [IMAGE] * (h * w) + [END] + [TEXT] * rng.choice([0, 2, 5])
        sequences.append(tokens or [TEXT])
    length = max(map(len, sequences))
    ids, mask = torch.full((rows, length), PAD), torch.zeros(rows, length, dtype=torch.long)
    for row, tokens in enumerate(sequences):
        where = slice(length - len(tokens), None) if side == "left" else slice(0, len(tokens))
        ids[row, where], mask[row, where] = torch.tensor(tokens), 1
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).long(),
        "image_grid_thw": torch.tensor(grids) if grids else None,
        "attention_mask": mask,
    }


def brute_force(tokens: list[int], grids: list[list[int]], rows: list[tuple[float, float, float]]) -> list[list[float]]:
    """Return (t, h, w) of every token, one token at a time from all those before it; the rule as a reader would."""
    found: list[list[float]] = []
    image = 0
    while len(found) < len(tokens):
        n = len(found)
        last = max((c for token in found for c in token), default=-1.0)
        here, before = tokens[n] == IMAGE, n > 0 and tokens[n - 1] == IMAGE
        if not here:
            gap = rows[image - 1][0] if before else 1
            found.append([last + gap] * 3)
            continue
        gap, down, right = rows[image]
        first = 0.0 if n == 0 else last + gap
        found += [
            [first, first + down * r, first + right * c]
            for r in range(grids[image][1] // 2)
            for c in range(grids[image][2] // 2)
        ]
        image += 1
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_none_equals_upstream_on_random_layouts(family: str, side: str):
    model = bare(family)
    for seed in range(200):
        batch = layout(seed, side=side)
        if seed % 5 == 0:  # one full row, and no mask
            batch = layout(seed, rows=1) | {"attention_mask": None}
        want, want_deltas = model.get_rope_index(**batch)
        got, deltas = positions(model.config, Guidance("none"), **batch)
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
        assert torch.equal(deltas, want_deltas)
        assert torch.equal(positions(model.config, Guidance("fixed", gap=1), **batch)[0], want)


@pytest.mark.parametrize("family", FAMILIES)
def test_none_equals_upstream_on_videos(family: str):
    model = bare(family)
    frames, h, w = 3, 2, 2
    if family == "qwen3_vl":  # frames stand alone, time stamps between them
        types = [0, 0] + ([2] * (h * w) + [0]) * frames
    else:
        types = [0, 0] + [2] * (frames * h * w) + [0]
    types += [1] * 6 + [0]
    batch = {
        "input_ids": torch.tensor([types]),
        "mm_token_type_ids": torch.tensor([types]),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "video_grid_thw": torch.tensor([[frames, 2 * h, 2 * w]]),
    }
    if family == "qwen2_5_vl":
        batch["second_per_grid_ts"] = torch.tensor([0.4])
    want, deltas = model.get_rope_index(**batch)
    got = positions(model.config, Guidance("none"), **batch)
    assert torch.equal(got[0], want)
    assert torch.equal(got[1], deltas)


def test_the_published_gap_by_hand():
    """Text 0 1 2; the image of 2 x 3 begins at 2 + 2; the text after it at 6 + 2."""
    ids = torch.tensor([[TEXT, TEXT, START] + [IMAGE] * 6 + [END, TEXT]])
    found, delta = positions(configuration("qwen2_vl"), Guidance(), ids, torch.tensor([[1, 4, 6]]))
    assert found.dtype == torch.long
    assert found[0, 0].tolist() == [0, 1, 2, 4, 4, 4, 4, 4, 4, 8, 9]
    assert found[1, 0].tolist() == [0, 1, 2, 4, 4, 4, 5, 5, 5, 8, 9]
    assert found[2, 0].tolist() == [0, 1, 2, 4, 5, 6, 4, 5, 6, 8, 9]
    assert delta.tolist() == [[-1]]  # the twelfth token, number 11, is at 10


@pytest.mark.parametrize(("frames", "published"), [(2, 8), (8, 14)])
def test_text_after_a_video_is_where_the_published_code_puts_it_unless_the_video_is_longer_than_its_sides(
    frames: int, published: int
):
    """Published: ``llm_pos_ids_list[-1].max() + 2`` over t, h and w. Current transformers differs in the same way."""
    types = torch.tensor([[0] * 4 + [2] * (frames * 4) + [0]])
    video = {"mm_token_type_ids": types, "video_grid_thw": torch.tensor([[frames, 4, 4]])}
    found, _ = positions(configuration("qwen2_vl"), Guidance(), types, **video)
    assert found[:, 0, -1].tolist() == [8] * 3
    assert (found[0, 0, -1] == published) == (frames <= 2)
    with_gap_1, _ = positions(configuration("qwen2_vl"), Guidance("none"), types, **video)
    assert torch.equal(with_gap_1, bare("qwen2_vl").get_rope_index(types, **video)[0])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from(FAMILIES),
    st.sampled_from([(2.0, 1.0, 1.0), (1.5, 0.25, 0.75), (3.0, 2.0, 0.5), (0.5, 1.0, 1.3)]),
)
def test_fixed_equals_brute_force(seed: int, family: str, intervals: tuple[float, float, float]):
    gap, down, right = intervals
    batch = layout(seed)
    guidance = Guidance("fixed", gap=gap, row_step=down, column_step=right)
    got, deltas = positions(configuration(family), guidance, **batch)
    check(batch, got, deltas, [intervals] * 100)
    assert got.is_floating_point() == any(x != int(x) for x in intervals)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_clip_equals_brute_force_with_weighted_rows(seed: int, learnable: bool):
    batch = layout(seed)
    images = 0 if batch["image_grid_thw"] is None else len(batch["image_grid_thw"])
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(8, 3, generator=generator) * 2 + 0.1
    shares = torch.rand(images, 8, generator=generator).softmax(-1)
    guidance = Guidance("clip", table=table, learnable=learnable)
    got, deltas = positions(configuration("qwen2_vl"), guidance, **batch, probabilities=shares)
    rows = [
        tuple(sum(float(p) * float(v) for p, v in zip(share, column, strict=True)) for column in table.T)
        for share in shares
    ]
    check(batch, got, deltas, rows)


def check(batch: dict[str, Any], got: Tensor, deltas: Tensor, rows: list[Any]) -> None:
    grids = [] if batch["image_grid_thw"] is None else batch["image_grid_thw"].tolist()
    done = 0
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
        tokens = ids[mask].tolist()
        mine = sum(1 for a, b in pairwise([TEXT, *tokens]) if b == IMAGE and a != IMAGE)
        want = torch.tensor(brute_force(tokens, grids[done:], rows[done:])).T
        done += mine
        assert torch.allclose(got[:, row, mask].float(), want, atol=1e-4)
        assert (got[:, row, ~mask] == 0).all()
        assert deltas[row].item() == pytest.approx(want.max().item() + 1 - len(tokens), abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rotation_of_a_fractional_position_by_hand(family: str, vlm_folder: Callable):
    """Pair i of a head (i and i + half) turns by position * theta^(-2i/d); which coordinate, the sections say."""
    model = load(vlm_folder, family)
    text = model.config.text_config
    head = text.hidden_size // text.num_attention_heads
    half, section = head // 2, text.rope_parameters["mrope_section"]
    if family == "qwen3_vl":  # t h w t h w ... as far as each reaches, the rest t
        axis = [i % 3 if i % 3 and i < 3 * section[i % 3] else 0 for i in range(half)]
    else:
        axis = [0] * section[0] + [1] * section[1] + [2] * section[2]
    ids = torch.tensor([[TEXT, START] + [model.config.image_token_id] * 6 + [END]])
    guidance = Guidance("fixed", gap=1.75, row_step=0.3, column_step=0.7)
    found, _ = positions(model.config, guidance, ids, torch.tensor([[1, 4, 6]]))
    query = torch.randn(1, 1, ids.shape[1], head, generator=torch.Generator().manual_seed(1))
    cos, sin = model.model.language_model.rotary_emb(query, found)
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb

    turned, _ = apply_rotary_pos_emb(query, query, cos, sin)
    for token in range(ids.shape[1]):
        for i in range(half):
            angle = found[axis[i], 0, token].double() * text.rope_parameters["rope_theta"] ** (-2 * i / head)
            a, b = query[0, 0, token, i].double(), query[0, 0, token, i + half].double()
            assert turned[0, 0, token, i].item() == pytest.approx((a * angle.cos() - b * angle.sin()).item(), abs=1e-5)
            want = (b * angle.cos() + a * angle.sin()).item()
            assert turned[0, 0, token, i + half].item() == pytest.approx(want, abs=1e-5)


# --- attached to a model --------------------------------------------------------------------------------------------


def load(vlm_folder: Callable, family: str) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(vlm_folder(family), local_files_only=True).eval()


def batch_of(model: Any, plan: list[list[Any]]) -> dict[str, Tensor]:
    """Return a left-padded batch; a row is a list of text lengths (int) and images (rows, columns after merging)."""
    config, generator = model.config, torch.Generator().manual_seed(7)
    sequences, grids = [], []
    for row in plan:
        tokens: list[int] = []
        for part in row:
            if isinstance(part, int):
                tokens += torch.randint(0, 250, (part,), generator=generator).tolist()
            else:
                h, w = part
                grids.append([1, 2 * h, 2 * w])
                pad = [config.image_token_id] * (h * w)
                tokens += [config.vision_start_token_id, *pad, config.vision_end_token_id]
        sequences.append(tokens)
    length = max(map(len, sequences))
    ids = torch.tensor([[0] * (length - len(s)) + s for s in sequences])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[0] * (length - len(s)) + [1] * len(s) for s in sequences]),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
    }
    if grids:
        patches = sum(h * w for _, h, w in grids)
        vision = config.vision_config
        numbers = 3 * vision.temporal_patch_size * vision.patch_size**2
        batch["pixel_values"] = torch.randn(patches, numbers, generator=generator)
        batch["image_grid_thw"] = torch.tensor(grids)
    return batch


PLANS = {
    "padded": [[3, (2, 3), 4], [1, (1, 2), 1]],
    "several": [[2, (2, 2), 1, (3, 1), 3], [5], [1, (1, 1), 2]],
    "text": [[4], [7]],
}
TABLE = [[1.5 + 0.1 * i, 0.5 + 0.05 * i, 1.2 - 0.1 * i] for i in range(8)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ["none", "fixed", "fractional", "clip"])
def test_cached_decoding_equals_decoding_without_cache(family: str, plan: str, kind: str, vlm_folder: Callable):
    model = load(vlm_folder, family)
    batch = batch_of(model, PLANS[plan])
    guidance = {
        "none": Guidance("none"),
        "fixed": Guidance("fixed"),
        "fractional": Guidance("fixed", gap=2.5, row_step=0.6, column_step=1.4),
        "clip": Guidance("clip", table=TABLE),
    }[kind]
    images = len(batch.get("image_grid_thw", []))
    shares = torch.rand(images, 8, generator=torch.Generator().manual_seed(3)).softmax(-1)
    options = {
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with attach(model, guidance, shares):
        cached = model.generate(**batch, **options)
        plain = model.generate(**batch, **options, use_cache=False)
    ids, logits = batch["input_ids"], []
    mask, types = batch["attention_mask"], batch["mm_token_type_ids"]
    for _ in range(5):  # with positions counted afresh over the whole sequence, and no hook
        where, _ = positions(model.config, guidance, ids, batch.get("image_grid_thw"), mask, probabilities=shares)
        new = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types, "position_ids": where}
        with torch.no_grad():
            logits.append(model(**(batch | new), use_cache=False).logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
        mask, types = (torch.cat([x, torch.full_like(x[:, :1], v)], dim=1) for x, v in ((mask, 1), (types, 0)))
    assert torch.equal(cached.sequences, plain.sequences)
    assert torch.equal(cached.sequences, ids)
    for a, b, c in zip(cached.logits, plain.logits, logits, strict=True):
        assert torch.allclose(a, b, atol=2e-5)
        assert torch.allclose(a, c, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_changes_the_answer_and_leaves_with_its_block(family: str, vlm_folder: Callable):
    model = load(vlm_folder, family)
    batch = batch_of(model, PLANS["padded"])
    with torch.no_grad():
        before = model(**batch).logits
        with attach(model, Guidance("none")):
            assert torch.equal(model(**batch).logits, before)
        with attach(model, Guidance("fixed")), pytest.raises(UserError, match="already has guided positions"):
            attach(model, Guidance("fixed"))
        with attach(model, Guidance("fixed", gap=4, row_step=0.5)):
            assert not torch.allclose(model(**batch).logits, before, atol=1e-4)
        assert torch.equal(model(**batch).logits, before)
    assert "get_rope_index" not in model.model.__dict__
    assert "forward" not in model.model.language_model.rotary_emb.__dict__
    other = load(vlm_folder, family)
    with attach(model, Guidance("fixed")):
        assert "get_rope_index" not in other.model.__dict__


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_trains_the_table(family: str, checkpointing: bool, vlm_folder: Callable):
    """Against finite differences of the logits; a modality that no image has learns nothing."""
    model = load(vlm_folder, family)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "self_attn" in name and "norm" not in name:
                weight *= 8  # so that attention of random weights depends on positions at all
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    batch = batch_of(model, PLANS["several"])
    guidance = Guidance("clip", table=TABLE, learnable=True)
    shares = torch.eye(8)[[0, 0, 2]]
    probe = torch.randn(model.config.text_config.vocab_size, generator=torch.Generator().manual_seed(0))

    def value() -> Tensor:
        return (model(**batch, use_cache=False).logits[:, -1] @ probe).sum()

    with attach(model, guidance, shares):
        value().backward()
        assert guidance.log_table is not None
        slope = guidance.log_table.grad
        assert slope is not None
        assert (slope[0].abs() > 1e-5).all(), slope
        assert slope[2, 0].abs() > 1e-5
        assert (slope[2, 1:] == 0).all()  # its image is one token: there is nothing to step over
        assert (slope[[1, 3, 4, 5, 6, 7]] == 0).all()
        for row, column in ((0, 0), (0, 1), (0, 2), (2, 0)):
            with torch.no_grad():
                values = []
                for step in (2e-3, -2e-3):
                    guidance.log_table[row, column] += step
                    values.append(value().item())
                    guidance.log_table[row, column] -= step
            assert slope[row, column].item() == pytest.approx((values[0] - values[1]) / 4e-3, rel=0.05, abs=2e-3)
    assert not any("table" in name for name, _ in model.named_parameters())


def test_a_copy_of_an_attached_model_counts_on_its_own(vlm_folder: Callable):
    model = load(vlm_folder, "qwen2_vl")
    batch = batch_of(model, PLANS["padded"])
    with attach(model, Guidance("fixed", gap=3)), torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(**batch).logits, model(**batch).logits)


def test_settings_rebuild_the_guidance():
    for guidance in (
        Guidance("none"),
        Guidance("fixed", gap=1.5, row_step=0.25),
        Guidance("clip", table=TABLE, learnable=True),
    ):
        again = Guidance(**guidance.settings())
        assert again.settings().keys() == guidance.settings().keys()
        assert torch.allclose(again.table, guidance.table, rtol=1e-6)
        assert again.learnable == guidance.learnable


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Guidance("cubic"), "guidance 'cubic' is not known; choose none, fixed or clip"),  # type: ignore[arg-type]
        (lambda: Guidance("fixed", learnable=True), "guidance 'fixed' has no table"),
        (lambda: Guidance("clip", table=[[1, 1]] * 8), r"shape \(8, 2\); give 8 rows"),
        (lambda: Guidance("fixed", gap=0), "intervals must be numbers above 0"),
        (lambda: Guidance("fixed", row_step=float("nan")), "intervals must be numbers above 0"),
        (lambda: attach(torch.nn.Linear(1, 1), Guidance()), "Linear does not support guided positions"),
        (lambda: Guidance("clip"), "guidance 'clip' without a table is 'fixed'; give a table, set learnable"),
        (lambda: Guidance("clip", table=[[-0.1, 1, 1]] * 8, learnable=True), "earlier version .* trained again"),
        (lambda: place(Guidance("clip", table=TABLE)), "needs the modality probabilities of every image"),
        (
            lambda: place(Guidance("clip", table=TABLE), probabilities=torch.ones(2, 8) / 8),
            r"shape \(2, 8\) for 1 images",
        ),
        (lambda: place(Guidance("clip", table=TABLE), probabilities=torch.ones(1, 8)), "sum to 1"),
        (lambda: place(Guidance(), grid=[[1, 4, 4]]), "3 image placeholder tokens, but the image has 1 x 2 x 2"),
        (lambda: place(Guidance(), grid=[[1, 2, 2]]), "more image placeholders in the text than images"),
        (lambda: place(Guidance(), grid=[[1, 2, 6]] * 2), "more images than image placeholders"),
        (lambda: place(Guidance(), family="llava"), "not for 'llava'"),
    ],
)
def test_mistakes_are_named(call: Callable, message: str):
    with pytest.raises(UserError, match=message):
        call()


def place(guidance: Guidance, grid: Any = ((1, 2, 6),), family: str = "qwen2_vl", **more: Any) -> None:
    ids = torch.tensor([[TEXT, IMAGE, IMAGE, IMAGE, TEXT]])
    positions(configuration(family), guidance, ids, torch.tensor(grid), **more)


def test_clip_needs_no_probabilities_where_there_is_no_image():
    ids = torch.tensor([[TEXT, TEXT]])
    assert positions(configuration("qwen2_vl"), Guidance("clip", table=TABLE), ids)[0][0].tolist() == [[0, 1]]


def test_images_side_by_side_are_one_apart():
    ids = torch.tensor([[TEXT] + [IMAGE] * 3 + [TEXT]])
    found, _ = positions(configuration("qwen2_vl"), Guidance(gap=5), ids, torch.tensor([[1, 2, 4], [1, 2, 2]]))
    assert found[2, 0].tolist() == [0, 5, 6, 7, 12]
    assert len(MODALITIES) == 8


def test_no_step_takes_a_learnable_table_to_0():
    guidance = Guidance("clip", learnable=True)
    assert torch.allclose(guidance.table, torch.tensor([2.0, 1.0, 1.0]).expand(8, 3))
    optimizer = torch.optim.SGD(guidance.parameters(), lr=1e6)
    for _ in range(3):
        guidance.table.sum().backward()
        optimizer.step()
    assert (guidance.table > 0).all()
    assert (Guidance(**guidance.settings()).table > 0).all()
