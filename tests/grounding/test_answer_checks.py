"""Reasons against an answer of a teacher: what is refused, and that no true answer of real data is."""

# ruff: noqa: RUF001 - punctuation of other languages

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from preceptor.data.grounding.box_formats import write_box
from preceptor.data.grounding.slake import read_slake_grounding
from preceptor.grounding.answer_checks import asks_for_box, first, same_answers, unusable
from preceptor.grounding.answer_profile import AnswerProfile, closed_language

BOX = write_box((100, 200, 300, 400))
EN, ZH = "Which organ is abnormal in this image?", "图中哪个器官异常？"
WHERE = "Where is the liver? Answer with boxes."

REFUSALS = [
    (EN, "I'm sorry, but I can't help with that."),
    (EN, "I’m sorry, I can’t provide a diagnosis."),
    (EN, "Sorry, this is not possible."),
    (EN, "As an AI language model, I do not have the ability to read scans."),
    (EN, "As a large language model trained by Acme, I cannot interpret medical images."),
    (EN, "I am not a doctor, but it may be the liver."),
    (EN, "I cannot provide medical advice."),
    (EN, "Unfortunately, I'm unable to view images."),
    (EN, "I am not able to analyze medical images."),
    (EN, "We are unable to assist with this request."),
    (EN, "It is the liver. Please consult a qualified healthcare professional."),
    (EN, "No image was provided. Please upload the scan."),
    (EN, "I don't see any image in our conversation."),
    (EN, "That request violates our content policy."),
    (EN, "I must decline to answer."),
    (ZH, "很抱歉，我无法回答这个问题。"),
    (ZH, "对不起，我不能提供医疗建议。"),
    (ZH, "作为一个人工智能助手，我不能诊断疾病。"),
    (ZH, "我无法查看图像。"),
    (ZH, "建议您咨询专业医生。"),
    (ZH, "請諮詢醫師。"),
    (EN, "Es tut mir leid, ich kann diese Frage nicht beantworten."),
    (EN, "Je suis désolé, je ne peux pas répondre."),
    (EN, "Lo siento, no puedo ayudar con eso."),
    (EN, "Desculpe, não posso ajudar."),
    (EN, "Mi dispiace, non posso rispondere."),
]
REASONING = [
    "<think>The image shows",
    "<think>It is a CT.</think>Liver",
    "</think>\n\nLiver",
    "<thinking>hm</thinking> liver",
    "<reasoning>\nliver",
    "◁think▷The organ◁/think▷liver",
    "[THINK]The organ[/THINK]liver",
    "<|channel|>analysis<|message|>The organ",
    "<|begin_of_thought|>The organ",
    "Okay, let's see. The organ may be the liver.",
    "The user is asking about an organ, so the liver.",
]
ERRORS = [
    '{"error": {"message": "model overloaded", "code": 503}}',
    '{"detail": "Not Found"}',
    '{"object": "error", "message": "too long"}',
    "<!DOCTYPE html><html><body>502</body></html>",
    "<html><head><title>504 Gateway Time-out</title></head></html>",
    "502 Bad Gateway",
    "Internal Server Error",
    "Error code: 429",
    "Traceback (most recent call last):\n  File",
    "RuntimeError: CUDA error",
]
TOKENS = [
    "<|im_start|>liver",
    "liver <image>",
    "<pad><pad>",
    "[INST] liver",
    "<|vision_start|>liver",
    "assistant\nLiver",
]
REPEATED = [
    "the liver the liver the liver the liver the liver the liver",
    "no no no no no no no no",
    "肝脏肝脏肝脏肝脏肝脏肝脏",
    "It is large. It is large. It is large. It is large. It is large.",
    "liver!!!!!!!!!!!!!!!!",
    BOX * 4,
]
OTHER_LANGUAGE = [
    (EN, "肝脏"),
    (EN, "异常的器官是肝脏。"),
    (EN, "Печень увеличена"),
    (EN, "간이 커져 있습니다"),
    (ZH, "The liver"),
    (ZH, "liver"),
    (ZH, "Yes, it is abnormal."),
]
CASES = (
    [(question, text, "refusal") for question, text in REFUSALS]
    + [(EN, text, "reasoning") for text in REASONING]
    + [(EN, text, "error text") for text in ERRORS]
    + [(EN, text, "special tokens") for text in TOKENS]
    + [(EN, text, "repeated text") for text in REPEATED]
    + [(question, text, "wrong language") for question, text in OTHER_LANGUAGE]
    + [(EN, text, "empty") for text in ("", " \n", "...", "?")]
    + [(EN, f"{EN} The liver.", "echo of the question"), (ZH, ZH, "echo of the question")]
)


