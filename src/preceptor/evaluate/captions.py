"""BLEU, METEOR, ROUGE-L and CIDEr as published numbers have them: by pycocoevalcap, the COCO caption evaluation.

Nothing is substituted: other implementations tokenise and stem otherwise and give other numbers. The package's
tokenizer and METEOR need Java.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence

from preceptor.errors import UserError

BLEU = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")
METRICS = (*BLEU, "meteor", "rouge_l", "cider")
MBMR = (*BLEU, "meteor", "rouge_l")


def caption_scores(references: Mapping[str, Sequence[str]], responses: Mapping[str, str]) -> dict[str, float]:
    """Return the corpus scores of `METRICS`, and ``mbmr``, of responses against one or more references by id.

    BLEU, METEOR, ROUGE-L are in [0, 1], CIDEr in [0, 10]. CIDEr weighs words by how many references of this very set
    hold them, so it cannot be compared between sets. ``mbmr`` (Med-GRIT-270k) is the mean of BLEU-1 to -4, METEOR and
    ROUGE-L.

    Raises:
        UserError: pycocoevalcap or Java is missing, the ids of both differ, or there is nothing to score.
    """
    require_captions()
    if references.keys() != responses.keys():
        lone = sorted(references.keys() ^ responses.keys())
        raise UserError(f"{len(lone)} ids have a reference or a response alone, such as {lone[0]!r}; each needs both")
    if not references or not all(references.values()):
        raise UserError("captions need at least one sample, and each at least one reference")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    try:
        wanted = tokenizer.tokenize({id: [{"caption": _line(t)} for t in texts] for id, texts in references.items()})
        said = tokenizer.tokenize({id: [{"caption": _line(text)}] for id, text in responses.items()})
    except OSError as error:
        raise UserError(
            f"pycocoevalcap's tokenizer cannot run ({error}); it writes beside its own files, so install the package "
            "where you may write"
        ) from error
    scores: dict[str, float] = {}
    bleu, _ = Bleu(4).compute_score(wanted, said, verbose=0)
    scores |= dict(zip(BLEU, map(float, bleu), strict=True))
    scores["meteor"] = _meteor(wanted, said)
    scores["rouge_l"] = float(Rouge().compute_score(wanted, said)[0])
    scores["cider"] = float(Cider().compute_score(wanted, said)[0])
    scores["mbmr"] = sum(scores[name] for name in MBMR) / len(MBMR)
    return scores


def require_captions() -> None:
    """Raise UserError where caption scores cannot be computed, saying what to install."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise UserError("caption scores need pycocoevalcap: pip install 'preceptor[captions]'")
    if shutil.which("java") is None:
        raise UserError("caption scores need Java for METEOR and its tokenizer: install a Java runtime (8 or newer)")


def _meteor(wanted: dict[str, list[str]], said: dict[str, list[str]]) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    meteor = Meteor()
    try:
        return float(meteor.compute_score(wanted, said)[0])
    finally:
        # Else its Java process lives until the object happens to be collected.
        meteor.meteor_p.kill()
        meteor.meteor_p.wait()
        for pipe in (meteor.meteor_p.stdin, meteor.meteor_p.stdout, meteor.meteor_p.stderr):
            pipe.close()


def _line(text: str) -> str:
    """Return a text of one line; of one without any word the tokenizer would leave no line at all."""
    return " ".join(text.split()) or "."
