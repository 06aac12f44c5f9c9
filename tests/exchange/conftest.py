"""What several modules stand on."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def copy(contributions, tmp_path) -> Path:
    return Path(shutil.copytree(contributions["code"], tmp_path / "copy"))
