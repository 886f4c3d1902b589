"""What the questions and the labelled answers of a data set tell about the answers that a teacher should give.

The rules refuse only what is certain. A question is closed by its form in English and Chinese. Languages are told apart
by their script and, in Latin script, by function words: a single noun in another language is not found.
"""

# ruff: noqa: RUF001 - punctuation of other languages

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

from preceptor.data.grounding.box_formats import find_boxes, without_boxes

FEW = 4
"""Number of labelled answers to closed questions, and of answers with boxes, from which they set an example."""
CLOSED_SHARE = 0.9
"""Fraction of the labelled answers to closed questions that must begin with yes or no."""

UNDECIDED = re.compile(
    r"(?:\A\W*(?:unknown|undetermined|not sure|unsure|uncertain|unclear|inconclusive|indeterminate|no idea|不确定"
    r"|不確定|未知|不清楚|不知道|说不清)\W*\Z)"
    r"|\b(?:can ?not|can't|could not|couldn't|unable to|not able to|(?:not|im)possible to|insufficient (?:\w+ )?to|"
    r"(?:difficult|hard) to|not enough (?:\w+ )?to) (?:be )?(?:\w+ly )?(?:determined?|tell|told|say|said|answer(?:ed)?|"
    r"assess(?:ed)?|judged?|conclude[d]?|ascertain(?:ed)?|establish(?:ed)?|decided?|infer(?:red)?|know[n]?)\b"
    r"|\b(?:insufficient|not enough) (?:information|detail|data|context|evidence)\b"
    r"|\b(?:i am|i'm|we are) (?:not sure|unsure|uncertain)\b|\bit is (?:unclear|unknown|uncertain)\b"
    r"|(?:无法|無法|难以|難以|不能|不好)(?:从|根据)?[^。，]{0,12}(?:确定|確定|判断|判斷|得知|看出|推断|辨别|辨認|辨认)|信息不足|資訊不足"
)
"""Answers that decide nothing."""
_YES_NO = {
    "en": ("yes", "no"),
    "zh": tuple(re.findall(r"\w+", "是 否 有 无 無 没 沒 不 未 存在 包含 包括 可以 能 会 會 对 對 正常 健康")),
    "fr": ("oui", "non"),
    "de": ("ja", "nein"),
    "es": ("sí", "no"),
    "pt": ("sim", "não"),
    "it": ("sì", "no"),
    "nl": ("ja", "nee"),
}
_OPENERS = re.compile(
    r"(?:yeah|yep|nope|not|none|never|there|it|i|we|cannot|can't|unclear|unknown|uncertain|indeterminate|possibly|"
    r"probably|likely|unlikely|maybe|perhaps|partially|both|neither|absent|present|negative|positive|correct|incorrect|"
    r"true|false)\b"
)
"""First words of an answer to a closed question if the data have no examples."""
_FUNCTION_WORDS = {
    language: frozenset(words.split())
    for language, words in {
        "en": "a an the is are was were be of in on at to and or not no with by for from this that there it its as has "
        "have had do does did can could may which what where who when how than these those into over under both",
        "fr": "le les un une des du est et dans il elle ne pas sur avec pour que qui au aux ce cette sont par aucun "
        "aucune c'est oui y a-t-il quel quelle où",
        "de": "der die das den dem ein eine einen einer ist und im nicht mit von zu auf keine kein sind es nein zeigt "
        "welches welche wo gibt",
        "es": "el los las un una de del es y en se con por para que hay está sí al qué cuál dónde",
        "pt": "o os um uma do da dos das é e em na não com por para que há sim está qual onde",
        "it": "il lo gli un una di del della è e non con per che sono sì nel nella quale dove",
        "nl": "de het een is en van niet met op er geen nee zijn dat welk waar",
    }.items()
}
_ARTICLES = frozenset(re.findall(r"\w+", "the le les une der das ein eine el los las una il lo gli uma het een"))
_LOANS = {"café", "naïve", "ménière", "façade", "résumé", "déjà", "à", "contrecoup", "grand-mère"}
_AUXILIARY = re.compile(
    r"(?:is|are|was|were|do|does|did|has|have|had|can|could|will|would|should|isn't|aren't|doesn't|don't|hasn't)\b"
    r"(?! you\b)"
)
_OPEN = re.compile(r"\b(?:or|what|which|where|why|how|who|when|if so)\b")
_CHINESE_CLOSED = re.compile(r"吗|嗎|是否|有没有|有沒有|是不是|能否|有无|會不會|会不会")
_CHINESE_OPEN = re.compile(r"什么|什麼|哪|多少|几|幾|如何|怎|为何|還是|还是|谁")
_YES_OR_NO = re.compile(r"\byes or no\b|\byes/no\b|\byes, no\b|是或否|是或不是")


def normalized(text: str) -> str:
    """Return a text in lower case without boxes, marks of emphasis, and spaces around it."""
    text = unicodedata.normalize("NFKC", without_boxes(text)).replace("’", "'").lower()
    return " ".join(re.sub(r"[*_`\"]", "", text).split()).lstrip(".,:;!?-。，：；！？ ")


def closed_language(question: str) -> str | None:
    """Return the language of a question whose form asks for yes or no, `en` or `zh`; None for other questions."""
    text = normalized(question)
    chinese = re.search(r"[\u4e00-\u9fff]", text) is not None
    if _YES_OR_NO.search(text):
        return "zh" if chinese else "en"
    if chinese:
        return "zh" if _CHINESE_CLOSED.search(text) and not _CHINESE_OPEN.search(text) else None
    sentences = [part.strip() for part in re.findall(r"[^.?!]+[.?!]*", text) if part.strip()]
    asked = [sentence for sentence in sentences if sentence.endswith("?")] or sentences
    return "en" if asked and _AUXILIARY.match(asked[-1]) and not _OPEN.search(asked[-1]) else None