@pytest.mark.parametrize(("question", "answer", "reason"), CASES)
def test_what_is_not_an_answer_is_refused_for_its_reason(question, answer, reason):
    assert first(unusable(question, answer)) == reason


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (EN, "liver"),
        (EN, "No abnormality."),
        (EN, "It cannot be determined from this image."),
        (EN, "Not visible"),
        (EN, "I do not see a fracture."),
        (EN, "no"),
        (EN, "The lesion is 2.5 cm (T2, FLAIR), grade III/IV; see arrow."),
        (EN, "pT2 N0 M0 with α-fetoprotein"),
        (EN, "left, left, right"),
        ("Is there a mass or a cyst?", "A mass"),
        (EN, "Clinical correlation is recommended."),
        (ZH, "肝脏"),
        (ZH, "无法确定"),
        (ZH, "不能"),
        (ZH, "X光"),
        (ZH, "CT"),
        (ZH, "mri"),
        (EN, "Chiari type I cannot be excluded."),
        (ZH, "T2加权像 MRI"),
        (WHERE, f"<|object_ref_start|>liver<|object_ref_end|>{BOX}"),
        (WHERE, f"The liver is at {BOX} and {write_box((1, 2, 30, 40))}."),
    ],
)
def test_an_answer_passes(question, answer):
    assert unusable(question, answer, wants_box=asks_for_box(question)) == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("in the upper left", "no box"),
        (write_box((100, 200, 1480, 900)), "box outside the image"),
        ("<|box_start|>(-5,0),(10,10)<|box_end|>", "box outside the image"),
        (write_box((300, 200, 100, 400)), "unreadable box"),
        (write_box((300, 200, 300, 400)), "unreadable box"),
        ("<|box_start|>(1,2),(3<|box_end|>", "unreadable box"),
    ],
)
def test_boxes_are_checked(answer, reason):
    assert first(unusable(WHERE, answer, wants_box=True)) == reason


def test_one_box_is_one():
    two = BOX + write_box((1, 2, 30, 40))
    assert first(unusable("Where is it? Give a single box.", two, wants_box=True)) == "more boxes than asked for"
    assert unusable("Where is it? Answer with boxes.", two, wants_box=True) == []


def test_an_answer_that_was_cut_off_or_repeats_the_system_prompt():
    assert first(unusable(EN, "The liver is", ended=False)) == "cut off"
    prompt = "Write a box as (x1,y1),(x2,y2) in thousandths."
    assert first(unusable(EN, f"Sure: {prompt}", system_prompt=prompt)) == "echo of the question"


def test_which_questions_are_answered_with_boxes():
    assert asks_for_box(WHERE)
    assert asks_for_box("请用方框回答。")
    assert asks_for_box("Find the liver.", task="vg")
    assert not asks_for_box("What is shown?", task="vg", alone=False)
    assert not asks_for_box("Where is it?", truth="on the left", task="vg")
    assert asks_for_box("Where is it?", truth=BOX)
    assert not asks_for_box(f"What is in the region {BOX}?")


