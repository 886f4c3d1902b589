"""The teacher's K most likely tokens at each answer token, written once and read from memory-mapped files.

Arrays of the store (`teachers.array_store`), T answer tokens in all; row i has the next ``lengths[i]`` of them::

    ids                (T, K) uint32: the most likely tokens, in descending order
    log_probabilities  (T, K) float16 or float32: natural logarithms at the temperature
    log_tail           (T,) float32: the logarithm of the probability of all other tokens; -inf if there are none
    targets            (T,) uint32: the answers' own tokens, to detect another tokenizer or chat template

Nothing is padded: a token takes 4 K + 2 K + 8 bytes with float16, 1,000 tokens 200 kB at K = 32, against 304 MB for all
151,936 logits of Qwen2-VL in float16. Float16 keeps a logarithm to 1 part in 2,048; the distribution is normalised
again when it is read, so that each row sums to one. `distill.chunked_kl.topk_kl` learns from it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from preceptor.errors import UserError
from preceptor.task import TopKTeacher
from preceptor.teachers.array_store import REWRITE, ArrayStore, ArrayStoreWriter, VerifyReport

if TYPE_CHECKING:
    from preceptor.data.types import Dialogue
    from preceptor.grounding.model import GroundedVlm
    from preceptor.grounding.pseudo_labels import ContentHashes

KIND = "top-k"
CHUNK = 128
"""Tokens at a time whose logits over the whole vocabulary are in memory."""


def answers_key(dialogue: Dialogue, hashes: ContentHashes) -> str:
    """Return the SHA-256, in hex, of everything a dialogue's logits depend on: the images' bytes and all texts."""
    content: list[Any] = [list(hashes.of(dialogue)), [list(turn) for turn in dialogue.turns]]
    content += [dialogue.system] if dialogue.system else []
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class TopKCacheKey:
    """Everything that cached tokens depend on except the content of the dialogues.

    `teacher` is `local_teacher.vlm_fingerprint`, `tokenizer` the student's `vocabulary.tokenizer_fingerprint`,
    `vocab_size` the student's number of logits, to which the teacher's are cut, `preprocessing` JSON values of
    `local_teacher.preprocessing`, `data` the fingerprint of the rows.

    Raises UserError if k, temperature or dtype are out of range.
    """

    teacher: str
    tokenizer: str
    vocab_size: int
    k: int
    temperature: float
    dtype: Literal["float16", "float32"]
    preprocessing: Mapping[str, Any]
    data: str

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.vocab_size or self.temperature <= 0 or self.dtype not in ("float16", "float32"):
            raise UserError(
                f"k {self.k} must be from 1 to the vocabulary size {self.vocab_size}, temperature {self.temperature} "
                f"above 0, dtype {self.dtype!r} float16 or float32"
            )


def topk_cache_key(
    teacher: GroundedVlm,
    tokenizer: Any,
    vocab_size: int,
    data: str,
    *,
    k: int = 32,
    temperature: float = 0.5,
    dtype: Literal["float16", "float32"] = "float16",
) -> TopKCacheKey:
    """Return the key of a cache of `teacher` for a student with `tokenizer` and `vocab_size` logits.

    `data` is the fingerprint of the rows. Raises UserError if the two vocabularies differ (`require_same_vocabulary`).
    """
    from preceptor.grounding.local_teacher import preprocessing, vlm_fingerprint
    from preceptor.grounding.vocabulary import require_same_vocabulary, tokenizer_fingerprint

    require_same_vocabulary(tokenizer, teacher.encoder.tokenizer, vocab_size, len(teacher.lm_head_weight))
    return TopKCacheKey(
        vlm_fingerprint(teacher),
        tokenizer_fingerprint(tokenizer),
        vocab_size,
        k,
        temperature,
        dtype,
        preprocessing(teacher),
        data,
    )


class TopKRow(NamedTuple):
    """One dialogue's T answer tokens: ids and log_probabilities (T, K), log_tail and targets (T,)."""

    ids: np.ndarray
    log_probabilities: np.ndarray
    log_tail: np.ndarray
    targets: np.ndarray


