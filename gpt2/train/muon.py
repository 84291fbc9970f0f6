"""Muon: momentum whose singular values are all brought near 1 (Jordan 2024, https://kellerjordan.github.io/posts/muon/).

A gradient of a weight matrix has a few large singular values, and SGD or Adam moves along these directions alone. Muon
replaces the momentum U S Vᵀ by about U Vᵀ, so that the rare directions are learned as fast as the frequent ones. For
that it needs no decomposition: a polynomial p(x) = a x + b x³ + c x⁵, applied over and over to a matrix, is applied to
its singular values (Newton-Schulz iteration), and that is matrix products alone.

They are most of this optimizer's work, so matrices of one shape are stacked and multiplied together, tall ones lying
down beside wide ones; and over several processes each matrix is worked on once. `Replicated` (DDP) and `Sharded`
(FSDP2) say how a batch's matrices come to the processes that work on them, and how the results come back, while the
next batch is being worked on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

BATCH_ELEMENTS = 2**24
"""Elements of the matrices that one process orthogonalises together: enough to fill a GPU, and 32 MiB in bf16."""
NORMUON_BETA2 = 0.95
"""NorMuon's decay of the second moment per step (arXiv 2510.05491, section 4)."""
Group = dict[str, Any]


def newton_schulz(matrices: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """Bring the singular values of matrices near 1, and leave their singular vectors.

    Args:
        matrices: (n, rows, columns), in the type to compute in; no more rows than columns, which costs least.
        steps: iterations.
        coefficients: a, b, c of the polynomial. Jordan's (3.4445, -4.7750, 2.0315) grow small values fastest and stop
            between about 0.7 and 1.2; (2, -1.5, 0.5) converge to 1.
    """
    a, b, c = coefficients
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value is above 1
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


@dataclass(frozen=True)
class Matrix:
    """What is orthogonalised by itself: some rows of a parameter."""

    parameter: Tensor
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, columns."""
        return self.stop - self.start, self.parameter.shape[1]

    @property
    def lying(self) -> tuple[int, int]:
        """Its shape with the longer side across."""
        return min(self.shape), max(self.shape)

    @property
    def scale(self) -> float:
        """Factor of its update, so that one learning rate suits all shapes."""
        rows, columns = self.shape
        return max(1.0, rows / columns) ** 0.5

    def turn(self, x: Tensor) -> Tensor:
        """Lay a tall matrix down, or stand it up again."""
        return x.mT if self.shape[0] > self.shape[1] else x

    def held_rows(self, rank: int, ranks: int) -> slice:
        """Which rows of its part of the parameter a process finds this matrix in.

        Args:
            rank: the process.
            ranks: processes the parameter's rows are sharded over, in `torch.chunk`'s parts as `Shard(0)`; 1: it is
                whole.
        """
        chunk = -(-self.parameter.shape[0] // ranks)
        first = rank * chunk
        return slice(*(min(max(row - first, 0), chunk) for row in (self.start, self.stop)))

    def shape_held(self, rank: int, ranks: int) -> tuple[int, int]:
        """Rows and columns of it that a process holds."""
        rows = self.held_rows(rank, ranks)
        return rows.stop - rows.start, self.shape[1]


Batch = Sequence[Matrix]
"""Matrices of one shape, lying. The process of rank r works on those numbered r, r + ranks, r + 2 ranks, ..."""


class Replicated:
    """DDP, or one process alone: every process holds all rows, and gets all results."""

    part = (0, 1)
    """Which part of the parameters' rows this process holds, of how many."""

    def __init__(self) -> None:
        alone = not dist.is_initialized()
        self.rank, self.ranks = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())

    def collect(self, batch: Batch, updates: list[Tensor]) -> Callable[[], Tensor]:
        """Bring the rows together of the matrices this process works on; returns what waits for them.

        Args:
            batch: the matrices.
            updates: the rows of each that this process holds.
        """
        mine = slice(self.rank, None, self.ranks)
        stacked = _stack(batch[mine], updates[mine], batch[0].lying, updates[0])
        return lambda: stacked

    def spread(self, batch: Batch, results: Tensor) -> Callable[[], list[Tensor]]:
        """Send results to the processes that hold the rows; returns what waits for this process's, of each matrix.

        Args:
            batch: the matrices.
            results: (this process's matrices, lying).
        """
        if self.ranks == 1:
            return lambda: [matrix.turn(x) for matrix, x in zip(batch, results, strict=True)]
        each = -(-len(batch) // self.ranks)
        sent = results.new_zeros(each, *batch[0].lying)  # some processes may have one matrix less
        sent[: len(results)] = results
        received = results.new_empty(self.ranks, *sent.shape)
        work = dist.all_gather_into_tensor(_bytes(received), _bytes(sent), async_op=True)

        def arrived() -> list[Tensor]:
            work.wait()
            return [matrix.turn(received[i % self.ranks, i // self.ranks]) for i, matrix in enumerate(batch)]

        return arrived

    def sum_(self, values: Tensor) -> Tensor:
        """Sums over rows, which this process has all of."""
        return values


class Sharded:
    """FSDP2: every process holds some of a parameter's rows, and needs the results for these."""

    def __init__(self, parameter: DTensor) -> None:
        self.group = parameter.device_mesh.get_group()
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.part = (self.rank, self.ranks)

    def collect(self, batch: Batch, updates: list[Tensor]) -> Callable[[], Tensor]:
        """Like `Replicated.collect`: one message to each process, with the rows of all the matrices it works on."""
        mine = batch[self.rank :: self.ranks]
        sent = [updates[rank :: self.ranks] for rank in range(self.ranks)]
        shapes = [[matrix.shape_held(rank, self.ranks) for matrix in mine] for rank in range(self.ranks)]
        arrived = self._exchange(sent, shapes, updates[0])

        def stacked() -> Tensor:
            whole = [torch.cat(rows) for rows in zip(*arrived(), strict=True)]
            return _stack(mine, whole, batch[0].lying, updates[0])

        return stacked

    def spread(self, batch: Batch, results: Tensor) -> Callable[[], list[Tensor]]:
        """Like `Replicated.spread`: the same messages, backwards."""
        mine = [m.turn(x) for m, x in zip(batch[self.rank :: self.ranks], results, strict=True)]
        sent, shapes = [], []
        for rank in range(self.ranks):
            starts = [sum(m.shape_held(r, self.ranks)[0] for r in range(rank)) for m in batch[self.rank :: self.ranks]]
            counts = [m.shape_held(rank, self.ranks)[0] for m in batch[self.rank :: self.ranks]]
            sent.append([x[i : i + n] for x, i, n in zip(mine, starts, counts, strict=True)])
            shapes.append([m.shape_held(self.rank, self.ranks) for m in batch[rank :: self.ranks]])
        arrived = self._exchange(sent, shapes, results)

        def in_order() -> list[Tensor]:
            by_owner = arrived()
            return [by_owner[i % self.ranks][i // self.ranks] for i in range(len(batch))]

        return in_order

    def sum_(self, values: Tensor) -> Tensor:
        """Sums over a matrix's rows, wherever they are."""
        dist.all_reduce(values, group=self.group)
        return values

    def _exchange(
        self, sent: list[list[Tensor]], shapes: list[list[tuple[int, int]]], like: Tensor
    ) -> Callable[[], list[list[Tensor]]]:
        """Send each process its tensors; returns what waits for those each process sends here, of known shapes."""
        message = torch.cat([like.new_empty(0), *(x.flatten() for tensors in sent for x in tensors)])
        counts = [[rows * columns for rows, columns in each] for each in shapes]
        received = like.new_empty(sum(map(sum, counts)))
        size = like.element_size()
        work = dist.all_to_all_single(
            _bytes(received),
            _bytes(message),
            [sum(each) * size for each in counts],
            [sum(x.numel() for x in tensors) * size for tensors in sent],
            group=self.group,
            async_op=True,
        )

        def arrived() -> list[list[Tensor]]:
            work.wait()
            parts = iter(received.split([count for each in counts for count in each]))
            return [[next(parts).view(shape) for shape in each] for each in shapes]

        return arrived


def _stack(batch: Batch, updates: Sequence[Tensor], shape: tuple[int, int], like: Tensor) -> Tensor:
    stacked = like.new_empty(len(batch), *shape)
    for row, matrix, update in zip(stacked, batch, updates, strict=True):
        row.copy_(matrix.turn(update))
    return stacked


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)  # gloo does not know every type


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Muon(torch.optim.Optimizer):
    """Muon and NorMuon, for matrices inside a network.

    Per step: m ← lerp(m, g, 1 - momentum); u = lerp(g, m, momentum) (Nesterov); the update is `newton_schulz(u)` times
    √max(1, rows / columns); the weight decays by lr × weight_decay of itself, and lr × update is subtracted. NorMuon
    (Li et al. 2025, arXiv 2510.05491) divides each row of the update by the root of its mean square, averaged over
    steps, and restores the update's norm: rows, which are neurons, then learn at one pace.

    Every process of a run makes one, of the same parameters: all whole (DDP, one process) or all sharded by rows
    (FSDP2), and calls `step` at the same time. The updates do not depend on the number of processes.

    Args:
        groups: each with "params", all of two dimensions, and "splits": for each of these the numbers of rows that are
            orthogonalised apart. An attention's q, k and v, stacked in one parameter, are three matrices.
        lr: learning rate.
        weight_decay: decoupled.
        momentum: decay of the momentum per step.
        steps: Newton-Schulz iterations.
        coefficients: a, b and c of the Newton-Schulz polynomial.
        normuon: whether to even out rows.
        dtype: type in which matrices are orthogonalised.
    """

    found_inf: Tensor | None = None
    """A scalar on the device, 0.0 or 1.0; at 1 `step` changes nothing. Fused AdamW reads the same attribute."""

    def __init__(
        self,
        groups: list[Group],
        lr: float,
        weight_decay: float,
        momentum: float,
        steps: int = 5,
        coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        normuon: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._newton_schulz = (steps, coefficients)
        self._normuon, self._dtype = normuon, dtype
        first = self.param_groups[0]["params"][0]
        self._exchange = Sharded(first) if isinstance(first, DTensor) else Replicated()
        self._batches = [self._make_batches(group) for group in self.param_groups]
        for group in self.param_groups:
            for parameter in group["params"]:  # at once, so that a run can be saved whose first update was skipped
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                if normuon:
                    self.state[parameter]["second_momentum_buffer"] = torch.zeros_like(parameter.detach()[:, :1])

    def _make_batches(self, group: Group) -> list[list[Matrix]]:
        by_shape: dict[tuple[int, int], list[Matrix]] = {}
        for parameter, splits in zip(group["params"], group["splits"], strict=True):
            assert sum(splits) == parameter.shape[0], "the splits are the parameter's rows"
            for i, rows in enumerate(splits):
                start = sum(splits[:i])
                matrix = Matrix(parameter, start, start + rows)
                by_shape.setdefault(matrix.lying, []).append(matrix)
        batches = []
        for (rows, columns), matrices in by_shape.items():
            size = max(1, BATCH_ELEMENTS // (rows * columns)) * self._exchange.ranks
            batches += [matrices[i : i + size] for i in range(0, len(matrices), size)]
        return batches

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights, unless `found_inf` is 1; the host does not read it."""
        for group, batches in zip(self.param_groups, self._batches, strict=True):
            veto = self.found_inf
            if veto is None:
                veto = torch.zeros((), device=group["params"][0].device)
            # A batch's rows travel while the one before is worked on, and its results while the next one is.
            coming = self._collect(batches[0], group, veto)
            going: tuple[Batch, Callable[[], list[Tensor]]] | None = None
            for number, batch in enumerate(batches):
                here = coming
                if number + 1 < len(batches):
                    coming = self._collect(batches[number + 1], group, veto)
                results = newton_schulz(here(), *self._newton_schulz)
                leaving = self._exchange.spread(batch, results)
                if going is not None:
                    self._apply(*going, group, veto)
                going = (batch, leaving)
            if going is not None:
                self._apply(*going, group, veto)

    def _held(self, matrix: Matrix, tensor: Tensor) -> Tensor:
        """This process's rows of a matrix in a tensor shaped and sharded as its parameter: a view."""
        return _local(tensor)[matrix.held_rows(*self._exchange.part)]

    def _collect(self, batch: Batch, group: Group, veto: Tensor) -> Callable[[], Tensor]:
        """Move the momentum of this process's rows, and bring the matrices it works on together."""
        updates = []
        for matrix in batch:
            gradient = matrix.parameter.grad
            assert gradient is not None, "every parameter has a gradient"
            momentum = self._held(matrix, self.state[matrix.parameter]["momentum_buffer"])
            # A vetoed gradient may not be finite. Momentum that is mixed with itself stays as it is.
            fresh = torch.where(veto > 0, momentum, self._held(matrix, gradient))
            momentum.lerp_(fresh, 1 - group["momentum"])
            updates.append(fresh.lerp_(momentum, group["momentum"]).to(self._dtype))
        return self._exchange.collect(batch, updates)

    def _apply(self, batch: Batch, arrived: Callable[[], list[Tensor]], group: Group, veto: Tensor) -> None:
        """Change this process's rows of the weights."""
        updates = [update.float() for update in arrived()]
        go = 1 - veto
        if self._normuon:
            updates = self._even_rows(batch, updates, go)
        for matrix, update in zip(batch, updates, strict=True):
            weight = self._held(matrix, matrix.parameter)
            weight.mul_(1 - group["lr"] * group["weight_decay"] * go)
            weight.addcmul_(update, go, value=-group["lr"] * matrix.scale)

    def _even_rows(self, batch: Batch, updates: list[Tensor], go: Tensor) -> list[Tensor]:
        """NorMuon's part, as its authors' code has it: https://github.com/zichongli5/NorMuon."""
        factors, sums = [], []
        for matrix, update in zip(batch, updates, strict=True):
            square = update.square().mean(dim=1, keepdim=True)  # (rows, 1)
            moment = self._held(matrix, self.state[matrix.parameter]["second_momentum_buffer"])
            moment.lerp_(square, (1 - NORMUON_BETA2) * go)
            factor = 1 / (moment.sqrt() + 1e-10)
            factors.append(factor)
            sums.append(torch.stack([square.sum(), (square * factor.square()).sum()]) * matrix.shape[1])
        before, after = self._exchange.sum_(torch.stack(sums)).sqrt().unbind(1)  # Frobenius norms, (n,) each
        ratios = before / (after + 1e-10)
        return [u * (factor * ratio) for u, factor, ratio in zip(updates, factors, ratios, strict=True)]