def test_a_teacher_that_always_gives_one_answer():
    questions = [f"What is at place {i}?" for i in range(30)]
    always = [(str(i), question, "This is a CT of the abdomen.") for i, question in enumerate(questions)]
    assert len(same_answers(always)) == 30
    # One question about all images may have one answer, "no" may be right, and half is not most.
    assert same_answers([(key, "What is shown?", answer) for key, _, answer in always]) == set()
    assert same_answers([(key, question, "no") for key, question, _ in always]) == set()
    assert same_answers([(key, question, "No, it is not visible.") for key, question, _ in always]) == set()
    assert len(same_answers([(key, "Where is it?", BOX) for key, *_ in always])) == 30
    half = [(key, q, answer if int(key) % 2 else f"{answer} {key} more") for key, q, answer in always]
    assert same_answers(half) == set()
    assert same_answers([(key, question, BOX) for key, question, _ in always]) == {key for key, *_ in always}


@pytest.mark.real_data
def test_no_true_answer_of_real_data_is_refused():
    root = Path(os.environ["PRECEPTOR_DATA"])
    pairs = []
    for name in ("train", "validate", "test"):
        rows = json.loads((root / "slake" / f"{name}.json").read_text("utf-8"))
        pairs += [("slake", row["question"], row["answer"], "") for row in rows]
    rows = json.loads((root / "vqa_rad" / "VQA_RAD Dataset Public.json").read_text("utf-8"))
    pairs += [("vqa-rad", row["question"], str(row["answer"]), "") for row in rows]
    for file in sorted((root / "vqa_med_2019").glob("*/All_QA*.txt")):
        for line in file.read_text("utf-8").splitlines():
            _, question, answers = line.split("|")
            pairs += [("vqa-med-2019", question, answer, "") for answer in answers.split("#")]
    for language in ("en", "zh"):
        for dialogue in read_slake_grounding(root / "slake", language=language).samples:
            pairs += [(dialogue.task, question, answer, dialogue.task) for question, answer in dialogue.turns]
    pairs = [pair for pair in pairs if pair[2].strip()]  # one answer of SLAKE is empty
    assert Counter(name for name, *_ in pairs)["vqa-med-2019"] > 14_000
    profile = AnswerProfile.of((question, answer) for _, question, answer, _ in pairs)
    assert set(profile.closed) == {"en", "zh"}
    refused = [
        (name, question, answer, reasons)
        for name, question, answer, task in pairs
        for known in (None, profile)
        if (reasons := unusable(question, answer, wants_box=asks_for_box(question, answer, task), profile=known))
    ]
    assert refused == []
    # Answers of SLAKE whose own kind is not among the examples pass, too.
    seen, others = ([pair for i, pair in enumerate(pairs) if i % 2 == k and pair[0] != "vqa-rad"] for k in (0, 1))
    half = AnswerProfile.of((question, answer) for _, question, answer, _ in seen)
    refused = [
        (question, answer)
        for _, question, answer, task in others
        if unusable(question, answer, wants_box=asks_for_box(question, answer, task), profile=half)
    ]
    assert refused == []
    keyed = [(str(i), question, answer) for i, (_, question, answer, _) in enumerate(pairs)]
    assert same_answers(keyed) == set()
    # Without the answers, boxes are expected for the questions whose answers are boxes, and for no others.
    assert [pair for pair in pairs if asks_for_box(pair[1], "", pair[3]) != (pair[0] == "vg")] == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("Unfortunately, I am not in a position to interpret medical images.", "refusal"),
        ("It is not possible for me to analyze medical images.", "refusal"),
        ("Analyzing medical images is beyond my capabilities.", "refusal"),
        ("There is no image attached to your message.", "refusal"),
        ("It looks like you forgot to attach the picture.", "refusal"),
        ("I would recommend having this looked at by a qualified radiologist.", "refusal"),
        ("My guidelines prevent me from answering.", "refusal"),
        ("Leider kann ich dabei nicht helfen.", "refusal"),
        ("Non sono in grado di aiutarti.", "refusal"),
        ("Het spijt me, ik kan hier niet mee helpen.", "refusal"),
        ("Maaf, saya tidak bisa membantu.", "refusal"),
        ("Thought: look. Final answer: yes", "reasoning"),
        ('{"answer": "yes"}', "wrapped answer"),
        ("```\nyes\n```", "wrapped answer"),
        ('<tool_call>{"name": "zoom"}</tool_call>', "wrapped answer"),
        ("functions.zoom({})", "wrapped answer"),
        ("\\boxed{yes}", "wrapped answer"),
        ("Question: is it?\nAnswer: yes", "wrapped answer"),
        ("N/A", "placeholder"),
        ("yes/no", "placeholder"),
        ("[Your answer here]", "placeholder"),
        ("\ufffd\ufffd lung", "special tokens"),
        ("You exceeded your current quota", "error text"),
    ],
)
def test_more_answers_that_are_none(answer, reason):
    assert reason in unusable("Is there a pneumothorax?", answer)


