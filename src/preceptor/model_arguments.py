"""Models and devices as the public functions take them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from preceptor import tasks
from preceptor.arguments import as_path
from preceptor.errors import UserError
from preceptor.extension import require_trust

if TYPE_CHECKING:
    import torch


def model_name(model: Path, given: Path) -> str:
    """Return the name of a model: that of its stage, of its folder, or of the packed file."""
    place = model.resolve()
    return given.stem if given.is_file() else place.parent.name if place.name == "model" else place.name


def require_device(device: str | torch.device | None) -> None:
    """Raise UserError if a device is unknown or cannot be used here."""
    if device is None or str(device) == "cpu":  # torch, which takes seconds to import, is not needed to tell
        return
    import torch

    try:
        torch.zeros(1, device=torch.device(device)).cpu()
    except Exception as error:  # AssertionError, RuntimeError, ImportError, ...: each kind of device has its own
        reason = str(error).partition(". ")[0].partition("\n")[0].rstrip(".")
        if "Expected one of" in reason:  # what follows are all kinds that torch was ever built for
            reason = "torch has no kind of device of this name"
        count = torch.accelerator.device_count()
        kind = torch.accelerator.current_accelerator() if count else None
        available = ["cpu", *(f"{kind.type}:{number}" for number in range(count) if kind is not None)]
        raise UserError(
            f"the device {str(device)!r} cannot be used here ({reason}); available: {', '.join(available)}"
        ) from None


def trusted_model(run: str | Path, trust_remote_code: bool) -> tuple[Path, str]:
    """Return the model folder of a run and its task. Raises UserError if it needs code that is not trusted."""
    from preceptor.pipeline.run_dir import model_folder

    folder = model_folder(as_path(run, "run"))
    task = tasks.task_of_model(folder)
    require_trust(folder, trust_remote_code)
    return folder, task
