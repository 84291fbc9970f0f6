"""What tests/train/test_muon.py looks at, done by two real processes:

    torchrun --nproc_per_node=2 two_muons.py DATA OUT

Each leaves the weights and momentum of some Muon steps in OUT/<case>_rank<rank>.safetensors, and both train small runs.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from small_runs import small, train
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from gpt2.distributed.parallel import place_like, whole
from gpt2.distributed.world import joined_world
from gpt2.train import muon
from gpt2.train.muon import Muon

# Wide, tall, square, three in one, fewer rows than processes, rows that two processes do not share evenly.
SHAPES = {
    **{"wide": (6, 14), "tall": (14, 6), "square": (6, 6), "one row": (1, 6), "odd": (7, 6), "other odd": (7, 6)},
    "qkv": (18, 6),
    "grouped qkv": (12, 6),
}
SPLITS = {"qkv": [6, 6, 6], "grouped qkv": [6, 3, 3]}
CASES = {
    f"{parallel} {kind} {dtype}": (parallel, kind == "normuon", getattr(torch, dtype))
    for parallel, kind, dtype in itertools.product(("ddp", "fsdp"), ("muon", "normuon"), ("float32", "bfloat16"))
}
RUNS: dict[str, dict[str, Any]] = {
    "muon_ddp": {"optimizer": "muon", "micro_batch_size": 4},
    "muon_fsdp": {"optimizer": "muon", "micro_batch_size": 4, "parallel": "fsdp"},
    "normuon_fsdp": {"optimizer": "muon", "micro_batch_size": 4, "parallel": "fsdp", "normuon": True},
}


def random(seed: int, shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps(parallel: str, normuon: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights and state, whole, after four steps, of which the first and the third are vetoed; batches are small."""
    parameters = {name: nn.Parameter(random(i, shape)) for i, (name, shape) in enumerate(SHAPES.items())}
    if parallel == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        shard = torch.distributed.tensor.Shard(0)
        for name, parameter in parameters.items():
            sharded = torch.distributed.tensor.distribute_tensor(parameter.detach(), mesh, [shard])
            parameters[name] = nn.Parameter(sharded)
    splits = [SPLITS.get(name, [shape[0]]) for name, shape in SHAPES.items()]
    group = {"params": list(parameters.values()), "splits": splits}
    muon.BATCH_ELEMENTS = 80
    optimizer = Muon([group], lr=0.1, weight_decay=0.3, momentum=0.9, normuon=normuon, dtype=dtype)
    for step in range(4):
        vetoed = step % 2 == 0
        for i, (name, shape) in enumerate(SHAPES.items()):
            gradient = random(100 * (step + 1) + i, shape)
            if vetoed:
                gradient[-1] = torch.nan
            parameters[name].grad = place_like(gradient, parameters[name])
        optimizer.found_inf = torch.tensor(float(vetoed))
        optimizer.step()
    found = {name: whole(parameter.detach()) for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        found |= {f"{key}.{name}": whole(value) for key, value in optimizer.state[parameter].items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def main() -> None:
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    with joined_world("cpu") as this:
        for name, case in CASES.items():
            save_file(steps(*case), out / f"{name}_rank{this.rank}.safetensors")
        for name, changes in RUNS.items():
            train(small(data, out / name, **changes), world=this)


if __name__ == "__main__":
    main()
