"""Parameter groups and optimizers; their state as named tensors, whole wherever it is sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from gpt2.config import OptimConfig
from gpt2.errors import UserError

Group = dict[str, object]


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix inside a block, which Muon is made for."""
    return name.startswith("h.") and parameter.ndim == 2


def make_optimizers(model: nn.Module, config: OptimConfig, device: torch.device) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest.

    Weight decay applies to tensors of two or more dimensions: matrices and embeddings, not biases and norms. Every
    group has its peak learning rate as "initial_lr"; `set_learning_rates` scales it.

    Args:
        model: a GPT, not wrapped: the parameters' names choose their group.
        config: the optimizers' settings.
        device: the parameters are on.

    Raises:
        UserError: this version of PyTorch has no Muon.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    muon = {n: p for n, p in named.items() if config.optimizer == "muon" and is_hidden_matrix(n, p)}
    decayed = {n: p for n, p in named.items() if n not in muon and p.ndim >= 2}
    undecayed = {n: p for n, p in named.items() if p.ndim < 2}

    adamw_groups: list[Group] = [
        {"name": "decayed", "params": list(decayed.values()), "weight_decay": config.weight_decay},
        {"name": "not decayed", "params": list(undecayed.values()), "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [group for group in adamw_groups if group["params"]],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.adam_eps,
            fused=device.type in ("cuda", "cpu"),
        )
    ]
    if muon:
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"PyTorch {torch.__version__} has no Muon; use --optimizer adamw or PyTorch 2.9 or later")
        optimizers.append(
            torch.optim.Muon(
                [{"name": "blocks' matrices", "params": list(muon.values())}],
                lr=config.muon_learning_rate,
                weight_decay=config.weight_decay,
                momentum=config.muon_momentum,
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    grouped = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in named.values()), "every parameter is in exactly one group"
    return optimizers


def describe_groups(optimizers: list[torch.optim.Optimizer]) -> list[str]:
    """A line a parameter group: optimizer, tensors, parameters, peak learning rate, weight decay."""
    return [
        f"{type(optimizer).__name__} {group['name']}: {len(group['params'])} tensors, "
        f"{sum(p.numel() for p in group['params']):,} parameters, "
        f"peak lr {group['initial_lr']:.3g}, weight decay {group['weight_decay']:g}"
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to its peak times `gpt2.train.schedule.lr_factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def step_unless(optimizers: list[torch.optim.Optimizer], veto: Tensor) -> None:
    """Update the weights unless `veto`, a scalar 0.0 or 1.0 on the device, is 1.

    A fused AdamW takes the decision on the device, as under a gradient scaler, so the host does not wait for it; any
    other optimizer makes the host read it first.
    """
    if all(optimizer.defaults.get("fused") for optimizer in optimizers):
        for optimizer in optimizers:
            optimizer.found_inf = veto  # type: ignore[attr-defined]
            optimizer.step()
    elif not veto.item():
        for optimizer in optimizers:
            optimizer.step()


def state_tensors(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], gather: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The optimizers' state as tensors named `<state>.<parameter>`, such as `exp_avg.h.0.attn.c_attn.weight`.

    Args:
        model: the one they update.
        optimizers: made by `make_optimizers`.
        gather: makes a tensor whole, where it is sharded, and keeps it where it should; every process calls it in the
            same order.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"{key}.{names[id(parameter)]}"] = gather(value)
    return tensors


def load_state_tensors(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    tensors: Iterable[tuple[str, Tensor]],
    place: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Put back what `state_tensors` returned.

    Args:
        model: the one they update.
        optimizers: made by `make_optimizers`.
        tensors: names and whole tensors.
        place: (whole tensor, parameter) to a copy on the parameter's device, sharded as it is.

    Raises:
        UserError: state of a parameter that does not exist, or none of one that does.
    """
    parameters = dict(model.named_parameters())
    owners = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = set(parameters)
    for full_name, tensor in tensors:
        key, _, name = full_name.partition(".")
        if name not in parameters:
            raise UserError(f"the checkpoint's optimizer state is of {name!r}, which this model does not have")
        parameter = parameters[name]
        state = owners[id(parameter)].state[parameter]
        if tensor.ndim == 0:  # AdamW's count of steps, never sharded
            state[key] = tensor.to(parameter.device, copy=True)
        else:
            state[key] = place(tensor, parameter)
        missing.discard(name)
    if missing:
        raise UserError(f"the checkpoint holds no optimizer state of {min(missing)!r}; was it trained with Muon?")
