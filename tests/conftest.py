"""One thread per test process, no network, and an absolute path of the real data sets.

With one thread per process, as many processes as cores run side by side.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PRECEPTOR_DATA" in os.environ:
    # Some tests link to real files from a temporary folder, or run commands there.
    os.environ["PRECEPTOR_DATA"] = str(Path(os.environ["PRECEPTOR_DATA"]).resolve())

import pytest
import torch
from hypothesis import HealthCheck, settings

# No test is timed: a busy machine is no defect.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that read real data sets if their folder is not known."""
    if "PRECEPTOR_DATA" not in os.environ:
        for item in items:
            if item.get_closest_marker("real_data"):
                item.add_marker(pytest.mark.skip(reason="PRECEPTOR_DATA is not set"))
