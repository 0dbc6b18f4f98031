"""Models that several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.engine.model.loader import LoadedModel, load_model, model_folder
from tests.models import make_tiny_llama


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="package")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="package")
def tiny(tiny_folder: Path) -> LoadedModel:
    return load_model(tiny_folder, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The default model, fetched and converted into the user's cache as any engine would."""
    return model_folder("smollm2-135m")
