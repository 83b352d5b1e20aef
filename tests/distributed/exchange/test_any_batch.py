"""Ragged batches, any number of experts and choices, any exchange: equal to one process."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers import parity
from tests.helpers.parity import Case


@st.composite
def cases(draw) -> Case:
    mode = draw(st.sampled_from(("dropless", "capacity", "bounded", "allgather")))
    experts = draw(st.sampled_from((4, 7, 8, 12)))
    tokens = draw(st.lists(st.integers(0, 9), min_size=4, max_size=4))
    if mode == "capacity":  # the layer's capacity is of a rank's tokens, one process knows equal groups only
        tokens = [tokens[0]] * 4
    layer = {"top_k": draw(st.integers(1, 4)), "aux_loss_weight": 0.1, "bias": draw(st.booleans())}
    if mode == "capacity" or (len(set(tokens)) == 1 and draw(st.booleans())):
        layer |= {"capacity_factor": draw(st.sampled_from((0.5, 1.0, 2.0))), "min_capacity": 1}
    exchange = {
        "mode": mode,
        "chunks": draw(st.integers(1, 4)),
        "deduplicate": draw(st.booleans()),
        "max_tokens_per_rank": draw(st.sampled_from((None, 9, 13))),
    }
    return Case(tokens, exchange=exchange, layer=layer, experts=experts)


def check_all(found: list[Case]) -> None:
    for case in found:
        try:
            parity.check(case)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.lists(cases(), min_size=8, max_size=8))
def test_equal_to_one_process(four_ranks, found):
    four_ranks.run(check_all, found)
