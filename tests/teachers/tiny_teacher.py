"""A teacher of a few weights and samples with questions of different lengths, for the tests of this folder."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from preceptor.task import Batch, TeacherSignal
from preceptor.teachers.cache import CacheKey
from preceptor.teachers.online import OnlineTeacher

IMAGE_TOKENS, WIDTH, HEADS, CLASSES = 4, 8, 2, 5
FIXED = 1 + IMAGE_TOKENS
TOKEN_AXES = {"embed_question": (1,), "fusion": (1,), "attention": (2, 3)}


class TinyNet(nn.Module):
    """Class token, four image tokens and the question through one attention layer, with dropout and BatchNorm."""

    def __init__(self, seed: int = 0, classes: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.patches = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.words = nn.Embedding(20, WIDTH)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.dropout = nn.Dropout(0.5)
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, classes)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, pixels, input_ids, attention_mask) -> TeacherSignal:
        b = len(pixels)
        image = self.norm(self.patches(pixels)).flatten(2).transpose(1, 2)
        question = self.words(input_ids)
        x = self.dropout(torch.cat([self.cls.expand(b, -1, -1), image, question], dim=1))
        mask = torch.cat([attention_mask.new_ones(b, FIXED), attention_mask], dim=1).bool()
        q, k = (f(x).view(b, -1, HEADS, WIDTH // HEADS).transpose(1, 2) for f in (self.query, self.key))
        attention = (q @ k.transpose(2, 3)).masked_fill(~mask[:, None, None], -1e9).softmax(-1)
        fusion = x + attention.mean(1) @ x
        features = {"embed_question": question, "fusion": fusion, "attention": attention, "pooled": fusion[:, 0]}
        return TeacherSignal(self.head(fusion[:, 0]), features, mask)


def forward(model: nn.Module, batch: Batch) -> TeacherSignal:
    return model(batch["pixels"], batch["input_ids"], batch["attention_mask"])


def teacher(seed: int = 0, classes: int = CLASSES) -> OnlineTeacher:
    return OnlineTeacher(TinyNet(seed, classes), forward)


class Samples:
    """`count` random samples with questions of 1 to 7 tokens."""

    def __init__(self, count: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.pixels = torch.randn(count, 3, 8, 8, generator=generator)
        self.lengths = torch.randint(1, 8, (count,), generator=generator).tolist()
        self.questions = [torch.randint(0, 20, (n,), generator=generator) for n in self.lengths]

    def batch(self, indices: list[int], pad_to: int = 0, view: int = 0) -> Batch:
        """Collate samples, padded to the longest question or to `pad_to`; padding holds token 19, a word as any."""
        width = max(pad_to, *(self.lengths[i] for i in indices))
        input_ids, attention_mask = torch.full((len(indices), width), 19), torch.zeros(len(indices), width).long()
        for row, i in enumerate(indices):
            input_ids[row, : self.lengths[i]] = self.questions[i]
            attention_mask[row, : self.lengths[i]] = 1
        tensors = {"pixels": self.pixels[indices], "input_ids": input_ids, "attention_mask": attention_mask}
        return Batch(tensors, [f"sample-{i}" for i in indices], [self.key(i, view) for i in indices])

    def key(self, index: int, view: int = 0) -> str:
        content = self.pixels[index].numpy().tobytes() + bytes(self.questions[index].tolist())
        return hashlib.sha256(content + b"|%d" % view).hexdigest()

    def batches(self, size: int = 4) -> list[Batch]:
        return [self.batch(list(range(i, min(i + size, len(self.lengths))))) for i in range(0, len(self.lengths), size)]


def cache_key(source, **changes) -> CacheKey:
    values = {
        "teacher": source.fingerprint,
        "vocabulary": "v" * 64,
        "data": "tiny 0123",
        "variant": "clean",
        "preprocessing": {"image_size": 8, "mean": (0.5, 0.5, 0.5), "tokenizer": "t" * 64},
        "augmentation": {"views": 1},
    }
    return CacheKey(**{**values, **changes})
