"""Check the answer of a teacher before it becomes a label: why is it unusable?

The rules are conservative: a true answer must never fail. They look for the marks of an answer that is not one
(refusals, reasoning, loops, the text of an error page), never for an answer that may be wrong. "No abnormality" is an
answer. What the data's own answers look like is known from their `AnswerProfile`: whether "cannot be determined" and
single letters are answers, how closed questions are answered, and in which language.
"""

# ruff: noqa: RUF001 - punctuation of other languages

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from preceptor.data.grounding.box_formats import find_boxes, without_boxes
from preceptor.data.grounding.boxes import validate_box
from preceptor.grounding.answer_profile import UNDECIDED, AnswerProfile, normalized
from preceptor.text_metrics import tokens

Reason = Literal[
    "error text",
    "empty",
    "reasoning",
    "cut off",
    "refusal",
    "special tokens",
    "wrapped answer",
    "placeholder",
    "repeated text",
    "echo of the question",
    "choice letter",
    "undecided",
    "wrong language",
    "no answer to a closed question",
    "no box",
    "unreadable box",
    "box outside the image",
    "more boxes than asked for",
    "samples disagree",
    "same answer to most questions",
]
"""Why an answer is unusable, in the order of precedence: an answer counts under the first one that applies."""

FIXES: dict[str, str] = {
    "error text": "look at the log of the server",
    "empty": "raise --max-tokens, and check the chat template of the server",
    "reasoning": "turn the model's reasoning off, or start the server with a reasoning parser",
    "cut off": "raise --max-tokens",
    "refusal": "use a teacher that answers medical questions, or another --system-prompt",
    "special tokens": "check the chat template of the server",
    "wrapped answer": "ask for plain text with --system-prompt",
    "placeholder": "use another --system-prompt",
    "repeated text": "use a stronger teacher, or a --temperature above 0",
    "echo of the question": "check the chat template of the server",
    "choice letter": "ask for the text of the answer with --system-prompt",
    "undecided": "use a stronger teacher, and check that the server passes the images on",
    "no answer to a closed question": "ask for yes or no with --system-prompt",
    "wrong language": "ask for the language of the questions with --system-prompt",
    "no box": "ask for boxes with --system-prompt, or use a teacher that was trained on boxes",
    "unreadable box": "give the teacher's way to write boxes with --box-format",
    "box outside the image": "give the teacher's way to write boxes with --box-format",
    "more boxes than asked for": "use a teacher that was trained on boxes",
    "samples disagree": "use a stronger teacher",
    "same answer to most questions": "use a stronger teacher, and check that the server passes the images on",
}
"""What the user can do about the most frequent reason, if the answers come from `preceptor teach`."""

FIXES_OF_STAGE = dict.fromkeys(FIXES, "train the teacher longer or on more data") | {
    "cut off": "raise method.pseudo_labels.max_new_tokens"
}
"""The same, if the answers come from the stage `teacher` of the recipe."""

MIN_AGREEMENT = 0.5
"""Smallest mean similarity of a kept answer to the other samples of the same question."""
MOST_REPEATS = 4
"""Number of times in a row that a phrase of at most eight words may occur."""
SAME_ANSWERS, SAME_SHARE = 20, 0.8
"""Of so many answers, this share may not be the same phrase or box for different images and questions."""

