"""What LoRA on experts costs: forward and backward with adapters beside the frozen base, ours and PEFT's.

    python benchmarks/lora_cost.py [--tokens 1024 --rank 16 --dtype float32 --budget 30 --out FILE.json]

Five ways with the same values: `frozen` is moe_mlp over a frozen base; `lora` the same with adapters; `deltas` what
PEFT without our integration makes of moe_mlp, W + scaling * B A of every projection, twice in each forward;
`grouped_mm` and `eager` PEFT's adapters over transformers' experts of these names. Before they are timed, outputs and
gradients must agree. Saved bytes are those that autograd keeps from forward to backward, without the parameters. The
ways take turns over rounds; what counts is the median of the rounds' ratios. Run it on a machine that does nothing
else. Needs peft and transformers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_triton import Lora, moe_mlp
from moe_triton.benchmarking.environment import environment
from moe_triton.benchmarking.report import write_json
from moe_triton.benchmarking.timing import make_timer, ratios, run_rounds, spread
from moe_triton.runtime import installed_version

RESULT = Path(__file__).parent / "results" / "cpu" / "lora-cost.json"
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
PROJECTIONS = ("gate_up", "down")


class Values:
    """The base's projections and the adapters' factors, [E, ...], by name."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> None:
        d, n, num_experts, rank = options.hidden, options.intermediate, options.experts, options.rank
        shapes = {"gate_up": (2 * n, d), "down": (d, n)}
        torch.manual_seed(0)

        def draw(*shape: int, scale: float) -> Tensor:
            return (scale * torch.randn(num_experts, *shape)).to(device, dtype)

        self.base = {name: draw(*shape, scale=shape[1] ** -0.5) for name, shape in shapes.items()}
        self.a = {name: draw(rank, size_in, scale=size_in**-0.5) for name, (_, size_in) in shapes.items()}
        self.b = {name: draw(size_out, rank, scale=0.1) for name, (size_out, _) in shapes.items()}
        self.scaling = options.alpha / rank

    def leaves(self) -> dict[str, Lora]:
        """Adapters of their own for one way."""
        return {
            name: Lora(self.a[name].clone().requires_grad_(), self.b[name].clone().requires_grad_(), self.scaling)
            for name in PROJECTIONS
        }


class Way:
    """One way: its forward over (x, ids, weights), and its adapters' factors, to compare gradients and to clear them.

    factors: name -> parameter; `as_given` brings a factor's gradient to the form of `Lora`.
    """

    def __init__(
        self, forward: Forward, factors: dict[str, Tensor], as_given: Callable[[str, Tensor], Tensor] = lambda _, g: g
    ) -> None:
        self.forward, self.factors, self.as_given = forward, factors, as_given

    def step(self, x: Tensor, ids: Tensor, weights: Tensor, grad: Tensor) -> dict[str, Tensor]:
        """Output and gradients; gradients are made anew, as after zero_grad()."""
        for leaf in (x, weights, *self.factors.values()):
            leaf.grad = None
        out = self.forward(x, ids, weights)
        out.backward(grad)
        found = {"output": out.detach(), "x": x.grad, "weights": weights.grad}
        return found | {name: self.as_given(name, leaf.grad) for name, leaf in self.factors.items()}


def our_way(values: Values, loras: dict[str, Lora]) -> Way:
    arguments = {f"{name}_lora": lora for name, lora in loras.items()}

    def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return moe_mlp(x, ids, weights, values.base["gate_up"], values.base["down"], **arguments)

    return Way(forward, factors_of(loras))


def way_of_deltas(values: Values) -> Way:
    loras = values.leaves()

    def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        for _ in range(2):  # registering a parametrization evaluates it once, the access again
            changed = [values.base[n] + values.scaling * torch.bmm(loras[n].b, loras[n].a) for n in PROJECTIONS]
        return moe_mlp(x, ids, weights, *changed)

    return Way(forward, factors_of(loras))


def factors_of(loras: dict[str, Lora]) -> dict[str, Tensor]:
    return {f"{name} {key}": getattr(lora, key) for name, lora in loras.items() for key in "ab"}


