"""What several test files of the app start with: tiny random weights, the handlers of a page, two photos."""

from pathlib import Path

import pytest

from nested_attention import NestedAttentionPipeline
from nested_attention.ui.examples import load_examples
from nested_attention.ui.handlers import Handlers
from nested_attention.ui.studio import Studio
from tests import tiny


@pytest.fixture(scope="session")
def pipe() -> NestedAttentionPipeline:
    return tiny.pipeline("sd")


@pytest.fixture
def handlers(pipe: NestedAttentionPipeline) -> Handlers:
    return Handlers(Studio(pipe), load_examples())


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    files = [str(tmp_path / f"{k}.png") for k in range(2)]
    for k, file in enumerate(files):
        tiny.photo(k).save(file)
    return files