_FIRST_PERSON = r"(?:i|we)"
_CANNOT = (
    r"(?:can ?not|can't|could not|couldn't|am (?:not able|unable)|'m (?:not able|unable|afraid)|are (?:not able|unable)"
    r"|will not|won't|do not|don't|must (?:decline|refrain)|must decline|have to decline|decline|refuse)"
)
_REFUSALS = re.compile(
    "|".join(
        [
            # English
            rf"\b{_FIRST_PERSON} ?(?:am|'m|are|'re)? ?(?:so |very |truly )?(?:sorry|apologi[sz]e)\b",
            r"\bsorry\b|\bapolog(?:y|ies|i[sz]e|i[sz]ing)\b|\bregrettably\b|\bi regret\b",
            # "I do not see a fracture" and "type I cannot be excluded" are answers, "I do not see an image" is not.
            rf"\b{_FIRST_PERSON} ?{_CANNOT}\b(?! be )(?! (?:exclude|rule out|think|believe|identify|appreciate)\b)"
            r"(?! (?:see|detect|find|observe|notice)\b"
            r"(?! (?:any |an? |the |your )?(?:attached |uploaded |medical )?(?:image|picture|photo|file)))",
            r"\bas an? (?:[\w-]+ ){0,3}(?:ai|artificial intelligence|language model|llm|assistant|chatbot)\b",
            r"\b(?:i am|i'm) (?:just |only )?(?:an? (?:[\w-]+ ){0,3}(?:ai|language model|assistant|chatbot)\b|not an? "
            r"(?:\w+ )?(?:doctor|physician|radiologist|medical))",
            r"\A(?:\w+,? )?(?:can ?not|can't|unable to|not able to|not allowed to) "
            r"(?:do|provide|give|offer|assist|help|comply)\b",
            r"\b(?:i'm|i am|we're|we are|it is|it's) (?:just |only )?"
            r"not (?:in a position|qualified|possible for (?:me|us)|permitted)\b",
            r"\b(?:i|we) (?:lack|have no (?:access|ability|way|image|picture)|"
            r"would rather not|'d rather not|must (?:decline|refrain))\b",
            r"\bi'd rather not\b|\bbeyond (?:my|our) (?:\w+ )?(?:capabilit|abilit|scope)"
            r"|\bi'm (?:just |only )?a text-based\b",
            r"\b(?:requires?|by|from) a (?:qualified|licensed|trained) (?:radiologist|physician|doctor|professional)",
            r"\b(?:my|our) (?:\w+ )?(?:guidelines|policies|programming) (?:prevent|forbid|do not|don't)",
            r"\b(?:blocked|flagged|rejected) (?:by|due to) (?:the |our )?(?:content|safety)",
            r"\bno (?:image|picture|photo) (?:is )?attached\b"
            r"|\b(?:image|picture) (?:you (?:mentioned|sent) is missing|not found)",
            r"\bimage (?:didn't|did not|doesn't seem to have) (?:come|load|upload)|\bforgot to (?:attach|upload|send)",
            r"\b(?:please|should|recommend\w*|advise\w*|suggest\w*|must|to|,)"
            r" (?:consult|see|contact|ask)(?:ing)? (?:with )?(?:a|an"
            r"|your) (?:[\w-]+ ){0,2}(?:doctor|physician|professional"
            r"|healthcare|health care|clinician|medical expert)\b",
            r"\bseek (?:\w+ )?medical (?:advice|attention|help)\b",
            r"\bnot (?:a substitute for|intended as|provide|constitute) (?:\w+ )?(?:medical"
            r"|diagnos)|\bnot medical advice\b",
            r"\bagainst (?:my|our) (?:\w+ )?(?:guideline|polic|programming|rule)",
            r"\b(?:content|usage|safety) polic(?:y|ies)\b",
            r"\bno (?:image|picture) (?:was|is|has been|were) (?:provided|attached|uploaded|given|included)",
            r"\b(?:image|picture) (?:was|is|has) not (?:been )?(?:provided|attached|uploaded|loaded"
            r"|included)\b(?! with)",
            r"\bplease (?:upload|provide|share|attach) ",
            r"\bspeaking as an ai\b|\b(?:an|your) ai (?:language )?(?:model|assistant)\b|\bai language model\b",
            # Chinese
            r"抱歉|对不起|對不起|不好意思|很遗憾|我(?:只)?是(?:一个|一名|一款|一個)?(?:ai|人工智[能慧]|语言模型|語言模型|大模型|助手)"
            r"|我(?:看不到|看不见|没有权限|不具备|无权|未能|難以|难以)|(?:暂不支持|無法查看|无法查看|无法分析|无法识别|無法識別)(?:图|圖|该|此|这|您)"
            r"|作为(?:一个|一名|一款)?(?:ai|人工智能|语言模型|大模型|助手)|作為(?:一個|一名)?(?:ai|人工智[能慧]|語言模型)",
            r"我(?:暂时|目前|还)?(?:无法|無法|不能|没有办法|没法|不便|不可以|不是(?:医生|醫生))",
            r"(?:无法|無法|不能)(?:为您|为你)?(?:提供|回答|协助|協助|给出(?:医|诊))|(?:请|請|建议|建議)(?:您|你)?(?:咨询|諮詢|就医|就醫|上传|上傳)",
            r"(?:没有|未)(?:看到|收到|提供|上传)(?:任何)?(?:图|圖)",
            # German, French, Spanish, Portuguese, Italian
            r"\btut mir leid\b|\bich kann (?:leider |dir |ihnen |dies\w* |das |die )*(?:nicht|kein)|\bals ki\b",
            r"\b(?:désolée?|je ne (?:peux|suis|dispose)|en tant qu(?:e |'))",
            r"\blo siento\b|\bno puedo\b|\bcomo (?:una? )?(?:ia|modelo de|inteligencia|asistente)\b",
            r"\bdesculpe\b|\bsinto muito\b|\b(?:eu )?não posso\b|\bcomo (?:um|uma) (?:ia|modelo|assistente)\b",
            r"\bmi dispiace\b|\bnon posso\b|\bcome (?:ia|modello|assistente|intelligenza)\b",
            r"\bleider (?:kann|darf|bin) ich\b|\bentschuldigung\b|\bdas kann ich (?:nicht|leider)",
            r"\bje n'ai pas (?:la capacité|accès)|\bnon sono in grado\b|\bnão consigo (?:ajudar|responder|analisar)",
            # Turkish, Dutch, Polish, Vietnamese, Indonesian, Thai, Hindi
            r"\büzgünüm\b|\bhet spijt me\b|\bprzykro mi\b|\bprzepraszam\b|\bxin lỗi\b|\btôi không thể\b|\bmaaf\b"
            r"|ขอโทษ|ขออภัย|क्षमा|माफ़",
            # Russian, Japanese, Korean, Arabic
            r"извините|простите|к сожалению,? (?:я )?не могу|я не могу|как (?:ии|языковая модель|искусственный)",
            r"申し訳|ごめんなさい|お答えでき|診断(?:は|を)?(?:行え|でき)ません|aiとして",
            r"죄송|(?:제공|답변|진단)할 수 없|ai로서",
            r"آسف|أعتذر|لا أستطيع|لا يمكنني",
        ]
    )
)
_REASONING = re.compile(
    r"(?:[<◁\[]|&lt;)(?:/|\|)?\s*(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|scratchpad|analysis|inner_?monologue"
    r"|begin_of_thought|end_of_thought|seed:think|chain_?of_?thought|cot|plan|rationale|explanation)"
    r"(?:\s[^<>]{0,40})?\s*(?:\||/)?(?:[>▷\]]|&gt;)"
    r"|<(?:think|reason)\w*\Z|\A[\W_]*(?:thoughts?|reasoning|rationale|chain[ -]of[ -]thought|analysis|思考|推理|分析)"
    r"(?: process|过程)?[\W_]*[::][\W_]"
    r"|\A(?:let'?s|let me) (?:break|look|analy[sz]e|examine|go through|think|consider|start|first)\b"
    r"|<\|(?:channel|begin_of_thought|end_of_thought|START_THINKING|END_THINKING)\|>|<\|?(?:think|tool▁calls)"
    r"|\A(?:okay|ok|alright|hmm+|well|so)[,.]+ (?:so |now )?(?:let'?s|let me|i (?:need|should|have)|the user)"
    r"|\A(?:thought|reasoning|thinking|analysis|step 1)\s*:|\A(?:to answer (?:this|the) question, i)\b"
    r"|\A(?:first, )?(?:let me think|let's think|i need to (?:think|figure|look|determine|analy[sz]e))"
    r"|\bthe user (?:is asking|asks|asked|wants|wanted)\b|\A(?:好的|嗯|首先)?[，,]?(?:用户(?:想|要|问|询问|让)|我需要)",
    re.IGNORECASE,
)
_WRAPPERS = re.compile(
    r"\A(?:\{|\[\s*[\{\"'])|```|\{\s*[\"']\w+[\"']\s*:|\A(?:the )?final answer is\b|\bfinal answer(?: is)?\W*:"
    r"|</?tool_call|<function=|\\boxed\{|\A\w+(?:\.\w+)*\([^)]*\)\Z"
    r"|\A(?:question|q)\s*:.*\s(?:answer|a)\s*:",
    re.IGNORECASE | re.DOTALL,
)
_SLOT = (
    r"(?:your|insert|enter|fill|write|put|type|the|an?|correct|final|short|one|organs?|body part|modality|findings?|"
    r"diagnosis|location|abnormality|disease|name|description|details?|label|answer|response|text|object|value|region|"
    r"specify|blank)"
)
_PLACEHOLDERS = re.compile(
    r"\A(?:n/a|null|nan|undefined|todo|tbd|yes (?:or|/) no|yes/no|(?:final )?(?:answer|a|response)\s*:|x{2,}|_{2,}|…)"
    rf"\W*\Z|[\[<{{]{{1,2}}\s*{_SLOT}(?:[ _-][^\[\]<>{{}}()\d]*)?[\]>}}]{{1,2}}|\A\({_SLOT}\b[^()]*\)\Z|_{{3,}}"
    r"|\A[【\[](?:答案|回答|请|在此)[^】\]]*[】\]]\Z|\$\{?\w+\}?|%s\b",
    re.IGNORECASE,
)
_LETTER = re.compile(
    r"\W*(?:(?:the )?(?:correct |right |best )?(?:option|answer|choice)(?: is)?\s*:?\s*)?[(\[]?([A-H])[)\].:]?\W*",
    re.IGNORECASE,
)
_GARBLED = re.compile("\ufffd|[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f]")
_ERRORS = re.compile(
    r"""\A\s*(?:\{\s*["'](?:error|detail|errors|fault|status_?code|traceback)["']|\{\s*["']object["']\s*:\s*["']error"""
    r"|<!doctype|<html|<\?xml|<head\b|<body\b|traceback \(most recent call last\)"
    r"|(?:http )?(?:error|status)(?: code)?:? ?[45]\d\d"
    r"|[45]\d\d (?:bad gateway|internal server|service unavailable|too many requests|gateway time|forbidden|not found)"
    r"|(?:insufficient quota|you exceeded your (?:current )?quota|internal server error|bad gateway"
    r"|service unavailable|rate limit|upstream connect error|request timed out)"
    r"|\w*(?:error|exception): )|\b(?:cuda )?out of memory\b",
    re.IGNORECASE,
)
_TOKENS = re.compile(
    r"<\|(?!(?:object_ref|box)_(?:start|end)\|>)[^<>|]{1,40}\|>|</?(?:image|images|img|video|bos"
    r"|eos|pad|unk|s|sep|cls|mask|patch|start_of_turn"
    r"|end_of_turn|start_of_image|end_of_image|image_soft_token|im_patch|im_start|im_end|answer|final|response)/?>"
    r"|<(?:unused|extra_id_|seg|loc|reserved_\w*)\d+>|\[/?INST\]|<</?SYS>>|\[(?:PAD|CLS|SEP|UNK|MASK|IMG|IMG_BREAK)\]"
    r"|(?:^|\n)\s*(?:user|human|assistant|###\s*\w+)\s*:|\A(?:system|user|human|assistant)\n",
    re.IGNORECASE,
)
_ONE_BOX = re.compile(
    r"\b(?:one|a single|exactly one|only one) (?:bounding )?box\b|(?:一|单)个?(?:方框|边界框|框)", re.IGNORECASE
)
_ASKS_FOR_BOX = re.compile(
    r"\b(?:bounding[ -]?)?box(?:es)?\b|\bbbox|\bcoordinates\b|<box>|方框|边界框|邊界框|坐标|座標|框出", re.IGNORECASE
)
_PLACE = re.compile(r"\bwhere\b|\blocat(?:e|ion)\b|\bposition\b|哪里|哪裡|位置|何处", re.IGNORECASE)