@pytest.mark.parametrize(
    "answer",
    [
        *("I don't think so.", "I cannot exclude a small pneumothorax.", "We cannot rule out a pneumothorax."),
        *(
            "The image is not provided with contrast.",
            "The lungs are unable to give off air.",
            "**Yes**",
            "Answer: yes",
        ),
        *("Contact a healthcare professional", "None", "1. liver\n2. spleen", "Unknown", "I won't exclude it"),
    ],
)
def test_more_answers_that_are_usable(answer):
    assert unusable("Is there a pneumothorax?", answer) == []


CLOSED, CLOSED_ZH = "Is the liver normal?", "图中肝脏正常吗？"
OWN = AnswerProfile.of(
    [
        *((f"Is there a {thing} in the image?", answer) for thing in ("mass", "cyst") for answer in ("Yes", "No")),
        *((f"图中有没有{thing}？", answer) for thing in ("肿块", "囊肿") for answer in ("有", "没有")),
        ("Which organ is abnormal?", "liver"),
        ("哪个器官异常？", "肝脏"),
    ]
)
"""Own answers of a data set in two languages."""
UNLABELLED = AnswerProfile.of([("Is there a mass in the image?", ""), ("Which organ is abnormal?", "")])
BY_PROFILE = [
    *((CLOSED, text, "wrong language") for text in ("Oui.", "Ja", "Sí.", "Non, pas du tout", "Sì, è normale")),
    *((CLOSED, text, "no answer to a closed question") for text in ("The liver is normal.", BOX, "normal liver", "CT")),
    *((CLOSED_ZH, text, "no answer to a closed question") for text in ("这个肝脏是正常的", BOX)),
    (CLOSED_ZH, "Yes", "no answer to a closed question"),
    *((EN, text, "wrong language") for text in ("Le foie.", "Die Leber ist vergrößert.", "El hígado", "hígado")),
    *((EN, text, "wrong language") for text in ("Il fegato è anormale", "O fígado está aumentado", "Het is de lever")),
    *((EN, text, "choice letter") for text in ("B", "(B)", "c.", "Option C", "The answer is A.")),
    *((EN, text, "undecided") for text in ("Unknown", "It cannot be determined from this image.", "Not sure.")),
    *((EN, text, "undecided") for text in ("Unable to determine.", "It's impossible to tell.", "Insufficient data")),
    *((ZH, text, "undecided") for text in ("无法从图像中判断", "不确定")),
]


@pytest.mark.parametrize("profile", [OWN, UNLABELLED], ids=["labelled", "unlabelled"])
@pytest.mark.parametrize(("question", "answer", "reason"), BY_PROFILE)
def test_answers_unlike_those_of_the_data_are_refused(question, answer, reason, profile):
    assert first(unusable(question, answer, profile=profile)) == reason


