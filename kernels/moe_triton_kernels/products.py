"""A grouped product that is launched again and again: what sizes, layouts and configuration decide, computed once."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_triton_kernels.arithmetic import cdiv
from moe_triton_kernels.descriptors import describe_weight
from moe_triton_kernels.launch import Config, Launch, launch_options, persistent_grid, prepare
from moe_triton_kernels.operands import PerExpert, SizesArgument, sizes_argument
from moe_triton_kernels.tiles import TileTables


class Product(NamedTuple):
    """Rows [S, k] times the experts' matrices [k, columns], without the tensors of a call.

    launch      the kernel on its grid, with its constants
    sizes       among its arguments
    descriptor  of the matrices, without memory, or None
    """

    launch: Launch
    sizes: SizesArgument
    descriptor: TensorDescriptor | None


def prepare_product(
    kernel: Any,
    rows: Tensor,
    tiles: TileTables,
    weight: PerExpert,
    config: Config,
    *,
    size_columns: int,
    halves: int = 1,
    pairs: int = 1,
    **constants: Any,
) -> Product:
    """The product of these operands, or of others that lie alike; `rows` [., k].

    halves, pairs: a column of the result takes one of each half of the matrices' columns, or so many side by side.
    """
    size_k, device = rows.shape[1], rows.device
    most = tiles.select(config.block_m)[1] * cdiv(size_columns, config.block_n)
    return Product(
        launch=prepare(kernel, persistent_grid(device, most, config), **constants, **launch_options(device, config)),
        sizes=sizes_argument(rows, size_k, size_columns, config),
        descriptor=describe_weight(
            weight,
            config,
            size_k=size_k,
            size_columns=pairs * size_columns,
            halves=halves,
            block_n=pairs * config.block_n,
        ),
    )
