"""The app as a process of its own for tests: `python -m tests.serve PORT`, on tiny random weights."""

import sys

from app import launch
from nested_attention.ui.studio import Studio
from tests import tiny

if __name__ == "__main__":
    launch(Studio(tiny.pipeline("sd")), int(sys.argv[1]))
