"""The names of a transformers model's tensors on the hub, where experts often are a matrix each."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Part(NamedTuple):
    """A tensor as a file holds it: a whole tensor of the model, or rows [low, high) of one expert's matrix."""

    name: str
    expert: int | None = None
    low: int = 0
    high: int = 0

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return its shape, given that of the model's tensor."""
        return whole if self.expert is None else (self.high - self.low, *whole[2:])


def pretrained(model: nn.Module) -> Any:
    """Return the model where it is one of transformers', else None. Imports nothing."""
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    return model if isinstance(model, base) else None


def hub_parts(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Part]]:
    """Return the hub's tensors of each of the model's, in the order of the experts and of their rows.

    transformers' own converters decide (`revert_weight_conversion`), tensor by tensor: they are given the numbers of
    the rows of [E, rows, ...] and show where these end up, so that no weight is converted.

    Args:
        model: a PreTrainedModel.
        shapes: of its tensors by name, as they are without any spreading.

    Raises:
        ValueError: a tensor that the hub's layout transposes, joins with another or reorders, by name.
    """
    from transformers.core_model_loading import revert_weight_conversion

    found = {}
    for name, shape in shapes.items():
        # the converters split the first two dimensions; 2 columns for the third, since 5.17 squeezes any 1 away
        if len(shape) == 3:
            given = torch.arange(shape[0] * shape[1], device="cpu").view(*shape[:2], 1).repeat(1, 1, 2)
        else:
            given = torch.empty(shape, device="meta")
        try:
            converted = revert_weight_conversion(model, {name: given})
        except Exception as error:  # whatever a converter raises that misses the other tensors of its group
            raise _refused(model, name) from error
        if len(converted) == 1 and next(iter(converted.values())) is given:
            found[name] = [Part(next(iter(converted)))]
        elif len(shape) != 3:
            raise _refused(model, name)
        else:
            parts = [_part(model, name, shape[1], hub, rows) for hub, rows in converted.items()]
            found[name] = sorted(parts, key=lambda part: (part.expert, part.low))
            if sum(part.high - part.low for part in parts) != shape[0] * shape[1]:
                raise _refused(model, name)
    return found


def _part(model: Any, name: str, height: int, hub: str, rows: Tensor) -> Part:
    """Where the rows of a hub's tensor are in [E, height, ...]."""
    if rows.dim() != 2 or rows.shape[1] != 2:
        raise _refused(model, name)
    first, count = int(rows[0, 0]), rows.shape[0]
    expert, low = divmod(first, height)
    if low + count > height or not torch.equal(rows[:, 0], first + torch.arange(count)):
        raise _refused(model, name)
    return Part(hub, expert, low, low + count)


def _refused(model: Any, name: str) -> ValueError:
    return ValueError(
        f"model: the hub's layout of {model.config.model_type} does more to {name!r} than to split it into rows of "
        "experts; wanted names='model', or transformers' save_pretrained"
    )


def config_files(model: Any, dtype: torch.dtype) -> dict[str, str]:
    """Return config.json, and generation_config.json of a model that generates, as `save_pretrained` writes them."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.dtype = str(dtype).removeprefix("torch.")
    files = {"config.json": config.to_json_string()}
    if model.can_generate():
        files["generation_config.json"] = model.generation_config.to_json_string()
    return files
