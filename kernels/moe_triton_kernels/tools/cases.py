"""The list of what is compiled with no GPU, by the file of its kernels."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence

from moe_triton_kernels.tools import dispatch_cases, fp8_cases, lora_cases, product_cases, quantized_cases
from moe_triton_kernels.tools.case import Case
from moe_triton_kernels.tools.shipped import Shipped, shipped_configs

PRODUCTS: dict[str, Callable[[str, Sequence[Shipped]], Iterable[Case]]] = {
    "up": product_cases.up_cases,
    "down": product_cases.down_cases,
    "d_hidden": product_cases.d_hidden_cases,
    "d_weight": product_cases.d_weight_cases,
    "narrow": lora_cases.narrow_cases,
    "lora": lora_cases.adapter_cases,
    "quantized": quantized_cases.quantized_cases,
}
OTHERS: dict[str, Callable[[], Iterable[Case]]] = {
    "address_tables": dispatch_cases.address_cases,
    "routing": dispatch_cases.routing_cases,
    "permutation": dispatch_cases.permutation_cases,
    "small_dispatch": dispatch_cases.small_dispatch_cases,
    "small_route": dispatch_cases.small_route_cases,
    "tiles": dispatch_cases.tiles_cases,
    "row_pieces": dispatch_cases.row_pieces_cases,
    "combine": dispatch_cases.combine_cases,
}
MODULES = (*PRODUCTS, "fp8", "gate", *OTHERS, "gluon")


def module_cases(module: str, arch: str) -> Iterable[Case]:
    """The cases of one file of kernels; Gluon's are for Hopper only."""
    if module in PRODUCTS:
        return PRODUCTS[module](arch, shipped_configs(arch))
    if module in OTHERS:
        return OTHERS[module]()
    if module == "gate":
        return dispatch_cases.gate_cases(arch)
    if module == "fp8":
        return fp8_cases.fp8_cases(arch)
    if arch != "sm_90":
        return []
    # imported only here, because it imports Gluon, which is experimental
    return importlib.import_module("moe_triton_kernels.tools.gluon_cases").gluon_cases()


def collect_cases(arch: str, modules: Sequence[str] | None = None, every: bool = False) -> list[Case]:
    """The cases of the named modules (None: of all), without those that are no sample unless `every`."""
    names = MODULES if modules is None else modules
    unknown = [name for name in names if name not in MODULES]
    if unknown:
        raise ValueError(f"modules: got {', '.join(unknown)}, wanted some of {', '.join(MODULES)}")
    return [case for name in names for case in module_cases(name, arch) if case.sample or every]
