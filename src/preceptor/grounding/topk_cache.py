"""The K likeliest words of a teacher at each token of the answers, written once and read from memory-mapped files.

Layout of the folder, which `distill.chunked_kl.topk_kl` learns from::

    manifest.json   format, identity, numbers of rows and tokens, size and SHA-256 of every file
    keys.npy        (N, 32) uint8: the dialogues' content keys (`answers_key`), sorted
    rows.npy        (N,) int64: row of each key
    offsets.npy     (N + 1,) int64: the tokens of row i are those from offsets[i] to offsets[i + 1]
    targets.npy     (T,) uint32: the answers' own tokens, so that another tokenizer is noticed
    ids.npy         (T, K) uint32: the likeliest words, likeliest first
    logs.npy        (T, K) float16 or float32: natural logarithms of their probabilities at the temperature
    tails.npy       (T,) float32: that of the probability of all other words together; -inf where there are none

Rows have as many tokens as their answers, so that nothing is padded: a token takes 4 K + 2 K + 8 bytes with float16,
1,000 tokens 200 kB at K = 32, against 304 MB for all 151,936 words of Qwen2-VL in float16. Float16 keeps a logarithm to
1 part in 2,048; what is read is normalised again together with the tail, so that each row is a distribution.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from preceptor.errors import UserError
from preceptor.task import TopKTeacher
from preceptor.teachers.cache_layout import MANIFEST, damaged_files, differences, key_bytes

if TYPE_CHECKING:
    from preceptor.data.types import Dialogue
    from preceptor.grounding.model import GroundedVlm
    from preceptor.grounding.pseudo_labels import ContentHashes

FORMAT = 1
INDEX = ("keys.npy", "rows.npy", "offsets.npy", "targets.npy")
ARRAYS = ("ids", "logs", "tails", "targets")
AGAIN = "write the cache again"
CHUNK = 128
"""Tokens at a time whose logits over the whole vocabulary are held."""


def answers_key(dialogue: Dialogue, hashes: ContentHashes) -> str:
    """Return the SHA-256, in hex, of what a dialogue's logits depend on: the images' bytes and all turns."""
    content = [list(hashes.of(dialogue)), [list(turn) for turn in dialogue.turns]]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class TopKIdentity:
    """What cached words depend on beside the dialogues' content.

    `teacher`: `local_vlm.vlm_fingerprint`. `tokenizer`: the student's, `vocabulary.tokenizer_fingerprint`. `words`: the
    student's number of logits, to which the teacher's were cut. `preprocessing`: a JSON object, the cut-off of
    dialogues and what the teacher's image processor does (`local_vlm.preprocessing`). `data`: fingerprint of the rows.
    """

    teacher: str
    tokenizer: str
    words: int
    k: int
    temperature: float
    dtype: Literal["float16", "float32"]
    preprocessing: Mapping[str, Any]
    data: str

    def __post_init__(self) -> None:
        if self.k < 1 or self.k > self.words or self.temperature <= 0 or self.dtype not in ("float16", "float32"):
            raise UserError(
                f"k {self.k} must be within 1 and the {self.words} words, temperature {self.temperature} above 0, "
                f"dtype {self.dtype!r} float16 or float32"
            )
        # As JSON gives it back, so that an identity equals the one that was read from its manifest.
        object.__setattr__(self, "preprocessing", json.loads(json.dumps(dict(self.preprocessing))))

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def topk_identity(
    teacher: GroundedVlm,
    tokenizer: Any,
    words: int,
    data: str,
    *,
    k: int = 32,
    temperature: float = 0.5,
    dtype: Literal["float16", "float32"] = "float16",
) -> TopKIdentity:
    """Return the identity of a cache of `teacher` for a student with `tokenizer` and `words` logits.

    `data` is the fingerprint of the rows. Raises UserError where the two do not speak of the same words
    (`vocabulary.same_vocabulary`).
    """
    from preceptor.grounding.local_teacher import preprocessing, vlm_fingerprint
    from preceptor.grounding.vocabulary import same_vocabulary, tokenizer_fingerprint

    same_vocabulary(tokenizer, teacher.encoder.tokenizer, words, len(teacher.lm_head_weight))
    return TopKIdentity(
        vlm_fingerprint(teacher),
        tokenizer_fingerprint(tokenizer),
        words,
        k,
        temperature,
        dtype,
        preprocessing(teacher),
        data,
    )


class TopKRow(NamedTuple):
    """The words of one dialogue's T answer tokens: ids and logs (T, K), tails and targets (T,)."""

    ids: np.ndarray
    logs: np.ndarray
    tails: np.ndarray
    targets: np.ndarray