def peft_way(values: Values, implementation: str, options: argparse.Namespace) -> Way:
    """PEFT's adapters on the experts of a Qwen3-MoE model, with one of transformers' implementations."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=options.hidden, moe_intermediate_size=options.intermediate, num_experts=options.experts,
        num_experts_per_tok=options.top_k, hidden_act="silu", experts_implementation=implementation,
    )  # fmt: skip
    with torch.device("meta"):
        block = nn.ModuleDict({"experts": Qwen3MoeExperts(config)})
    for name in PROJECTIONS:
        setattr(block["experts"], f"{name}_proj", nn.Parameter(values.base[name]))
    wanted = [f"experts.{name}_proj" for name in PROJECTIONS]
    lora = LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=[], target_parameters=wanted)
    inject_adapter_in_model(lora, block)
    factors: dict[str, Tensor] = {}
    for module in block.modules():
        name = str(getattr(module, "parameter_name", "")).removesuffix("_proj")
        if name in PROJECTIONS:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            with torch.no_grad():  # A: the expert is slowest; B: it is fastest
                a.copy_(values.a[name].flatten(0, 1))
                b.copy_(values.b[name].permute(1, 2, 0).flatten(1))
            factors |= {f"{name} a": a.requires_grad_(), f"{name} b": b.requires_grad_()}
    assert len(factors) == 4, "PEFT wraps parameters in another way than this script knows"

    def as_given(name: str, grad: Tensor) -> Tensor:
        if name.endswith(" a"):
            return grad.view(options.experts, options.rank, -1)
        return grad.view(grad.shape[0], options.rank, options.experts).permute(2, 0, 1)

    return Way(lambda x, ids, weights: block["experts"](x, ids, weights), factors, as_given)


def saved_bytes(way: Way, inputs: tuple[Tensor, ...], parameters: Iterable[Tensor]) -> int:
    """The bytes that autograd keeps for backward, each storage once, without the parameters' own."""
    own = {t.untyped_storage().data_ptr() for t in parameters}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = way.forward(*inputs)
    assert out.requires_grad
    return sum(kept.values())


def check(found: dict[str, Tensor], expected: dict[str, Tensor], way: str, limit: float) -> float:
    """The largest relative error of an output or gradient; ends the program where it is too large."""
    errors = {
        name: ((found[name].double() - value.double()).norm() / value.double().norm()).item()
        for name, value in expected.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] < limit:
        raise SystemExit(f"{way}: {worst} differs from lora's by {errors[worst]:.1e}")
    return errors[worst]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (
        ("tokens", 1024), ("hidden", 512), ("intermediate", 384), ("experts", 64), ("top-k", 8), ("rank", 16),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--alpha", type=float, default=24.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of timing")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    values = Values(options, dtype, device)
    ways = {"frozen": our_way(values, {}), "lora": our_way(values, values.leaves()), "deltas": way_of_deltas(values)}
    ways |= {name: peft_way(values, name, options) for name in ("grouped_mm", "eager")}

    x = torch.randn(options.tokens, options.hidden, device=device).to(dtype).requires_grad_()
    ids = torch.rand(options.tokens, options.experts, device=device).topk(options.top_k).indices
    weights = torch.rand(options.tokens, options.top_k, device=device).to(dtype).requires_grad_()
    grad = torch.randn(options.tokens, options.hidden, device=device).to(dtype)
    expected = ways["lora"].step(x, ids, weights, grad)
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    rows: dict[str, dict[str, Any]] = {}
    for name, way in ways.items():
        error = None if name == "frozen" else check(way.step(x, ids, weights, grad), expected, name, limit)
        parameters = [*values.base.values(), *way.factors.values()]
        rows[name] = {"error": error, "saved_bytes": saved_bytes(way, (x, ids, weights), parameters)}

    steps = {name: lambda way=way: way.step(x, ids, weights, grad) for name, way in ways.items()}
    times = run_rounds(steps, make_timer(device), budget_s=options.budget)
    print("| forward and backward | ms | times the frozen base (20% to 80%) | saved, MiB | times the frozen base's |")
    print("|---|--:|--:|--:|--:|")
    for name, row in rows.items():
        seconds, cost = spread(times[name]), ratios(times[name], times["frozen"])
        assert seconds is not None
        assert cost is not None
        row |= {"seconds": asdict(seconds), "times_frozen": asdict(cost)}
        saved = row["saved_bytes"] / rows["frozen"]["saved_bytes"]
        cells = [name, f"{1e3 * seconds.p50:.1f}", f"{cost.p50:.2f} ({cost.p20:.2f} to {cost.p80:.2f})"]
        cells += [f"{row['saved_bytes'] / 2**20:.1f}", f"{saved:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    faster = {name: ratios(times[name], times["lora"]) for name in ("deltas", "grouped_mm", "eager")}
    record = {
        "schema": "moe-triton-lora-cost/1",
        **environment(device),
        "peft": installed_version("peft"),
        "shape": {name: getattr(options, name) for name in (
            "tokens", "hidden", "intermediate", "experts", "top_k", "rank", "alpha", "dtype",
        )},
        "ways": rows,
        "lora_times_faster_than": {name: None if value is None else asdict(value) for name, value in faster.items()},
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, record)
    print(options.out)


if __name__ == "__main__":
    main()
