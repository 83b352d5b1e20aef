"""The adapters' part of a block's products on the CPU: by compiled loops where these are faster, else by torch."""

from __future__ import annotations

from ctypes import Array, Structure, addressof, c_int64
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from moe_triton.backends.torch.blocks import Block, Layout
from moe_triton.backends.torch.decoded import Decoded
from moe_triton.backends.torch.fused import DTYPES, loops_problem, multiplies_pairs
from moe_triton.backends.torch.looped import Added, multiply, parts_of
from moe_triton.backends.torch.processor import this_processor
from moe_triton.backends.torch.products import Matrices, outer_products, products
from moe_triton.backends.torch.threads import knows_torchs_threads, on_all_threads
from moe_triton.records import ExpertCall, ExpertWeight, Lora

# of an expert on average, from which the loops are ahead: they bring all experts' factors to their form
LEAST_ROWS = 16
LANES, WORD = 16, 4  # of a vector; bytes: as in `vectors`, which needs numba


class Adapter:
    """An adapter [E, r, in], [E, out, r] of one projection as products read it; t and u are [m, r]."""

    def __init__(self, layout: Layout, lora: Lora) -> None:
        # PEFT's b has no contiguous dimension
        self.a, self.b = (x if 1 in x.stride()[1:] else x.contiguous() for x in (lora.a, lora.b))
        self.layout, self.scaling = layout, lora.scaling

    def add(self, block: Block, x_mI: Tensor, y_mO: Tensor) -> None:
        """y += t @ b[e].T with t = scaling * x @ a[e].T, for the rows of every expert e of the block."""
        self._add(block, self._t(block, x_mI), self.b, y_mO)

    def add_back(self, block: Block, dy_mO: Tensor, dx_mI: Tensor) -> Tensor:
        """dx += u @ a[e]; returns u = scaling * dy @ b[e]."""
        u_mr = self._u(block, dy_mO)
        self._add(block, u_mr, self.a.mT, dx_mI)
        return u_mr

    def gradients(
        self,
        block: Block,
        x_mI: Tensor,
        dy_mO: Tensor,
        u_mr: Tensor | None,
        grad_a: Tensor | None,
        grad_b: Tensor | None,
    ) -> None:
        """Writes what is asked for: u.T @ x to grad_a[e] and dy.T @ t to grad_b[e]."""
        if grad_a is not None:
            outer_products(self.layout, block, self._u(block, dy_mO) if u_mr is None else u_mr, x_mI, grad_a)
        if grad_b is not None:
            outer_products(self.layout, block, dy_mO, self._t(block, x_mI), grad_b)

    def _t(self, block: Block, x_mI: Tensor) -> Tensor:
        return self._scaled(products(self.layout, block, x_mI, lambda e: self.a[e]))

    def _u(self, block: Block, dy_mO: Tensor) -> Tensor:
        return self._scaled(products(self.layout, block, dy_mO, lambda e: self.b[e].mT))

    def _scaled(self, narrow_mr: Tensor) -> Tensor:
        return narrow_mr if self.scaling == 1.0 else narrow_mr.mul_(self.scaling)

    def _add(self, block: Block, t_mr: Tensor, factor_EOr: Tensor, y_mO: Tensor) -> None:
        """y += t @ factor[e].T."""
        if block.batch is not None:
            count = block.batch.stop - block.batch.start
            t_Cmr, y_CmO = (rows.view(count, -1, rows.shape[1]) for rows in (t_mr, y_mO))
            y_CmO.baddbmm_(t_Cmr, factor_EOr[block.batch].mT)
            return
        for e, part in block.parts:
            if self.layout.policy.fixed_rows:
                y_mO[part] += self.layout.policy.product(t_mr[part], factor_EOr[e])
            else:
                y_mO[part].addmm_(t_mr[part], factor_EOr[e].mT)


