"""BLEU, METEOR, ROUGE-L and CIDEr as published numbers have them: by pycocoevalcap, the COCO caption evaluation.

Nothing is substituted: other implementations tokenise and stem otherwise and give other numbers. The package's
tokenizer and METEOR need Java; both are started once, however many groups of texts are scored.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from preceptor.errors import UserError

BLEU = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")
METRICS = (*BLEU, "meteor", "rouge_l", "cider")
MBMR = (*BLEU, "meteor", "rouge_l")

References = Mapping[str, Sequence[str]]
Responses = Mapping[str, str]
Tokenised = dict[str, list[str]]


def caption_scores(references: References, responses: Responses) -> dict[str, float]:
    """Return the corpus scores of `METRICS`, and ``mbmr``, of responses against one or more references by id.

    BLEU, METEOR, ROUGE-L are in [0, 1], CIDEr in [0, 10]. CIDEr weighs words by how many references of this very set
    hold them, so it cannot be compared between sets. ``mbmr`` (Med-GRIT-270k) is the mean of BLEU-1 to -4, METEOR and
    ROUGE-L.

    Raises:
        UserError: pycocoevalcap or Java is missing or fails, the ids of both differ, or there is nothing to score.
    """
    return caption_scores_by_group([(references, responses)])[0]


def caption_scores_by_group(groups: Sequence[tuple[References, Responses]]) -> list[dict[str, float]]:
    """Return the `caption_scores` of each group of references and responses; raises as that."""
    require_captions()
    for references, responses in groups:
        if references.keys() != responses.keys():
            lone = sorted(references.keys() ^ responses.keys())
            raise UserError(
                f"{len(lone)} ids have a reference or a response alone, such as {lone[0]!r}; each needs both"
            )
        if not references or not all(references.values()):
            raise UserError("captions need at least one sample, and each at least one reference")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    sets = [texts for references, responses in groups for texts in (references, {i: [t] for i, t in responses.items()})]
    tokenised = _tokenised(sets)
    pairs = list(zip(tokenised[::2], tokenised[1::2], strict=True))
    found = []
    for (wanted, said), meteor in zip(pairs, _meteor(pairs), strict=True):
        bleu, _ = Bleu(4).compute_score(wanted, said, verbose=0)
        scores = dict(zip(BLEU, map(float, bleu), strict=True))
        scores["meteor"] = meteor
        scores["rouge_l"] = float(Rouge().compute_score(wanted, said)[0])
        # Where no reference holds a word the package has nothing to weigh, and fails.
        words = any(text for texts in wanted.values() for text in texts)
        scores["cider"] = float(Cider().compute_score(wanted, said)[0]) if words else 0.0
        scores["mbmr"] = sum(scores[name] for name in MBMR) / len(MBMR)
        found.append(scores)
    return found


def require_captions() -> None:
    """Raise UserError where caption scores cannot be computed, saying what to install."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise UserError("caption scores need pycocoevalcap: pip install 'preceptor[captions]'")
    if shutil.which("java") is None:
        raise UserError("caption scores need Java for METEOR and its tokenizer: install a Java runtime (8 or newer)")


def _tokenised(sets: Sequence[References]) -> list[Tokenised]:
    """Return what the package's PTBTokenizer makes of sets of texts, by its own program and list of punctuation.

    Each set is a file of its own, as in the package, since what a line becomes depends on the next one and on the end
    of the file; but all of them go to one program.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer as package

    if not sets:
        return []
    jar = Path(package.__file__).resolve().parent / package.STANFORD_CORENLP_3_4_1_JAR
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for i, texts in enumerate(sets):
            lines = [_line(text) for of_id in texts.values() for text in of_id]
            (folder / f"{i}.in").write_text("\n".join(lines), "utf-8", newline="\n")
        (folder / "files").write_text("".join(f"{i}.in {i}.out\n" for i in range(len(sets))), "utf-8")
        command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
        _run([*command, "-ioFileList", "files"], folder)
        for i, texts in enumerate(sets):
            ids = [id for id, of_id in texts.items() for _ in of_id]
            lines = (folder / f"{i}.out").read_bytes().decode("utf-8").split("\n")
            tokens: Tokenised = {id: [] for id in texts}
            if len(lines) != len(ids):
                raise UserError(f"PTBTokenizer made {len(lines)} lines of {len(ids)}; this is no fault of your texts")
            for id, line in zip(ids, lines, strict=True):
                tokens[id].append(" ".join(w for w in line.rstrip().split(" ") if w not in package.PUNCTUATIONS))
            found.append(tokens)
    return found


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = (done.stderr.strip() or "no message").splitlines()[0]
        raise UserError(f"pycocoevalcap's tokenizer ended with code {done.returncode} ({said}); see whether Java runs")


def _meteor(pairs: Sequence[tuple[Tokenised, Tokenised]]) -> list[float]:
    """Return METEOR's corpus score of each pair of references and responses, by one program."""
    from pycocoevalcap.meteor.meteor import Meteor

    meteor = Meteor()
    try:
        return [float(meteor.compute_score(wanted, said)[0]) for wanted, said in pairs]
    except (OSError, ValueError) as error:
        raise UserError(f"METEOR's Java program gave no score ({error}); it needs 2 GB of memory") from error
    finally:
        # Else its Java process lives until the object happens to be collected.
        if meteor.lock.locked():
            meteor.lock.release()
        meteor.meteor_p.kill()
        meteor.meteor_p.wait()
        for pipe in (meteor.meteor_p.stdin, meteor.meteor_p.stdout, meteor.meteor_p.stderr):
            with contextlib.suppress(OSError):  # what was not yet written to a program that has ended
                pipe.close()


def _line(text: str) -> str:
    """Return a text of one line; of one without any word the tokenizer would leave no line at all."""
    return " ".join(text.split()) or "."
