"""BLEU, METEOR, ROUGE-L and CIDEr as in published results, computed by pycocoevalcap (the COCO caption evaluation).

There is no substitute, because other implementations use other tokenizers and stemmers and give other numbers. The
tokenizer of the package and METEOR need Java. Both are started only once for all groups of texts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from preceptor.errors import UserError
from preceptor.files import scratch_folder

BLEU = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")
METRICS = (*BLEU, "meteor", "rouge_l", "cider")
MBMR = (*BLEU, "meteor", "rouge_l")

References = Mapping[str, Sequence[str]]
Responses = Mapping[str, str]
Tokenised = dict[str, list[str]]


def caption_scores_by_group(groups: Sequence[tuple[References, Responses]]) -> list[dict[str, float]]:
    """Return the corpus scores `METRICS` and ``mbmr`` of each group of references and responses.

    Every id has one response and one or more references.

    BLEU, METEOR and ROUGE-L are in [0, 1], CIDEr is in [0, 10]. CIDEr weights words by the number of references that
    contain them, so that it cannot be compared between data sets. ``mbmr`` (Med-GRIT-270k) is the mean of BLEU-1 to -4,
    METEOR and ROUGE-L.

    Raises:
        UserError: pycocoevalcap or Java is missing or fails, the ids differ, or there is nothing to score.
    """
    require_captions()
    for references, responses in groups:
        if references.keys() != responses.keys():
            unmatched = sorted(references.keys() ^ responses.keys())
            raise UserError(
                f"{len(unmatched)} ids have only a reference or only a response, such as {unmatched[0]!r}; each needs "
                "both"
            )
        if not references or not all(references.values()):
            raise UserError("captions need at least one sample, and each at least one reference")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    sets = [texts for references, responses in groups for texts in (references, {i: [t] for i, t in responses.items()})]
    tokenised = _tokenised(sets)
    pairs = list(zip(tokenised[::2], tokenised[1::2], strict=True))
    results = []
    for (reference_tokens, response_tokens), meteor in zip(pairs, _meteor(pairs), strict=True):
        bleu, _ = Bleu(4).compute_score(reference_tokens, response_tokens, verbose=0)
        scores = dict(zip(BLEU, map(float, bleu), strict=True))
        scores["meteor"] = meteor
        scores["rouge_l"] = float(Rouge().compute_score(reference_tokens, response_tokens)[0])
        # The package fails if no reference contains a word.
        words = any(text for texts in reference_tokens.values() for text in texts)
        scores["cider"] = float(Cider().compute_score(reference_tokens, response_tokens)[0]) if words else 0.0
        scores["mbmr"] = sum(scores[name] for name in MBMR) / len(MBMR)
        results.append(scores)
    return results


def require_captions() -> None:
    """Raise UserError if pycocoevalcap or Java is missing."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise UserError("caption scores need pycocoevalcap: pip install 'preceptor[captions]'")
    if shutil.which("java") is None:
        raise UserError("caption scores need Java for METEOR and its tokenizer: install a Java runtime (8 or newer)")


def _tokenised(sets: Sequence[References]) -> list[Tokenised]:
    """Tokenise sets of texts like the PTBTokenizer of the package, with its program and its list of punctuation.

    As in the package, each set is a separate file, because the tokens of a line depend on the next line and on the end
    of the file. One program processes all files.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer as package

    if not sets:
        return []
    jar = Path(package.__file__).resolve().parent / package.STANFORD_CORENLP_3_4_1_JAR
    results = []
    with scratch_folder() as folder:
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
                raise UserError(f"PTBTokenizer made {len(lines)} lines of {len(ids)}; please report this error")
            for id, line in zip(ids, lines, strict=True):
                tokens[id].append(" ".join(w for w in line.rstrip().split(" ") if w not in package.PUNCTUATIONS))
            results.append(tokens)
    return results


def _run(command: list[str], folder: Path) -> None:
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    if process.returncode:
        message = (process.stderr.strip() or "no message").splitlines()[0]
        raise UserError(
            f"the tokenizer of pycocoevalcap failed with code {process.returncode} ({message}); check that Java runs"
        )


def _meteor(pairs: Sequence[tuple[Tokenised, Tokenised]]) -> list[float]:
    """Return the METEOR corpus score of each pair of references and responses, computed by one program."""
    from pycocoevalcap.meteor.meteor import Meteor

    meteor = Meteor()
    try:
        return [float(meteor.compute_score(references, responses)[0]) for references, responses in pairs]
    except (OSError, ValueError) as error:
        raise UserError(f"the Java program of METEOR failed ({error}); it needs 2 GB of memory") from error
    finally:
        # Otherwise the Java process runs until the object is garbage-collected.
        if meteor.lock.locked():
            meteor.lock.release()
        meteor.meteor_p.kill()
        meteor.meteor_p.wait()
        for pipe in (meteor.meteor_p.stdin, meteor.meteor_p.stdout, meteor.meteor_p.stderr):
            with contextlib.suppress(OSError):  # unwritten data for a program that has ended
                pipe.close()


def _line(text: str) -> str:
    """Return a text as one line. The tokenizer would drop a line without words."""
    return " ".join(text.split()) or "."
