"""The model as a whole: hidden states, generation, training modes, folders that load and save back byte for byte."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from preceptor.data.grounding.box_formats import find_boxes
from preceptor.data.types import Dialogue
from preceptor.errors import UserError
from preceptor.grounding.curriculum import confidence_and_margin
from preceptor.grounding.dialogue_encoder import IGNORED
from preceptor.grounding.guided_rope import FAMILIES, Guidance
from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.trained_weights import LoraSettings

TABLE = [[1.5 + 0.1 * i, 0.5 + 0.05 * i, 1.2 - 0.1 * i] for i in range(8)]


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> list[Dialogue]:
    """Several turns or one, several images, one or none, of different sizes."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = []
    for number, (width, height) in enumerate([(60, 40), (90, 30), (32, 100)]):
        paths.append(folder / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    box = "It is at <|box_start|>(120,345),(567,890)<|box_end|>"
    return [
        Dialogue("a", tuple(paths[:2]), (("Where is the liver?", box), ("Large?", "No.")), "vg", "ct", "g", "train"),
        Dialogue("b", (), (("What modality is shown?", "A CT of the abdomen."),), "mia", "mr", "h", "train"),
        Dialogue("c", (paths[2],), (("Is the heart enlarged?", "No."),), "mia", "x", "i", "train"),
    ]


GUIDANCES = {
    "none": lambda: Guidance("none"),
    "fractional": lambda: Guidance("fixed", gap=2.5, row_step=0.6),
    "clip": lambda: Guidance("clip", table=TABLE),
    "learnable": lambda: Guidance("clip", table=TABLE, learnable=True),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", GUIDANCES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_give_the_models_own_logits(
    family: Any, kind: str, side: Any, vlm_folder: Callable, dialogues: list[Dialogue]
):
    """Against each row alone through the whole model, without padding; upstream's own positions where unguided."""
    vlm = GroundedVlm.load(vlm_folder(family), guidance=GUIDANCES[kind]()).eval()
    rows = [vlm.encoder.encode(d) for d in dialogues]
    with torch.no_grad():
        found = vlm(vlm.encoder.collate(rows, side))
        logits = found.hidden @ vlm.lm_head_weight.T
        assert found.targets.tolist() == [t for row in rows for t in row.labels.tolist() if t != IGNORED]
        assert found.rows.tolist() == [i for i, row in enumerate(rows) for t in row.labels.tolist() if t != IGNORED]
        done = 0
        for row in rows:
            batch = vlm.encoder.collate([row])
            labels, modalities = batch.pop("labels"), batch.pop("modalities", None)
            if kind == "none":
                whole = vlm.base(**batch, use_cache=False).logits[0]
            else:
                from preceptor.grounding.guided_rope import attach

                with attach(vlm.base, vlm.guidance, modalities):
                    whole = vlm.base(**batch, use_cache=False).logits[0]
            wanted = whole[:-1][labels[0, 1:] != IGNORED]
            assert torch.allclose(logits[done : done + len(wanted)], wanted, atol=2e-5)
            done += len(wanted)
        assert done == len(logits)


@pytest.mark.parametrize("kind", GUIDANCES)
def test_greedy_answers_of_a_batch_are_those_of_each_alone(kind: str, vlm_folder: Callable, dialogues: list[Dialogue]):
    vlm = GroundedVlm.load(vlm_folder("qwen2_vl"), guidance=GUIDANCES[kind]())
    together = vlm.generate(dialogues, max_new_tokens=6, with_confidence=True)
    alone = [vlm.generate([d], max_new_tokens=6)[0] for d in dialogues]
    assert [a[0].tokens for a in together] == [a[0].tokens for a in alone]
    assert [len(a) for a in together] == [1, 1, 1]
    assert alone[0][0].confidence is None
    # Teacher-forced: the greedy token is the arg-max of the hidden states' logits, and its with_confidence as defined.
    for dialogue, (answer,) in zip(dialogues, together, strict=True):
        row = vlm.encoder.encode(dialogue, prompt=True)
        said = torch.tensor(answer.tokens)
        labels = torch.cat([torch.full_like(row.labels, IGNORED), said])
        row = replace(row, input_ids=torch.cat([row.input_ids, said]), labels=labels)
        with torch.no_grad():
            logits = (vlm(vlm.encoder.collate([row])).hidden @ vlm.lm_head_weight.T)[None]
        assert torch.equal(logits[0].argmax(-1), said)
        confidence, margin = confidence_and_margin(logits, torch.ones(1, len(said), dtype=torch.bool))
        assert answer.confidence == pytest.approx(confidence.item(), abs=1e-5)
        assert answer.margin == pytest.approx(margin.item(), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_candidates_follow_the_models_distribution(
    family: Any, vlm_folder: Callable, dialogues: list[Dialogue]
):
    """First tokens of 300 samples at temperature 2 against the softmax, for a row with two images beside one with one:
    candidates must see their own row's images."""
    vlm = GroundedVlm.load(vlm_folder(family), guidance=GUIDANCES["clip"]()).eval()
    with torch.no_grad():
        vlm.lm_head_weight.mul_(8)  # so that a word is likelier than another
    pair = [dialogues[0], dialogues[2]]
    answers = vlm.generate(pair, candidates=150, temperature=2.0, max_new_tokens=1, seed=3)
    for dialogue, row in zip(pair, answers, strict=True):
        prompt = vlm.encoder.encode(dialogue, prompt=True)
        forced = replace(
            prompt,
            input_ids=torch.cat([prompt.input_ids, torch.tensor([1])]),
            labels=torch.cat([torch.full_like(prompt.labels, IGNORED), torch.tensor([1])]),
        )
        with torch.no_grad():
            wanted = (vlm(vlm.encoder.collate([forced])).hidden[0] @ vlm.lm_head_weight.T / 2).softmax(-1)
        drawn = torch.bincount(torch.tensor([a.tokens[0] for a in row]), minlength=len(wanted)) / 150
        # Total variation of 150 draws: its mean is at most sum(sqrt(p / (2 pi n))) for small p.
        limit = 2.0 * float((wanted * (1 - wanted) / (2 * torch.pi * 150)).sqrt().sum())
        assert 0.5 * (drawn - wanted).abs().sum().item() < limit


def test_candidates_of_rows_with_several_images_are_the_rows_own(vlm_folder: Callable, dialogues: list[Dialogue]):
    """At a temperature near 0 every candidate is the greedy answer: positions and images went to the right row."""
    vlm = GroundedVlm.load(vlm_folder("qwen2_vl"), guidance=GUIDANCES["clip"]())
    greedy = vlm.generate(dialogues, max_new_tokens=6)
    cold = vlm.generate(dialogues, candidates=3, temperature=1e-6, max_new_tokens=6)
    assert [[a.tokens for a in row] for row in cold] == [[row[0].tokens] * 3 for row in greedy]


def test_the_checkpoints_own_decoding_does_not_enter(vlm_folder: Callable, dialogues: list[Dialogue]):
    """Qwen2-VL's says repetition_penalty 1.05, top_k 1, top_p 0.001, temperature 0.1: samples would be greedy."""
    from transformers import GenerationConfig

    vlm = GroundedVlm.load(vlm_folder("qwen2_vl"))
    options: list[dict[str, Any]] = [{}, {"candidates": 3, "temperature": 1.0, "seed": 1}]
    before = [vlm.generate(dialogues, max_new_tokens=8, **more) for more in options]
    own = vlm.base.generation_config
    vlm.base.generation_config = GenerationConfig(
        eos_token_id=own.eos_token_id, do_sample=True, repetition_penalty=5.0, top_k=1, top_p=0.001, temperature=0.1
    )
    assert [vlm.generate(dialogues, max_new_tokens=8, **more) for more in options] == before
    assert len({answer.tokens for answer in before[1][0]}) == 3


def test_a_seed_gives_the_same_samples_and_leaves_torchs_own_alone(vlm_folder: Callable, dialogues: list[Dialogue]):
    vlm = GroundedVlm.load(vlm_folder("qwen2_vl"))
    state = torch.random.get_rng_state()
    first, second, other = (
        vlm.generate(dialogues, candidates=2, temperature=1.0, max_new_tokens=6, seed=seed) for seed in (3, 3, 4)
    )
    assert first == second != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_answer_ends_with_its_mark_and_keeps_its_boxes(vlm_folder: Callable, dialogues: list[Dialogue]):
    """A few steps of plain training on one dialogue: it is then said by heart."""
    vlm = GroundedVlm.load(vlm_folder("qwen2_vl"), guidance=Guidance("fixed")).train()
    wanted = replace(dialogues[0], turns=dialogues[0].turns[:1])
    batch = vlm.encoder.collate([vlm.encoder.encode(wanted)])
    optimizer = torch.optim.AdamW(vlm.parameters(), lr=3e-3)
    for _ in range(70):
        found = vlm(batch)
        loss = torch.nn.functional.cross_entropy(found.hidden @ vlm.lm_head_weight.T, found.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    ((answer,),) = vlm.generate(
        [replace(wanted, turns=((wanted.turns[0][0], ""),))], max_new_tokens=60, with_confidence=True
    )
    assert answer.text == wanted.turns[0][1]
    assert answer.ended
    assert answer.confidence is not None
    assert answer.confidence > 0.8
    assert vlm.training
    ((cut,),) = vlm.generate([wanted], max_new_tokens=4)
    assert not cut.ended
    assert len(cut.tokens) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_what_each_kind_of_training_trains(family: Any, vlm_folder: Callable, dialogues: list[Dialogue]):
    folder = vlm_folder(family)
    for training in ("full", "frozen_vision", "lora"):
        vlm = GroundedVlm.load(folder, training=training, lora=LoraSettings(rank=4, alpha=8, dropout=0)).train()
        vlm.checkpoint_activations()
        batch = vlm.encoder.collate([vlm.encoder.encode(d) for d in dialogues])
        found = vlm(batch)
        torch.nn.functional.cross_entropy(found.hidden @ vlm.lm_head_weight.T, found.targets).backward()
        moved = {name for name, p in vlm.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        learns = {name for name, p in vlm.named_parameters() if p.requires_grad}
        vision = {name for name, _ in vlm.named_parameters() if ".visual." in name}
        merger = {name for name in learns if ".visual.merger." in name and family == "qwen2_vl_dinov2"}
        assert len(merger) == (6 if family == "qwen2_vl_dinov2" else 0)
        if training == "full":
            assert learns == {name for name, _ in vlm.named_parameters()}
            assert {n for n in moved if ".visual." in n}
        elif training == "frozen_vision":
            assert learns - merger == {name for name, _ in vlm.named_parameters()} - vision
            assert moved & vision == merger
        else:
            assert learns - merger == {name for name, _ in vlm.named_parameters() if "lora_" in name}
            assert all(".language_model." in name for name in learns - merger)
            layers = vlm.config.text_config.num_hidden_layers
            assert len(learns - merger) == 2 * 7 * layers
            assert {name for name in learns if "lora_B" in name} <= moved  # A learns once B is not 0 any more
            assert moved & vision == merger


def test_activations_computed_again_give_the_same_gradients(vlm_folder: Callable, dialogues: list[Dialogue]):
    slopes = []
    for again in (False, True):
        vlm = GroundedVlm.load(vlm_folder("qwen2_vl"), guidance=GUIDANCES["learnable"]()).train()
        if again:
            vlm.checkpoint_activations()
        found = vlm(vlm.encoder.collate([vlm.encoder.encode(d) for d in dialogues]))
        torch.nn.functional.cross_entropy(found.hidden @ vlm.lm_head_weight.T, found.targets).backward()
        slopes.append({name: p.grad for name, p in vlm.named_parameters()})
    assert slopes[0].keys() == slopes[1].keys()
    assert "guidance.log_table" in slopes[0]
    assert slopes[0]["guidance.log_table"].abs().sum() > 0
    for name, slope in slopes[0].items():
        assert torch.allclose(slope, slopes[1][name], atol=1e-6), name


# --- folders --------------------------------------------------------------------------------------------------------


def as_published(folder: Path, target: Path, family: str, *, tied: bool, dtype: torch.dtype, shards: int) -> None:
    """Write a checkpoint in the layout that the hub's have: names, flat configuration, shards, old template file.

    Qwen2-VL and Qwen2.5-VL: `visual.*`, `model.layers.*`, `lm_head.weight` unless tied, the text's configuration at the
    top. Qwen3-VL: `model.visual.*`, `model.language_model.*`, the text's configuration in its place.
    """
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    renamed = {}
    for name, value in weights.items():
        plain = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        if family == "qwen3_vl":
            plain = plain.replace("model.", "model.language_model.").replace("visual.", "model.visual.")
        renamed[plain] = value.to(dtype)
    if not tied:
        words = next(value for name, value in renamed.items() if "embed_tokens" in name)
        renamed["lm_head.weight"] = torch.randn_like(words.float()).to(dtype)
    text = config.pop("text_config")
    text.pop("model_type")
    rope = text.pop("rope_parameters")
    sections = {"mrope_section": rope["mrope_section"]}
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", **sections}}
    if family == "qwen3_vl":
        text["rope_scaling"] = {"rope_type": "default", "mrope_interleaved": True, **sections}
        config["text_config"] = text | {"model_type": "qwen3_vl_text"}
    else:
        config |= text
    config |= {"tie_word_embeddings": tied, "torch_dtype": str(dtype).removeprefix("torch.")}
    config.pop("dtype", None)
    (target / "config.json").write_text(json.dumps(config))
    names = sorted(renamed)
    index = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: renamed[name].contiguous() for name in names[number::shards]}
        save_file(part, target / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"):
        (target / name).write_bytes((folder / name).read_bytes())
    (target / "chat_template.json").write_text(
        json.dumps({"chat_template": (folder / "chat_template.jinja").read_text()})
    )
    (target / "video_preprocessor_config.json").write_text('{"video_processor_type": "Qwen2VLVideoProcessor"}')


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_published_checkpoint_is_saved_back_byte_for_byte(
    family: Any, tied: bool, dtype: torch.dtype, vlm_folder: Callable, tmp_path: Path, dialogues: list[Dialogue]
):
    published, saved = tmp_path / "published", tmp_path / "saved"
    as_published(vlm_folder(family), published, family, tied=tied, dtype=dtype, shards=2)
    vlm = GroundedVlm.load(published, guidance=Guidance("fixed", gap=1.5))
    assert vlm.lm_head_weight.dtype == dtype
    assert (vlm.lm_head_weight is vlm.base.get_input_embeddings().weight) == tied
    vlm.save(saved)
    before, after = tensors(published), tensors(saved)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype == dtype
        assert torch.equal(after[name].view(torch.uint8), value.view(torch.uint8)), name
    assert (saved / "video_preprocessor_config.json").is_file()
    again = GroundedVlm.load(saved)
    assert again.guidance.settings() == vlm.guidance.settings()
    said, said_again = (m.generate(dialogues, max_new_tokens=5) for m in (vlm, again))
    assert said == said_again


def test_a_saved_folder_loads_without_us(vlm_folder: Callable, tmp_path: Path, dialogues: list[Dialogue]):
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    vlm = GroundedVlm.load(vlm_folder("qwen3_vl"), max_pixels=64 * 64)
    vlm.save(tmp_path / "saved")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    weights = vlm.base.state_dict()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert AutoImageProcessor.from_pretrained(tmp_path / "saved").size["longest_edge"] == 64 * 64
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == vlm.encoder.tokenizer.chat_template


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_merged_into_what_is_saved(
    family: Any, vlm_folder: Callable, tmp_path: Path, dialogues: list[Dialogue]
):
    vlm = GroundedVlm.load(vlm_folder(family), training="lora", lora=LoraSettings(rank=4, alpha=8, dropout=0)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in vlm.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    before = {name: value.clone() for name, value in vlm.state_dict().items()}
    vlm.save(tmp_path / "merged")
    assert all(torch.equal(value, before[name]) for name, value in vlm.state_dict().items())  # the model itself is not
    assert tensors(tmp_path / "merged").keys() == tensors(vlm_folder(family)).keys()
    batch = vlm.encoder.collate([vlm.encoder.encode(d) for d in dialogues])
    with torch.no_grad():
        want = vlm(batch).hidden
        plain = GroundedVlm.load(vlm_folder(family)).eval()(batch).hidden
        merged = GroundedVlm.load(tmp_path / "merged").eval()(batch).hidden
        assert torch.allclose(merged, want, atol=1e-4)
        assert not torch.allclose(plain, want, atol=1e-2)

    vlm.save(tmp_path / "adapter", adapter=True)
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    base = AutoModelForImageTextToText.from_pretrained(vlm_folder(family))
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").get_base_model().eval()
    plain = GroundedVlm(adapted, vlm.encoder, Guidance("none")).eval()
    with torch.no_grad():
        assert torch.allclose(plain(batch).hidden, want, atol=1e-6)


def test_a_copy_is_a_model_of_its_own(vlm_folder: Callable, dialogues: list[Dialogue]):
    """A moving-average teacher is a copy: what the student's table learns must not reach it."""
    vlm = GroundedVlm.load(vlm_folder("qwen2_vl"), guidance=GUIDANCES["learnable"]())
    twin = copy.deepcopy(vlm)
    batch = vlm.encoder.collate([vlm.encoder.encode(d) for d in dialogues])
    with torch.no_grad():
        before, said = twin(batch).hidden, twin.generate(dialogues, max_new_tokens=5)
        vlm.guidance.log_table += 1
        for p in vlm.base.parameters():
            p += 0.01
        assert torch.equal(twin(batch).hidden, before)
        assert twin.generate(dialogues, max_new_tokens=5) == said


# --- mistakes -------------------------------------------------------------------------------------------------------


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | changes))

    return change


def _drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_without("config.json"), "is neither a folder with a config.json nor in the local hub cache"),
        (_edit("config.json", model_type="bert"), "is a model of type 'bert'; give one of qwen2_vl"),
        (_without("preprocessor_config.json"), "an image processor .* cannot be read"),
        (_no_tokenizer, "token"),
        (_edit("config.json", image_token_id=1), "has another id for it than config.json"),
        (_edit("preprocessor_config.json", patch_size=16), "has patch_size=16, but its config.json has 14"),
        (_drop_weight, r"do not match config.json: model.language_model.norm.weight"),
        (_without("model.safetensors"), "the weights cannot be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "the weights cannot be read"),
    ],
)
def test_faults_of_a_folder_are_named(fault: Callable, message: str, vlm_folder: Callable, tmp_path: Path):
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in vlm_folder("qwen2_vl").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    fault(folder)
    with pytest.raises(UserError, match=message):
        GroundedVlm.load(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"training": "half"}, "training 'half' is not known"),
        ({"max_pixels": 100}, "max_pixels=100 is less than one image token"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str, vlm_folder: Callable):
    with pytest.raises(UserError, match=message):
        GroundedVlm.load(vlm_folder("qwen2_vl"), **options)