_ABBREVIATIONS = {"ct", "cta", "mr", "mri", "mra", "pet", "spect", "us", "dwi", "adc", "flair", "dsa", "ray", "xray"}
_CLOSED = {"yes", "no", "there", "none", "not", "是", "否", "不", "没", "无", "有"}


def asks_for_box(question: str, truth: str = "", task: str = "", alone: bool = True) -> bool:
    """Return whether an answer without a box is not one.

    If the true answer is known, it decides. Otherwise the question asks for boxes in words, or it is of the task `vg`
    and either the only one of its dialogue (`alone`) or about a place.
    """
    if truth.strip():
        return any(found.box is not None for found in find_boxes(truth))
    words = without_boxes(question)
    return bool(_ASKS_FOR_BOX.search(words)) or (task == "vg" and (alone or bool(_PLACE.search(words))))


def unusable(
    question: str,
    answer: str,
    *,
    ended: bool = True,
    wants_box: bool = False,
    system_prompt: str = "",
    profile: AnswerProfile | None = None,
    truth: str = "",
) -> list[Reason]:
    """Return the reasons why an answer is not usable as a label, most important first; empty for a usable one.

    Args:
        question: the question, with boxes in our own marks.
        answer: the answer, with boxes in our own marks (thousandths).
        ended: whether the answer ended before the maximum number of tokens.
        wants_box: whether the question is answered with boxes (`asks_for_box`).
        system_prompt: the system prompt, for echoes.
        profile: the questions and answers of the data; without it, rules that need them are not applied.
        truth: the true answer, if it is known.
    """
    text = unicodedata.normalize("NFKC", answer).strip()
    prose = without_boxes(text)
    plain = " ".join(prose.replace("’", "'").replace("`", "'").lower().split())
    boxes = find_boxes(text)
    valid = [found.box for found in boxes if found.box is not None]
    faults = {fault for box in valid for fault in validate_box(box)}
    allowed = profile is None or normalized(answer) in profile.answers
    most = _most_boxes(question, truth, profile)
    found: dict[Reason, bool] = {
        "error text": bool(_ERRORS.search(text)),
        "empty": not any(character.isalnum() for character in text),
        "reasoning": bool(_REASONING.search(text)),
        "cut off": not ended,
        "refusal": bool(_REFUSALS.search(plain)),
        "special tokens": bool(_TOKENS.search(text) or _GARBLED.search(answer)),
        "wrapped answer": bool(_WRAPPERS.search(prose)),
        "placeholder": bool(_PLACEHOLDERS.search(prose)),
        "repeated text": _repeats(prose) or any(count >= MOST_REPEATS for count in Counter(valid).values()),
        "echo of the question": _echoes(prose, question) or _echoes(prose, system_prompt),
        "choice letter": profile is not None and not allowed and _is_letter(prose, profile),
        "undecided": profile is not None
        and not allowed
        and bool(UNDECIDED.search(plain))
        and not profile.holds_undecided,
        "wrong language": _other_language(without_boxes(question), prose)
        or (profile is not None and not allowed and profile.in_other_language(question, prose)),
        "no answer to a closed question": profile is not None
        and not wants_box
        and not profile.allows_closed(question, answer),
        "no box": wants_box and not boxes,
        "unreadable box": len(valid) < len(boxes) or bool(faults & {"swapped corners", "empty"}),
        "box outside the image": "outside" in faults,
        "more boxes than asked for": wants_box and most is not None and len(valid) > most,
    }
    return [reason for reason, applies in found.items() if applies]


