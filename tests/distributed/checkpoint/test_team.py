"""What the processes that save together send each other: little, unless they differ or one of them fails."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moe_triton.distributed.checkpoint.team import Team
from moe_triton.distributed.errors import CheckpointError

LARGE = {f"layer.{i}.weight": {"shape": [64, 1536, 2048], "dtype": "bfloat16"} for i in range(1000)}
SMALL = 128  # bytes


def bytes_sent(patch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of the tensors that this rank gives to torch's collectives from now on."""
    sent: list[int] = []
    for name in ("all_reduce", "all_gather_into_tensor", "all_gather_single", "broadcast"):
        if (collective := getattr(dist, name, None)) is not None:

            def spy(tensor, *args, original=collective, **options):
                sent.append(tensor.nbytes)
                return original(tensor, *args, **options)

            patch.setattr(dist, name, spy)
    return sent


def equal_descriptions() -> None:
    team = Team.of(None, "a save")
    team.run("first, who the processes are", lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        sent = bytes_sent(patch)
        found = team.distinct("collecting", lambda: dict(LARGE))
        assert sent, "nothing was seen"
        assert sum(sent) <= SMALL
    assert found == {0: LARGE}


def different_descriptions() -> None:
    """As pipeline stages have them: two kinds, each sent once."""
    rank = dist.get_rank()
    found = Team.of(None, "a save").distinct("collecting", lambda: {"stage": rank // 2, **LARGE})
    assert found == {0: {"stage": 0, **LARGE}, 2: {"stage": 1, **LARGE}}


def results() -> None:
    team, rank = Team.of(None, "a save"), dist.get_rank()
    assert team.run("running", lambda: rank) == rank
    assert team.first("running", lambda: LARGE) == LARGE
    assert team.scatter("running", lambda: ["", "x", "xx", "xxx"]) == rank * "x"
    assert team.gather("running", lambda: {rank: LARGE}) == ([{i: LARGE} for i in range(4)] if rank == 0 else [])
    assert torch.is_tensor(team.first("running", lambda: torch.ones(2)))


def failing(kind: type[Exception], raised: type[Exception], how: str) -> None:
    def fail() -> None:
        if dist.get_rank() == 2:
            raise kind("no room")

    team = Team.of(None, "a save")
    with pytest.raises(raised, match=r"a save, writing: rank 2: .*no room"):
        getattr(team, how)("writing", fail)
    assert team.run("afterwards", lambda: 1) == 1


def test_equal_descriptions_are_not_sent(four_ranks):
    four_ranks.run(equal_descriptions)


def test_different_descriptions_are_sent_once(four_ranks):
    four_ranks.run(different_descriptions)


def test_results(four_ranks):
    four_ranks.run(results)


@pytest.mark.parametrize("how", ["run", "distinct", "gather"])
@pytest.mark.parametrize(("kind", "raised"), [(ValueError, ValueError), (OSError, CheckpointError)])
def test_a_failure_is_raised_on_all(four_ranks, kind, raised, how):
    four_ranks.run(failing, kind, raised, how)


def test_one_process_without_groups():
    team = Team.of(None, "a save")
    assert (team.run("", lambda: 1), team.first("", lambda: 2)) == (1, 2)
    assert (team.distinct("", lambda: 3), team.gather("", lambda: 4), team.scatter("", lambda: [5])) == ({0: 3}, [4], 5)