@pytest.mark.parametrize("profile", [OWN, UNLABELLED], ids=["labelled", "unlabelled"])
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        *((CLOSED, text) for text in ("Yes", "no.", "**Yes**", "Yes, it is normal.", "No: it is enlarged.")),
        *((CLOSED_ZH, text) for text in ("正常", "是的", "不正常", "没有")),
        *((EN, text) for text in ("Le Fort II fracture", "cri du chat", "LA enlarged", "de Quervain tenosynovitis")),
        *(
            (EN, text)
            for text in ("3 cm", "2.5 x 3 mm, 12 HU", "<1 cm", "Hepatitis B", "Ménière disease", "pes planus")
        ),
        (EN, "diffuse glioma (H3K27M status unknown)"),
        ("Is it a CT or an MRI?", "CT"),
        ("Can you describe the image?", "A CT of the abdomen"),
        ("Is there a mass? Where?", "In the liver"),
        ("Y a-t-il une masse dans l'image ?", "Oui."),
        ("Quel organe est anormal dans l'image ?", "Le foie est anormal."),
    ],
)
def test_answers_in_the_language_of_the_question_pass(question, answer, profile):
    assert unusable(question, answer, profile=profile) == []


def test_what_the_data_answer_themselves_is_an_answer():
    own = AnswerProfile.of([(EN, "unknown"), (EN, "not seen"), (EN, "B"), *((CLOSED, "not seen") for _ in range(2))])
    for answer in ("unknown", "It cannot be determined.", "not seen", "B", "A"):
        assert unusable(EN, answer, profile=own) == []
    sentences = AnswerProfile.of([(CLOSED, f"The liver number {i} is normal.") for i in range(5)])
    assert unusable(CLOSED, "The liver is normal.", profile=sentences) == []


def test_more_boxes_than_the_data_ever_have():
    one = AnswerProfile.of([(WHERE, write_box((i, 2, 300, 400))) for i in range(5)])
    two = BOX + write_box((1, 2, 30, 40))
    assert first(unusable(WHERE, two, wants_box=True, profile=one)) == "more boxes than asked for"
    assert first(unusable(WHERE, two, wants_box=True, truth=BOX)) == "more boxes than asked for"
    assert unusable(WHERE, two, wants_box=True, truth=two, profile=one) == []


def test_which_questions_are_closed():
    assert [closed_language(q) for q in (CLOSED, CLOSED_ZH, "The lungs: normal? Answer yes or no.")] == [
        "en",
        "zh",
        "en",
    ]
    for question in (
        EN,
        ZH,
        "Is it T1 or T2?",
        "Could you find it?",
        "Is it large, and how large?",
        "这是CT还是MRI吗？",
    ):
        assert closed_language(question) is None


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        *(("The liver. My apologies for the delay.", "refusal"), ("It is, sorry to say, the liver", "refusal")),
        *(("不好意思，我看不到图片", "refusal"), ("我是一个AI助手", "refusal"), ("很遗憾，无法识别该图像", "refusal")),
        *(("<Thought>a</Thought>liver", "reasoning"), ("**Reasoning:** it is big", "reasoning")),
        *(("&lt;think&gt;it is big", "reasoning"), ("<think type='x'>big", "reasoning")),
        *(("Let's break this down. liver", "reasoning"), ("Final answer: liver", "wrapped answer")),
        *(("It is big.\n\n**Final Answer:** liver", "wrapped answer"), ("Sure:\n```\nliver\n```", "wrapped answer")),
        *(('Here it is: {"answer": "liver"}', "wrapped answer"), ("The organ is [organ name].", "placeholder")),
        *(("<your answer here>", "placeholder"), ("{{answer}}", "placeholder"), ("The answer is ____", "placeholder")),
        ("which organ is abnormal in this image", "echo of the question"),
    ],
)
def test_still_more_answers_that_are_none(answer, reason):
    assert reason in unusable(EN, answer)