def _most_boxes(question: str, truth: str, profile: AnswerProfile | None) -> int | None:
    """Return the largest number of boxes that an answer may have: as asked for, as is true, or as in the data."""
    if _ONE_BOX.search(question):
        return 1
    if known := len(find_boxes(truth)):
        return 1 if known == 1 else None
    return None if profile is None else profile.most_boxes


def _is_letter(text: str, profile: AnswerProfile) -> bool:
    return bool(_LETTER.fullmatch(text)) and not any(_LETTER.fullmatch(answer) for answer in profile.answers)


def first(reasons: Sequence[str]) -> str | None:
    """Return the reason that an answer counts under."""
    return min(reasons, key=get_args(Reason).index, default=None)


def most_common(counts: Mapping[str, int]) -> str:
    """Return counts by reason as a text, the largest first, such as ``12 refusal, 3 no box``."""
    return ", ".join(f"{n:,} {reason}" for reason, n in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def same_answers(rows: Sequence[tuple[str, str, str]]) -> set[str]:
    """Return the keys of the answers of a teacher that does not look: one answer to most questions.

    `rows` are (key, question, answer). Only boxes are compared, and phrases of at least four words if the questions
    differ: "CT" and "No, there is none." may be the right answer to most questions.
    """
    shapes = {key: _shape(answer) for key, _, answer in rows}
    compared = [(key, question) for key, question, _ in rows if shapes[key]]
    if len(compared) < SAME_ANSWERS:
        return set()
    top, count = Counter(shapes[key] for key, _ in compared).most_common(1)[0]
    keys = {key for key, _ in compared if shapes[key] == top}
    different = len({question for key, question in compared if key in keys}) > 1 or top.startswith("(")
    return keys if count >= SAME_SHARE * len(compared) and different else set()


def _shape(answer: str) -> str:
    boxes = [str(found.box) for found in find_boxes(answer)]
    words = tokens(without_boxes(answer))
    return " ".join(boxes) if boxes else (" ".join(words) if len(words) >= 4 and words[0] not in _CLOSED else "")


def script(character: str) -> str:
    """Return the script of a letter, the first word of its Unicode name; empty for other characters."""
    return unicodedata.name(character, "").partition(" ")[0] if character.isalpha() else ""


def _repeats(text: str) -> bool:
    """Return whether a phrase follows itself, or a sentence makes up most of the text."""
    words = tokens(text)
    for size in range(1, 9):
        run = size
        for i in range(size, len(words)):
            run = run + 1 if words[i] == words[i - size] else size
            if run >= size * (MOST_REPEATS + 1) and run >= 6:
                return True
    if re.search(r"([^\w\s])\1{11,}|(\w)\2{11,}", text):
        return True
    sentences = [" ".join(tokens(part)) for part in re.split(r"[.!?。！？；;\n]+", text)]
    sentences = [sentence for sentence in sentences if sentence]
    return len(sentences) > MOST_REPEATS and Counter(sentences).most_common(1)[0][1] > len(sentences) / 2


def _echoes(answer: str, question: str) -> bool:
    asked, said = (" ".join(without_boxes(text).split()).rstrip("?？.。:： ") for text in (question, answer))
    same = said[:1].lower() + said[1:] == asked[:1].lower() + asked[1:] and len(tokens(asked)) >= 2
    return same or (len(tokens(asked)) >= 4 and asked in said)


def _other_language(question: str, answer: str) -> bool:
    """Return whether question and answer are in different scripts.

    Abbreviations and names in Latin capitals (CT, T2, X-Ray) are at home in every language.
    """
    asked = _main_script(question)
    if asked != "LATIN":
        # Latin words in lower case; in a text of another script they are quotations, unless there are no others.
        latin = [word for word in re.findall(r"[^\W\d_]+", answer) if script(word[0]) == "LATIN"]
        others = any(script(character) not in ("", "LATIN") for character in answer)
        if asked and not others:
            words = [word for word in latin if word.lower() not in _ABBREVIATIONS]
            return any(word.islower() and len(word) > 1 for word in words) or len(words) > 3
    said = _main_script(answer)
    families = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}
    return bool(asked and said and said != "LATIN") and families.get(asked, asked) != families.get(said, said)


def _main_script(text: str) -> str:
    """Return the script of most letters. A Chinese character, which is a word, counts as much as three letters."""
    counts: Counter[str] = Counter()
    for character in text:
        if name := script(character):
            counts[name] += 3 if name == "CJK" else 1
    return counts.most_common(1)[0][0] if counts else ""
