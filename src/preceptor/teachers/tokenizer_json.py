"""The content of a fast tokenizer, for cache keys."""

from __future__ import annotations

import json
from typing import Any


def tokenizer_json(backend: Any) -> str:
    """Return a tokenizer of the package tokenizers as JSON, without its truncation and padding.

    These two are not properties of the tokenizer but settings of its last call, and they are stored with a model.
    """
    settings = json.loads(backend.to_str())
    del settings["truncation"], settings["padding"]
    return json.dumps(settings, sort_keys=True)
