"""The app as a process of its own for tests: `python -m tests.serve PORT`, on tiny random weights."""

import sys
import time

from app import launch
from nested_attention.ui.studio import Studio
from tests import tiny

if __name__ == "__main__":
    pipe = tiny.pipeline("sd")
    # A step takes its time: else a busy browser lags behind until there is nothing left to cancel.
    pipe.stock.unet.register_forward_hook(lambda *_: time.sleep(0.2))
    launch(Studio(pipe), int(sys.argv[1]))