def test_several_greedy_candidates_are_refused(vlm_folder: Callable, dialogues: list[Dialogue]):
    vlm = GroundedVlm.load(vlm_folder("qwen2_vl"))
    with pytest.raises(UserError, match="candidates=3 at temperature=0"):
        vlm.generate(dialogues, candidates=3)
    with pytest.raises(UserError, match="no adapters to save"):
        vlm.save(vlm_folder("qwen2_vl"), adapter=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_keeps_the_format_of_its_boxes(family, vlm_folder, tmp_path):
    vlm = GroundedVlm.load(vlm_folder(family))
    formats = {
        "qwen2_vl_dinov2": "qwen2-vl",
        "qwen2_vl": "qwen2-vl",
        "qwen2_5_vl": "qwen2.5-vl",
        "qwen3_vl": "qwen3-vl",
    }
    assert vlm.encoder.box_format == formats[family]
    GroundedVlm.load(vlm_folder(family), box_format="gemma").save(tmp_path / "saved")
    assert GroundedVlm.load(tmp_path / "saved").encoder.box_format == "gemma"
    (tmp_path / "saved" / "box_format.json").unlink()  # as earlier versions saved it: trained in thousandths
    assert GroundedVlm.load(tmp_path / "saved").encoder.box_format == "qwen2-vl"


def test_generated_boxes_are_in_thousandths(vlm_folder, dialogues, monkeypatch):
    vlm = GroundedVlm.load(vlm_folder("qwen2_5_vl"))
    row = replace(dialogues[0], images=dialogues[0].images[:1])
    width, height = vlm.encoder.encode(row, prompt=True).box_size
    text = json.dumps([{"bbox_2d": [0, height // 2, width, height], "label": "liver"}])
    monkeypatch.setattr(vlm.encoder, "decode", lambda ids: text)
    ((answer,),) = vlm.generate([row], max_new_tokens=2)
    (found,) = find_boxes(answer.text)
    assert found.box == pytest.approx((0, 500, 1000, 1000), abs=1)
