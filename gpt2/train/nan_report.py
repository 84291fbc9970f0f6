"""Where a step's first value that is not finite is: the step is done again under hooks, eagerly, without an update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gpt2.distributed.world import World
from gpt2.model.attention_kernels import training_backends
from gpt2.model.gpt import GPT
from gpt2.precision import autocast
from gpt2.train.step import MicroBatches


def is_finite(value: Any) -> bool:
    """Whether all numbers of a tensor, or of this process's part of it, are finite; what is no tensor counts as so."""
    value = value.to_local() if isinstance(value, DTensor) else value
    return not isinstance(value, Tensor) or bool(value.detach().isfinite().all())


def first_nonfinite(model: GPT, batches: MicroBatches, world: World, dtype: str) -> list[str | None]:
    """What is first not finite in each process: a weight, a module's output, the loss or a gradient; None: nothing is.

    All processes call this together. Nothing but the gradients, which are gone afterwards, is changed.

    Args:
        model: the GPT itself, not wrapped by DDP; random numbers seeded as in the step.
        batches: this process's part of the step.
        world: the processes.
        dtype: the precision the step was computed in.
    """
    parameters = dict(model.named_parameters())
    modules = {name: module for name, module in model.named_modules() if name}
    # The same list in every process, so that a place in it is all they need to tell each other.
    places = [f"the weight {name}" for name in parameters]
    places += [*(f"the output of {name}" for name in modules), "the loss"]
    places += [f"the gradient of {name}" for name in parameters]
    found = [f"the weight {name}" for name, parameter in parameters.items() if not is_finite(parameter)]

    def note(place: str, value: Any) -> None:
        if not found and not is_finite(value):
            found.append(place)

    hooks = [
        module.register_forward_hook(lambda _, __, output, place=f"the output of {name}": note(place, output))
        for name, module in modules.items()
    ]
    hooks += [
        parameter.register_post_accumulate_grad_hook(
            lambda parameter, place=f"the gradient of {name}": note(place, parameter.grad)
        )
        for name, parameter in parameters.items()
    ]
    with torch.compiler.set_stance("force_eager"):  # hooks are not compiled into what was compiled without them
        for tokens, targets in batches:
            with autocast(world.device, dtype), training_backends(world.device):
                loss = model(tokens, targets)
            note("the loss", loss)
            if not isinstance(model, FSDPModule):  # whose backward pass mixes the gradients of all processes
                loss.backward()
    for hook in hooks:
        hook.remove()
    if isinstance(model, FSDPModule):
        model.reshard()
    model.zero_grad(set_to_none=True)
    own = torch.zeros(world.size, device=world.device)
    own[world.rank] = places.index(found[0]) + 1 if found else 0
    return [places[int(place) - 1] if place else None for place in world.sum_(own).tolist()]
