"""The state of a run: what learns, its moving average, and the optimizers' moments; on disk as safetensors.

A run may be divided over processes (`train.processes`); on disk everything is whole, so that any number of processes can
go on with it.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from nested_attention.errors import NestedAttentionError
from nested_attention.files import put_back, replaced

TENSORS = ("model", "average", "optimizer")


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, on the CPU; of a divided one every process has to ask at the same time."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """`value` where `tensor` lies: on its device, and divided as it is."""
    if isinstance(tensor, DTensor):
        return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    return value.to(tensor.device)


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class Average:
    """The moving average of what learns."""

    def __init__(self, model: nn.Module):
        self.parameters = learning(model)
        self.tensors = {name: value.clone() for name, value in self.current.items()}

    @property
    def current(self) -> dict[str, Tensor]:
        """The weights themselves, wherever they lie now: a model that several processes train moves to other memory."""
        return {name: parameter.data for name, parameter in self.parameters.items()}

    def update(self, decay: float) -> None:
        torch._foreach_lerp_(list(self.tensors.values()), list(self.current.values()), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the average for its weights."""
        kept = {name: value.clone() for name, value in self.current.items()}
        for name, value in self.current.items():
            value.copy_(self.tensors[name])
        try:
            yield
        finally:
            for name, value in self.current.items():
                value.copy_(kept[name])


@torch.no_grad()
def load_weights(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Puts the whole tensors of `saved` into `tensors`.

    Raises:
        NestedAttentionError: they are those of another model.
    """
    for name, tensor in tensors.items():
        if name not in saved or saved[name].shape != tensor.shape:
            raise NestedAttentionError(
                f"the run's checkpoint is that of another model: {name} is not in it, or of another size; go on with the config that "
                "the run began with, or start another one with --out."
            )
        tensor.copy_(like(tensor, saved[name]))


def optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The state of all optimizers as one flat dict, keyed `parameter/quantity`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{quantity}": torch.as_tensor(value)
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for quantity, value in state.items()
    }


def load_optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer], flat: dict[str, Tensor]) -> None:
    """Restores what `optimizer_tensors` gave."""
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        name, quantity = key.split("/")
        states.setdefault(name, {})[quantity] = value
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if names[parameter] in states:
                    optimizer.state[parameter] = {
                        quantity: like(parameter, value) if value.ndim else value for quantity, value in states[names[parameter]].items()
                    }


class Checkpoint:
    """Weights, average and optimizer state of a run, replaced as a whole."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, tensors: dict[str, dict[str, Tensor]], progress: dict[str, Any]) -> None:
        """Writes whole tensors.

        Raises:
            NestedAttentionError: the disk is full; the last checkpoint is still there.
        """
        with replaced(self.folder) as fresh:
            fresh.mkdir()
            for name, content in tensors.items():
                save_file({key: value.contiguous().clone() for key, value in content.items()}, fresh / f"{name}.safetensors")
            (fresh / "progress.json").write_text(json.dumps(progress))

    def load(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """What was saved last; None if nothing was.

        Raises:
            NestedAttentionError: a file is missing or damaged.
        """
        put_back(self.folder)
        if not self.folder.exists():
            return None
        path, tensors = self.folder / "progress.json", {}
        try:
            progress = json.loads(path.read_text())
            for name in TENSORS:
                path = self.folder / f"{name}.safetensors"
                tensors[name] = load_file(path)
        except (OSError, ValueError, SafetensorError) as error:
            raise NestedAttentionError(
                f"{path} is missing or damaged ({error}); put back a copy, or remove the folder {self.folder} to begin the run again."
            ) from error
        return tensors, progress
