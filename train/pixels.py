"""Pictures as networks that draw want them."""

import numpy as np
import torch


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """`(H, W, 3)` uint8 -> `(3, H, W)` float32 in -1..1."""
    return torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1