def top_k(
    hidden_TD: Tensor, weight_VD: Tensor, *, k: int, vocab_size: int, temperature: float, chunk: int = CHUNK
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the most likely tokens: ids (T, K), log-probabilities (T, K), log-probability of all others (T,).

    The first `vocab_size` of the teacher's logits ``hidden_TD @ weight_VD.T`` count, divided by `temperature`. Softmax
    is computed in float32, or in float64 if the input is. The order of equally likely tokens is not defined.

    Raises UserError if `k` is larger than the number of logits that count.
    """
    count = min(vocab_size, weight_VD.shape[0])
    if k > count:
        raise UserError(f"k {k} is larger than the {count} tokens that student and teacher share; lower it")
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for begin in range(0, hidden_TD.shape[0], chunk):
        logits = hidden_TD[begin : begin + chunk].to(weight_VD.dtype) @ weight_VD[:count].T
        logs = (logits if logits.dtype == torch.float64 else logits.float()).div(temperature).log_softmax(dim=-1)
        values, ids = logs.topk(k, dim=-1)
        # Summed directly: 1 minus the others would lose a small probability.
        tail = logs.scatter(1, ids, -torch.inf).logsumexp(dim=-1)
        parts.append((ids, values, tail))
    if not parts:
        empty = hidden_TD.new_zeros((0, k))
        return empty.long(), empty, empty.sum(dim=1)
    ids, values, tail = (torch.cat(list(part)) for part in zip(*parts, strict=True))
    return ids, values, tail


def teacher_rows(
    vlm: GroundedVlm, dialogues: Sequence[Dialogue], cache_key: TopKCacheKey, *, batch_size: int = 4
) -> Iterator[TopKRow]:
    """Compute the row of each dialogue, in order. Raises UserError as `DialogueEncoder.encode`."""
    device, dtype = vlm.lm_head_weight.device, np.dtype(cache_key.dtype)
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
                    k=cache_key.k,
                    vocab_size=cache_key.vocab_size,
                    temperature=cache_key.temperature,
                )
            for row in range(len(rows)):
                selected = states.rows == row
                yield TopKRow(
                    ids[selected].cpu().numpy().astype(np.uint32),
                    logs[selected].float().cpu().numpy().astype(dtype),
                    tails[selected].float().cpu().numpy(),
                    states.targets[selected].cpu().numpy().astype(np.uint32),
                )
    finally:
        vlm.train(was_training)


class TopKCache:
    """A teacher's cached tokens; `open` one."""

    def __init__(self, store: ArrayStore) -> None:
        self.store, self.folder = store, store.folder
        self.cache_key = TopKCacheKey(**store.cache_key)
        self._arrays = [store.load(name) for name in TopKRow._fields]
        self._offsets = np.concatenate([[0], np.cumsum(store.lengths)])
        self.tokens = int(self._offsets[-1])

    @classmethod
    def open(cls, folder: Path, cache_key: TopKCacheKey) -> Self:
        """Open the cache in `folder`, written for `cache_key`. Raises UserError as `ArrayStore.open`."""
        return cls(ArrayStore.open(folder, KIND, asdict(cache_key)))

    def __len__(self) -> int:
        return self.store.rows

    def missing(self, keys: Sequence[str]) -> int:
        """Return how many of the dialogues with these content keys are not cached."""
        return int((self.store.find(keys) < 0).sum())

    def row(self, key: str) -> TopKRow:
        """Return the row of one dialogue, as stored. Raises UserError if it is not cached."""
        row = int(self.store.find([key])[0])
        if row < 0:
            raise UserError(
                f"a dialogue (content {key[:12]}...) is not in the teacher cache {self.folder}: its images, questions "
                f"or answers have changed; {REWRITE}"
            )
        tokens = slice(int(self._offsets[row]), int(self._offsets[row + 1]))
        return TopKRow(*(array[tokens] for array in self._arrays))

    def gather(self, keys: Sequence[str], targets_T: Tensor | None = None) -> TopKTeacher:
        """Return the tokens of a batch of dialogues, one dialogue after the other.

        Logarithms are float32 and normalised together with the tail; all tensors are on the device of `targets_T`,
        the answers' tokens in the student's encoding (`AnswerStates.targets`), in the same order.

        Raises UserError if a dialogue is not cached, or has other tokens now.
        """
        ids, logs, tails, targets = (np.concatenate(part) for part in zip(*map(self.row, keys), strict=True))
        if targets_T is not None and not np.array_equal(targets, targets_T.cpu().numpy()):
            raise UserError(
                f"the answers have other tokens than those cached in {self.folder}: the tokenizer, the chat template, "
                f"the order of the rows or the answers have changed; {REWRITE}"
            )
        device = torch.device("cpu") if targets_T is None else targets_T.device
        logs_TK, tail_T = torch.from_numpy(logs.astype(np.float32)), torch.from_numpy(tails.astype(np.float32))
        total_T1 = torch.cat([logs_TK, tail_T[:, None]], dim=1).logsumexp(dim=1, keepdim=True)
        ids_TK = torch.from_numpy(ids.astype(np.int64))
        return TopKTeacher((logs_TK - total_T1).to(device), ids_TK.to(device), (tail_T - total_T1[:, 0]).to(device))


def write_topk_cache(
    folder: Path,
    vlm: GroundedVlm,
    dialogues: Sequence[Dialogue],
    cache_key: TopKCacheKey,
    hashes: ContentHashes,
    *,
    batch_size: int = 4,
    block: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the teacher's tokens for the answers of `dialogues` to `folder`; return the number of distinct dialogues.

    A writer that was interrupted resumes after its last complete block of `block` dialogues, and the result is
    byte-equal to that of an undisturbed one. `progress` is called with the number of finished dialogues and of all.

    Raises:
        UserError: there are no dialogues, `folder` holds something else, another process is writing it, a value is not
            finite, or a dialogue cannot be encoded.
    """
    rows = {answers_key(dialogue, hashes): dialogue for dialogue in dialogues}
    with ArrayStoreWriter(folder, KIND, asdict(cache_key)) as writer:
        for begin in range(0, len(rows), block):
            keys = list(rows)[begin : begin + block]
            if not writer.resume(keys):
                part = [rows[key] for key in keys]
                computed = list(teacher_rows(vlm, part, cache_key, batch_size=batch_size))
                for dialogue, row in zip(part, computed, strict=True):
                    _check_finite(row, dialogue.id)
                arrays = {name: np.concatenate([getattr(row, name) for row in computed]) for name in TopKRow._fields}
                writer.append(keys, [len(row.targets) for row in computed], arrays)
            if progress is not None:
                progress(min(begin + block, len(rows)), len(rows))
        return writer.finish()


def _check_finite(row: TopKRow, id: str) -> None:
    finite = np.isfinite(row.log_probabilities.astype(np.float32)).all()
    if not finite or np.isnan(row.log_tail).any() or (row.log_tail > 1e-3).any():
        raise UserError(
            f"the teacher's probabilities for dialogue {id!r} are not finite as {row.log_probabilities.dtype}: write "
            "the cache as float32 or at a higher temperature, or check the teacher's weights"
        )


def verify(
    cache: TopKCache,
    vlm: GroundedVlm,
    dialogues: Sequence[Dialogue],
    hashes: ContentHashes,
    fraction: float = 0.01,
    seed: int = 0,
    tolerance: float = 1e-3,
) -> VerifyReport:
    """Recompute a random fraction of the cached dialogues, at least one, and compare probabilities.

    The difference is that of a token's probability or the tail's; it is infinite if the answer has other tokens. The
    default tolerance is for a teacher in float32; in bfloat16 a row depends on its batch, and about 0.05 is usual.

    Drawn rows of which no dialogue is among `dialogues` are counted as absent.
    """
    drawn = cache.store.sample(fraction, seed)
    rows = {key: dialogue for dialogue in dialogues if (key := answers_key(dialogue, hashes)) in drawn}
    worst, mismatched = 0.0, []
    for key, dialogue in rows.items():
        (new,) = teacher_rows(vlm, [dialogue], cache.cache_key)
        old = cache.row(key)
        distance = _distance(old, new) if np.array_equal(old.targets, new.targets) else math.inf
        worst = max(worst, distance)
        if distance > tolerance:
            mismatched.append(dialogue.id)
    return VerifyReport(len(rows), worst, mismatched, absent=len(drawn) - len(rows))


def _distance(old: TopKRow, new: TopKRow) -> float:
    """Return the largest difference of probabilities, by token id: the last of the K may have changed places."""
    largest = 0.0
    for a, b in ((old, new), (new, old)):
        for ids, logs, other_ids, other_logs in zip(
            a.ids, a.log_probabilities, b.ids, b.log_probabilities, strict=True
        ):
            other = dict(zip(other_ids.tolist(), np.exp(other_logs.astype(np.float64)).tolist(), strict=True))
            # A token that is missing in the other row is at most as likely there as the row's last.
            least = min(other.values())
            for id, p in zip(ids.tolist(), np.exp(logs.astype(np.float64)).tolist(), strict=True):
                difference = abs(p - other[id]) if id in other else max(0.0, p - least)
                largest = max(largest, math.inf if math.isnan(difference) else difference)
    tails = np.abs(np.exp(old.log_tail.astype(np.float64)) - np.exp(new.log_tail.astype(np.float64)))
    return max(largest, float(np.nan_to_num(tails, nan=math.inf).max(initial=0.0)))