def _starts_with(answer: str, beginning: str) -> bool:
    rest = answer[len(beginning) :]
    # Chinese is written without spaces.
    return answer.startswith(beginning) and (not rest[:1].isalnum() or not beginning.isascii())


@dataclass(frozen=True)
class AnswerProfile:
    """Answers of a data set.

    Attributes:
        closed: the answers to closed questions, by language, normalized.
        words: the words of all questions and answers, in lower case.
        answers: all answers, normalized.
        language: language of most questions in Latin script, or an empty text.
        most_boxes: largest number of boxes of an answer; None if too few answers have boxes.
    """

    closed: dict[str, frozenset[str]] = field(default_factory=dict)
    words: frozenset[str] = frozenset()
    answers: frozenset[str] = frozenset()
    language: str = ""
    most_boxes: int | None = None

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str]]) -> Self:
        """Return the profile of (question, answer); an empty text is a missing answer."""
        closed: dict[str, list[str]] = {"en": [], "zh": []}
        words: set[str] = set()
        answers: set[str] = set()
        boxes: list[int] = []
        languages: Counter[str] = Counter()
        for question, answer in pairs:
            asked = _words(question)
            words.update(asked)
            languages.update([_language(asked)])
            if not answer.strip():
                continue
            answers.add(normalized(answer))
            words.update(_words(answer))
            if (language := closed_language(question)) and normalized(answer):
                closed[language].append(normalized(answer))
            if count := len(find_boxes(answer)):
                boxes.append(count)
        del languages[""]
        top = languages.most_common(1)
        return cls(
            {language: _examples(language, found) for language, found in closed.items() if len(found) >= FEW},
            frozenset(words),
            frozenset(answers),
            top[0][0] if top else "",
            max(boxes) if len(boxes) >= FEW else None,
        )

    @cached_property
    def holds_undecided(self) -> bool:
        """Whether an answer of the data decides nothing, such as "unknown"."""
        return any(UNDECIDED.search(answer) for answer in self.answers)

    def allows_closed(self, question: str, answer: str) -> bool:
        """Return False for an answer to a closed question that does not begin with an answer of the data.

        If the data have no such answers, it may begin with yes, no, or another word that such answers begin with. If
        they answer closed questions in sentences, all answers are allowed.
        """
        language = closed_language(question)
        if language is None:
            return True
        known = self.closed.get(language)
        if known is not None and not known:
            return True
        text = normalized(answer)
        if known is None and _OPENERS.match(text):
            return True
        return any(_starts_with(text, beginning) for beginning in (*_YES_NO[language], *(known or ())))

    def in_other_language(self, question: str, answer: str) -> bool:
        """Return whether an answer in Latin script is certainly in another language than its question."""
        asked, said = _words(question), _words(answer)
        language = _language(asked) or self.language
        if not said or not language:
            return False
        own = _FUNCTION_WORDS[language]
        for other, listed in _FUNCTION_WORDS.items():
            marks = {*listed, *_YES_NO[other]} - own - set(_YES_NO[language]) - self.words
            hits = set(said) & marks
            if other == language or not hits:
                continue
            count = sum(word in marks for word in said)
            if len(hits) > max(1, len(own & set(said))) and count >= len(said) / 4:
                return True
            if own & set(said):
                continue
            text = answer.strip()
            if said[0] in _YES_NO[other] and said[0] in hits and re.match(r"[^\W\d_]+\s*(?:[,.!;:]|\Z)", text):
                return True
            # "Le foie", but neither "LE oedema" nor "Le Fort fracture".
            if said[0] in _ARTICLES & hits and re.match(r"[^\W\d_][^\W\d_A-Z]*\s+[^\W\d_A-Z]{3,}", text):
                return True
        accented = [word for word in said if not word.isascii() and word not in _LOANS]
        return bool(
            language == "en"
            and len(said) <= 4
            and any(word in unicodedata.normalize("NFC", answer) and _has_accent(word) for word in accented)
            and all(word.isascii() for word in self.words)
        )


def _examples(language: str, answers: list[str]) -> frozenset[str]:
    """Return the answers to closed questions; none if they are answered in sentences without yes or no."""
    short = sum(any(_starts_with(answer, word) for word in _YES_NO[language]) for answer in answers)
    return frozenset(answers) if short >= CLOSED_SHARE * len(answers) else frozenset()


def _words(text: str) -> list[str]:
    text = unicodedata.normalize("NFC", without_boxes(text)).replace("’", "'").lower()
    return [word for word in re.findall(r"[^\W\d_]+(?:['-][^\W\d_]+)*", text) if _is_latin(word)]


def _is_latin(word: str) -> bool:
    return all(not letter.isalpha() or unicodedata.name(letter, "").startswith("LATIN") for letter in word)


def _has_accent(word: str) -> bool:
    return any(unicodedata.combining(sign) for sign in unicodedata.normalize("NFD", word))


def _language(words: list[str]) -> str:
    """Return the language with most function words in a text; empty if it has none, or several have as many."""
    hits = Counter({name: sum(word in listed for word in words) for name, listed in _FUNCTION_WORDS.items()})
    (first, most), (_, second) = hits.most_common(2)
    return first if most > second else ""
