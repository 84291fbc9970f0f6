"""Parameter groups and optimizers; their state as named tensors, whole wherever it is sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from gpt2.config import OptimConfig
from gpt2.errors import UserError
from gpt2.hardware import multiplies_bf16
from gpt2.model.attention import CausalSelfAttention
from gpt2.model.gpt import GPT
from gpt2.train.muon import Muon

Group = dict[str, object]


def group_of(name: str, parameter: nn.Parameter) -> str:
    """The parameter group a tensor belongs to: embedding, head, matrices (of the blocks) or vectors (1-D tensors)."""
    if parameter.ndim < 2:
        return "vectors"
    if name in ("wte.weight", "wpe.weight"):
        return "embedding"
    return "head" if name == "lm_head.weight" else "matrices"


def make_optimizers(
    model: nn.Module, config: OptimConfig, device: torch.device, dtype: str = "fp32"
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest; with the state of step 0.

    Each group of `group_of` has a learning rate and a weight decay of its own; a tied head is an embedding. Every
    group has its peak learning rate as "initial_lr"; `set_learning_rates` scales it.

    Args:
        model: a GPT, not wrapped: the parameters' names choose their group.
        config: the optimizers' settings.
        device: the parameters are on.
        dtype: precision of the run's matrix products, which Muon's are computed in; bf16 only where the device
            multiplies it.
    """
    members: dict[str, list[nn.Parameter]] = {}
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group_name = group_of(name, parameter)
            members.setdefault(group_name, []).append(parameter)
            size = model.size_of(name, parameter) if isinstance(model, GPT) else parameter.numel()
            sizes[group_name] = sizes.get(group_name, 0) + size
    matrices = members.pop("matrices", []) if config.optimizer == "muon" else []
    peaks = {
        "embedding": config.embedding_learning_rate,
        "head": config.head_learning_rate,
        "vectors": config.vector_learning_rate,
    }
    decays = {
        "embedding": config.embedding_weight_decay,
        "head": config.head_weight_decay,
        "vectors": config.vector_weight_decay,
    }

    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    adamw_groups: list[Group] = [
        {
            "name": name,
            "params": parameters,
            "lr": given(peaks.get(name), config.learning_rate),
            "weight_decay": given(decays.get(name), config.weight_decay),
        }
        for name, parameters in members.items()
    ]
    adamw = torch.optim.AdamW(
        adamw_groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=device.type in ("cuda", "cpu"),
    )
    optimizers: list[torch.optim.Optimizer] = [adamw]
    for group in adamw.param_groups:
        for parameter in group["params"]:  # as PyTorch makes it in the first step, which may be skipped
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            steps_on = device if adamw.defaults["fused"] else None
            adamw.state[parameter] = {"step": torch.zeros((), device=steps_on), **moments}
    if matrices:
        qkv = {} if config.muon_qkv == "together" else _qkv_rows(model)
        splits = [qkv.get(id(matrix), [matrix.shape[0]]) for matrix in matrices]
        optimizers.append(
            Muon(
                [{"name": "matrices", "params": matrices, "splits": splits}],
                lr=config.muon_learning_rate,
                weight_decay=given(config.muon_weight_decay, config.weight_decay),
                momentum=config.muon_momentum,
                steps=config.newton_schulz_steps,
                coefficients=config.newton_schulz_coefficients,
                normuon=config.normuon,
                dtype=torch.bfloat16 if dtype == "bf16" and multiplies_bf16(device) else torch.float32,
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"], group["parameters"] = group["lr"], sizes[group["name"]]
    grouped = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    named = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(named), "every parameter is in exactly one group"
    return optimizers


def _qkv_rows(model: nn.Module) -> dict[int, list[int]]:
    """How many rows of queries, keys and values each such weight holds, by the weight's id."""
    attentions = [module for module in model.modules() if isinstance(module, CausalSelfAttention)]
    return {id(attention.c_attn.weight): attention.qkv_widths for attention in attentions}


def describe_groups(optimizers: list[torch.optim.Optimizer]) -> list[str]:
    """One line per parameter group: optimizer, tensors, parameters, peak learning rate, weight decay."""
    return [
        f"{type(optimizer).__name__} {group['name']}: {len(group['params'])} tensors"
        + (f" in {sum(map(len, group['splits']))} matrices, " if "splits" in group else ", ")
        + f"{group['parameters']:,} parameters, "
        f"peak lr {group['initial_lr']:.3g}, weight decay {group['weight_decay']:g}"
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to its peak times `gpt2.train.schedule.lr_factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def step_unless(optimizers: Sequence[torch.optim.Optimizer], veto: Tensor) -> None:
    """Update the weights unless `veto`, a scalar 0.0 or 1.0 on the device, is 1.

    Muon and a fused AdamW take the decision on the device, as under a gradient scaler, so the host does not wait for
    it; an AdamW that is not fused makes the host read it first.
    """
    on_device = [isinstance(optimizer, Muon) or optimizer.defaults.get("fused") for optimizer in optimizers]
    if not all(on_device) and veto.item():
        return
    for optimizer, decides in zip(optimizers, on_device, strict=True):
        if decides:
            optimizer.found_inf = veto  # type: ignore[attr-defined]
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
        UserError: state that these optimizers do not keep, or some missing that they do.
    """
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    states = {names[id(p)]: state for optimizer in optimizers for p, state in optimizer.state.items()}
    missing = {f"{key}.{name}" for name, state in states.items() for key in state}
    for full_name, tensor in tensors:
        if full_name not in missing:
            raise UserError(f"the checkpoint's optimizer state holds {full_name!r}, which this run's does not")
        missing.remove(full_name)
        key, _, name = full_name.partition(".")
        parameter = parameters[name]
        held = states[name][key]
        if (tensor.shape, tensor.dtype) != (held.shape, held.dtype):
            raise UserError(
                f"the checkpoint's optimizer state {full_name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, not "
                f"{held.dtype} of shape {tuple(held.shape)}"
            )
        if tensor.ndim == 0:  # AdamW's count of steps, never sharded
            states[name][key] = tensor.to(parameter.device, copy=True)
        else:
            states[name][key] = place(tensor, parameter)
    if missing:
        raise UserError(
            f"the checkpoint holds no optimizer state {min(missing)!r}; was it trained with another --optimizer?"
        )