def top_k(
    hidden_TD: Tensor, weight_WD: Tensor, *, k: int, words: int, temperature: float, chunk: int = CHUNK
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the likeliest words of each token: ids (T, K), log-probabilities (T, K), log mass of the others (T,).

    Of the teacher's logits ``hidden_TD @ weight_WD.T`` the first `words` count, divided by `temperature`; softmax is in
    float32 (float64 stays). Words of the same probability are in no certain order.

    Raises UserError where `k` is above the number of words that count.
    """
    count = min(words, weight_WD.shape[0])
    if k > count:
        raise UserError(f"k {k} is above the {count} words that student and teacher share; give at most as many")
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for begin in range(0, hidden_TD.shape[0], chunk):
        logits = hidden_TD[begin : begin + chunk].to(weight_WD.dtype) @ weight_WD[:count].T
        logs = (logits if logits.dtype == torch.float64 else logits.float()).div(temperature).log_softmax(dim=-1)
        values, ids = logs.topk(k, dim=-1)
        # Summed itself: 1 minus the others' sum would lose a small mass.
        tail = logs.scatter(1, ids, -torch.inf).logsumexp(dim=-1)
        parts.append((ids, values, tail))
    if not parts:
        empty = hidden_TD.new_zeros((0, k))
        return empty.long(), empty, empty.sum(dim=1)
    ids, values, tail = (torch.cat(list(part)) for part in zip(*parts, strict=True))
    return ids, values, tail


def teacher_rows(
    vlm: GroundedVlm, dialogues: Sequence[Dialogue], identity: TopKIdentity, *, batch_size: int = 4
) -> Iterator[TopKRow]:
    """Give what a teacher says about each dialogue's answers, in their order. Raises as `DialogueEncoder.encode`."""
    device, dtype = vlm.lm_head_weight.device, np.dtype(identity.dtype)
    was_training = vlm.training
    vlm.eval()
    try:
        for begin in range(0, len(dialogues), batch_size):
            rows = [vlm.encoder.encode(dialogue) for dialogue in dialogues[begin : begin + batch_size]]
            batch = {name: value.to(device) for name, value in vlm.encoder.collate(rows).items()}
            with torch.inference_mode():
                states = vlm.hidden(batch)
                ids, logs, tails = top_k(
                    states.hidden,
                    vlm.lm_head_weight,
                    k=identity.k,
                    words=identity.words,
                    temperature=identity.temperature,
                )
            for row in range(len(rows)):
                mine = states.rows == row
                yield TopKRow(
                    ids[mine].cpu().numpy().astype(np.uint32),
                    logs[mine].float().cpu().numpy().astype(dtype),
                    tails[mine].float().cpu().numpy(),
                    states.targets[mine].cpu().numpy().astype(np.uint32),
                )
    finally:
        vlm.train(was_training)


class TopKCache:
    """Cached words of a teacher; `open` it. `rows` and `tokens` count what it holds."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = TopKIdentity(**manifest["identity"])
        self.files: dict[str, dict[str, Any]] = dict(manifest["files"])
        self.rows, self.tokens = int(manifest["rows"]), int(manifest["tokens"])
        # The index is hashed at once: it is small, and a wrong row would be a wrong answer without a sign of it.
        self._check_files(INDEX)
        self._keys = np.load(folder / "keys.npy").reshape(-1).view("S32")
        self._rows, self._offsets = np.load(folder / "rows.npy"), np.load(folder / "offsets.npy")
        k = self.identity.k
        shapes = {"ids": (self.tokens, k), "logs": (self.tokens, k), "tails": (self.tokens,), "targets": (self.tokens,)}
        self._arrays = {name: self._map(name, shapes[name]) for name in ARRAYS}

    @classmethod
    def open(cls, folder: Path, identity: TopKIdentity) -> Self:
        """Open the cache in `folder`, which must have been written for `identity`.

        Raises UserError where there is no cache, it is damaged, or the identity differs: each difference is named.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
            version, there = manifest["format"], manifest["identity"]
            if version != FORMAT or manifest["kind"] != "top-k":
                raise UserError(f"the cache {folder} has format {version!r}, this version reads {FORMAT}: {AGAIN}")
            different = differences(there, identity.as_dict())
            if different:
                lines = "\n".join(f"  {line}" for line in different)
                raise UserError(f"the cached words in {folder} are of something else:\n{lines}\nTo mend: {AGAIN}.")
            return cls(folder, manifest)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"there are no cached words of a teacher in {folder}: write them first") from None
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{folder / MANIFEST} is damaged ({error!r}): {AGAIN}") from None

    def __len__(self) -> int:
        return self.rows

    def _check_files(self, hashed: Iterable[str]) -> None:
        damaged = damaged_files(self.folder, self.files, hashed)
        if damaged:
            raise UserError(f"the cache {self.folder} is damaged: {'; '.join(damaged)}; {AGAIN}")

    def _map(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        kinds = {"ids": "uint32", "logs": self.identity.dtype, "tails": "float32", "targets": "uint32"}
        array = np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))
        if array.shape != shape or array.dtype != np.dtype(kinds[name]):
            raise UserError(f"the cache {self.folder} is damaged: {name}.npy has {array.dtype} {array.shape}; {AGAIN}")
        return array

    def verify_files(self) -> None:
        """Read every file and compare its SHA-256 with the manifest; raise UserError that names the damaged ones."""
        self._check_files(self.files)

    def row(self, key: str) -> TopKRow:
        """Return the words of one dialogue, as stored. Raises UserError where it is not cached."""
        wanted = key_bytes([key])[0]
        place = int(np.searchsorted(self._keys, wanted))
        if place == len(self._keys) or self._keys[place] != wanted:
            raise UserError(
                f"a dialogue (content {key[:12]}...) is not in the cache {self.folder}: its images, questions or "
                f"answers have changed since; {AGAIN}"
            )
        row = int(self._rows[place])
        where = slice(int(self._offsets[row]), int(self._offsets[row + 1]))
        return TopKRow(*(self._arrays[name][where] for name in ("ids", "logs", "tails", "targets")))

    def gather(self, keys: Sequence[str], targets_T: Tensor | None = None) -> TopKTeacher:
        """Return the words of a batch of dialogues, the tokens of each after those of the one before.

        Logarithms are float32 and normalised with the tail; everything is on the device of `targets_T`. Those are the
        answers' tokens as the student has them (`AnswerStates.targets`), in the same order.

        Raises UserError where a dialogue is not cached, or its tokens are others now.
        """
        ids, logs, tails, targets = (np.concatenate(part) for part in zip(*map(self.row, keys), strict=True))
        if targets_T is not None and not np.array_equal(targets, targets_T.cpu().numpy()):
            raise UserError(
                f"the answers have other tokens than those cached in {self.folder}: the tokenizer, the chat template, "
                f"the order of the rows or the answers have changed; {AGAIN}"
            )
        device = torch.device("cpu") if targets_T is None else targets_T.device
        logs_TK, tail_T = torch.from_numpy(logs.astype(np.float32)), torch.from_numpy(tails.astype(np.float32))
        whole_T1 = torch.cat([logs_TK, tail_T[:, None]], dim=1).logsumexp(dim=1, keepdim=True)
        ids_TK = torch.from_numpy(ids.astype(np.int64))
        return TopKTeacher((logs_TK - whole_T1).to(device), ids_TK.to(device), (tail_T - whole_T1[:, 0]).to(device))


