"""What `import preceptor` costs, and model folders in transformers' Auto classes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.model_folders import templates
from tests.vqa.conftest import make_bundle, make_data


def python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_import_loads_no_slow_package() -> None:
    slow = "torch", "transformers", "numpy", "matplotlib", "monai", "scipy", "pandas", "PIL", "huggingface_hub"
    assert python(f"import sys, preceptor\nprint([name for name in {slow} if name in sys.modules])") == "[]"


def test_the_public_names_exist() -> None:
    assert python("import preceptor\nprint([n for n in preceptor.__all__ if not hasattr(preceptor, n)])") == "[]"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with untrained models in `VqaTransformer` and `PretrainedUNet`, the names of their classes."""
    from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig

    root = tmp_path_factory.mktemp("auto")
    make_bundle(make_data(root / "data"), 16, 0).save(root / "VqaTransformer")
    config = MultimodalUNetConfig(("flair", "t1"), ("et",), channels=(4, 4, 8))
    MultimodalUNet(config, seed=0).save(root / "PretrainedUNet")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["VqaTransformer", "PretrainedUNet"])
@pytest.mark.parametrize(
    "imports",
    [
        "import preceptor\nfrom transformers import AutoModel",
        "from transformers import AutoModel\nimport preceptor",
        # This configuration imports the Auto classes while it is only half imported.
        "import preceptor\nfrom transformers import Qwen2VLConfig, AutoModel",
    ],
    ids=["preceptor first", "transformers first", "a configuration first"],
)
def test_transformers_loads_a_model_folder(models: Path, imports: str, kind: str) -> None:
    program = f"{imports}\nprint(type(AutoModel.from_pretrained({str(models / kind)!r})).__name__)"
    assert python(program).endswith(kind)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vqa", "segmentation", "grounding"])
def test_a_new_process_loads_a_model_folder(task: str) -> None:
    """Other tests import modules in an order of their own, which hides cycles."""
    program = f"import preceptor\nprint(type(preceptor.load({str(templates() / task)!r})).__name__)"
    assert python(program) == {"vqa": "VqaModel"}.get(task, f"{task.capitalize()}Model")


IMPORT_EACH = """
import importlib, os, pkgutil, sys
import torch, scipy, matplotlib, nibabel, tokenizers, transformers.modeling_utils, preceptor
assert "transformers.models.auto.modeling_auto" not in sys.modules
names = [module.name for module in pkgutil.walk_packages(preceptor.__path__, "preceptor.")]
for name in names:
    if name == "preceptor.__main__" or name.startswith("preceptor.integrations."):
        continue
    child = os.fork()
    if not child:
        try:
            importlib.import_module(name)
        except BaseException as error:
            print(name, error)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
def test_every_module_can_be_imported_first() -> None:
    assert python(IMPORT_EACH) == ""


@pytest.mark.slow
def test_segmentation_does_not_import_transformers() -> None:
    program = "import sys, preceptor.segmentation.experiment, preceptor.segmentation.predict"
    assert python(f"{program}\nprint('transformers' in sys.modules)") == "False"