class LoopedAdapter(Adapter):
    """The same by the loops, where t and u have whole vectors.

    Steps, and the memory that they write to, are made once and get only the addresses of a block: u is valid until the
    next block's.
    """

    def __init__(self, layout: Layout, lora: Lora) -> None:
        from moe_triton.backends.torch import adapter_loops as loops

        super().__init__(layout, lora)
        self.Narrow, self.Gradient, self.waits = loops.Narrow, loops.Gradient, loops.WAITS
        self.run = loops.adapter_loops(self.a.dtype == torch.bfloat16, multiplies_pairs(this_processor())).address
        self.size, self.rank = self.a.element_size(), self.a.shape[1]
        panel = LANES if self.rank <= LANES else 2 * LANES
        self.t_mr, self.u_mr = (self.a.new_empty(layout.most_places, -(-self.rank // panel) * panel) for _ in range(2))
        self._parts: dict[int, tuple[Block, Array[c_int64]]] = {}  # by the block's id, which lives as long as these

    def add(self, block: Block, x_mI: Tensor, y_mO: Tensor) -> None:
        self._run(self._at(self.through_t, block, x_mI, y_mO))

    def add_back(self, block: Block, dy_mO: Tensor, dx_mI: Tensor) -> Tensor:
        self._run(self._at(self.through_u, block, dy_mO, dx_mI))
        return self.u_mr

    def added(self, block: Block, x_mI: Tensor) -> Added:
        """Return what `add` adds, for the loop of a product that comes first."""
        return self._added(self._at(self.to_t, block, x_mI), self.t_mr, self.b.mT)

    def added_back(self, block: Block, dy_mO: Tensor) -> Added:
        """Return what `add_back` adds, as above: of u and a."""
        return self._added(self._at(self.to_u, block, dy_mO), self.u_mr, self.a)

    def _added(self, step: Structure, t_mr: Tensor, factor: Tensor) -> Added:
        step.then = self.waits  # the product follows
        return Added(step, self.run, t_mr, factor)

    def gradients(
        self,
        block: Block,
        x_mI: Tensor,
        dy_mO: Tensor,
        u_mr: Tensor | None,
        grad_a: Tensor | None,
        grad_b: Tensor | None,
    ) -> None:
        steps = []
        if grad_a is not None:
            if u_mr is None:
                steps.append(self._at(self.to_u, block, dy_mO))
            steps.append(self._gradient_at(self.gradient_a, block, x_mI, grad_a))
        if grad_b is not None:
            steps += [self._at(self.to_t, block, x_mI), self._gradient_at(self.gradient_b, block, dy_mO, grad_b)]
        self._run(*steps)

    @cached_property
    def to_t(self) -> Structure:
        """The step that makes t."""
        return self._narrow(self.a.mT, self.t_mr)

    @cached_property
    def to_u(self) -> Structure:
        """The step that makes u."""
        return self._narrow(self.b, self.u_mr)

    @cached_property
    def through_t(self) -> Structure:
        """The step that makes t, and adds t @ b.T to y."""
        return self._narrow(self.a.mT, self.t_mr, self.b.mT)

    @cached_property
    def through_u(self) -> Structure:
        """The step that makes u, and adds u @ a to dx."""
        return self._narrow(self.b, self.u_mr, self.a)

    @cached_property
    def gradient_a(self) -> Structure:
        """The step that writes u.T @ x."""
        return self._gradient(self.u_mr, self.a.shape[2])

    @cached_property
    def gradient_b(self) -> Structure:
        """The step that writes dy.T @ t."""
        return self._gradient(self.t_mr, self.b.shape[1], is_transposed=True)

    def _narrow(self, into: Tensor, t_mr: Tensor, out_of: Tensor | None = None) -> Structure:
        """The step that makes t of x @ into[e] and adds t @ out_of[e] to y, without a block."""
        step = self.Narrow(
            x_size=into.shape[1], into=into.data_ptr(), t=t_mr.data_ptr(), t_row=t_mr.shape[1] * self.size,
            t_columns=t_mr.shape[1], rank=self.rank, scale=self.scaling,
        )  # fmt: skip
        step.into_e, step.into_k, step.into_q = (stride * self.size for stride in into.stride())
        if out_of is not None:
            step.out_of, step.columns = out_of.data_ptr(), out_of.shape[2]
            step.out_of_e, step.out_of_k, step.out_of_q = (stride * self.size for stride in out_of.stride())
        return step

    def _gradient(self, t_mr: Tensor, columns: int, *, is_transposed: bool = False) -> Structure:
        """The step that writes t.T @ x of so many columns to grad[e], or its transpose, without a block."""
        return self.Gradient(
            is_gradient=1, is_transposed=is_transposed, columns=columns,
            narrow=t_mr.data_ptr(), narrow_row=t_mr.shape[1] * self.size, rank=self.rank,
        )  # fmt: skip

    def _at(self, step: Structure, block: Block, x_mI: Tensor, y_mO: Tensor | None = None) -> Structure:
        """A Narrow step for this block."""
        step.x, step.x_row = x_mI.data_ptr(), x_mI.stride(0) * self.size
        if y_mO is not None:
            step.y, step.y_row = y_mO.data_ptr(), y_mO.stride(0) * self.size
        return self._started(step, block)

    def _gradient_at(self, step: Structure, block: Block, x_mI: Tensor, grad: Tensor) -> Structure:
        """A Gradient step for this block."""
        step.wide, step.wide_row = x_mI.data_ptr(), x_mI.stride(0) * self.size
        step.out, step.out_step, step.out_row = grad.data_ptr(), grad.stride(0) * self.size, grad.stride(1) * self.size
        return self._started(step, block)

    def _started(self, step: Structure, block: Block) -> Structure:
        found = self._parts.get(id(block))
        if found is None:
            found = self._parts[id(block)] = block, parts_of(block.parts)
        step.parts, step.num_parts = addressof(found[1]), len(block.parts)
        step.next = step.done = step.then = 0
        return step

    def _run(self, *steps: Structure) -> None:
        for step, following in pairwise(steps):
            step.then = addressof(following)
        if steps:
            on_all_threads(self.run, addressof(steps[0]))


Adapters = tuple[Adapter | None, Adapter | None]  # of gate and up, and of down


def adapters_of(call: ExpertCall, layout: Layout) -> Adapters:
    """Return those of the call, as the products of the layout's blocks take them."""
    gate_up, down = (
        None if lora is None else (LoopedAdapter if runs_loops(layout, lora) else Adapter)(layout, lora)
        for lora in (call.gate_up_lora, call.down_lora)
    )
    return gate_up, down


def runs_loops(layout: Layout, lora: Lora) -> bool:
    """Whether the loops take the adapter, and are faster than torch."""
    num_experts, *sizes = (*lora.a.shape, lora.b.shape[1])
    return (
        lora.a.dtype == lora.b.dtype
        and lora.a.dtype in DTYPES
        and layout.num_rows >= LEAST_ROWS * num_experts
        and not any(size * lora.a.element_size() % WORD for size in sizes)
        and not layout.policy.fixed_rows
        and this_processor().has("avx512")
        and knows_torchs_threads()
        and loops_problem() is None
    )


def affine(
    layout: Layout,
    block: Block,
    x_mI: Tensor,
    weight: Matrices | Decoded,
    biases: ExpertWeight | None,
    adapter: Adapter | None,
    out: Tensor | None = None,
) -> Tensor:
    """`products` with the adapter's part."""
    if isinstance(adapter, LoopedAdapter) and layout.is_looped and not isinstance(weight, Decoded):
        return multiply(block, x_mI, weight, biases, out, adapter.added(block, x_mI))
    y_mO = products(layout, block, x_mI, weight, biases, out)
    if adapter is not None:
        adapter.add(block, x_mI, y_mO)
        _keep(y_mO, out)
    return y_mO


def affine_back(
    layout: Layout,
    block: Block,
    dy_mO: Tensor,
    weight_back: Matrices | Decoded,
    adapter: Adapter | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of x in `affine`, and u where there is an adapter; weight_back: the matrices' transposes."""
    if isinstance(adapter, LoopedAdapter) and layout.is_looped and not isinstance(weight_back, Decoded):
        added = adapter.added_back(block, dy_mO)
        return multiply(block, dy_mO, weight_back, None, out, added), added.t_mr
    dx_mI = products(layout, block, dy_mO, weight_back, out=out)
    if adapter is None:
        return dx_mI, None
    u_mr = adapter.add_back(block, dy_mO, dx_mI)
    _keep(dx_mI, out)
    return dx_mI, u_mr


def _keep(y_mO: Tensor, out: Tensor | None) -> None:
    """Write to `out`, of a product, what has changed in y, which the product returned."""
    if out is not None and y_mO.data_ptr() != out.data_ptr():
        out.copy_(y_mO)