@dataclass(frozen=True)
class TopKReport:
    """`checked` dialogues were computed again. `worst` is the largest difference of a word's probability or of the
    tail's; `mismatched` are the ids of dialogues beyond the tolerance, or with other tokens."""

    checked: int
    worst: float
    mismatched: list[str]


def verify(
    cache: TopKCache,
    vlm: GroundedVlm,
    dialogues: Sequence[Dialogue],
    hashes: ContentHashes,
    fraction: float = 0.01,
    seed: int = 0,
    tolerance: float = 1e-3,
) -> TopKReport:
    """Compute a random fraction of the dialogues again, at least one, and compare their words' probabilities.

    The default tolerance is for a teacher in float32; in bfloat16 words depend on the batch, and about 0.05 is usual.
    """
    if not 0 < fraction <= 1 or not dialogues:
        raise UserError(f"the fraction to verify must be in (0, 1], not {fraction}, of at least one dialogue")
    count = math.ceil(fraction * len(dialogues))
    chosen = np.random.default_rng(seed).choice(len(dialogues), count, replace=False)
    worst, mismatched = 0.0, []
    for number in chosen.tolist():
        dialogue = dialogues[number]
        (new,) = teacher_rows(vlm, [dialogue], cache.identity)
        old = cache.row(answers_key(dialogue, hashes))
        distance = math.inf
        if np.array_equal(old.targets, new.targets):
            distance = _distance(old, new)
        worst = max(worst, distance)
        if distance > tolerance:
            mismatched.append(dialogue.id)
    return TopKReport(count, worst, mismatched)


def _distance(old: TopKRow, new: TopKRow) -> float:
    """Return the largest difference of probabilities, word by word: near the last of K another word may be there."""
    largest = 0.0
    for a, b in ((old, new), (new, old)):
        for ids, logs, other_ids, other_logs in zip(a.ids, a.logs, b.ids, b.logs, strict=True):
            known = dict(zip(other_ids.tolist(), np.exp(other_logs.astype(np.float64)).tolist(), strict=True))
            # A word that the other one lacks is no likelier there than its last.
            least = min(known.values())
            for id, log in zip(ids.tolist(), np.exp(logs.astype(np.float64)).tolist(), strict=True):
                difference = abs(log - known[id]) if id in known else max(0.0, log - least)
                largest = max(largest, math.inf if math.isnan(difference) else difference)
    tails = np.abs(np.exp(old.tails.astype(np.float64)) - np.exp(new.tails.astype(np.float64)))
    return max(largest, float(np.nan_to_num(tails, nan=math.inf).max(initial=0.0)))
