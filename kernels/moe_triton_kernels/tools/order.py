"""The order of events in a compiled kernel: what lies between a copy, the product that reads it, and the next copy.

Two rules are about Hopper's warpgroup products (wgmma), and they are checked over every path through the PTX:

fence    wgmma reads shared memory through the asynchronous proxy, cp.async writes it through the generic one. Between
         a wait for such copies and the next product there has to be a fence.proxy.async.
barrier  A program of more than one warpgroup waits for its products one warpgroup at a time. Between such a wait and
         the next write to shared memory (a copy or a store) there has to be a barrier of the whole program, or one
         warpgroup overwrites what another one still reads (triton-lang/triton issues 9484, 11047 and 11056).

A warp-specialized kernel orders its writes by mbarriers instead of barriers of the program: for these only the fence is
checked, after every wait for an mbarrier at which cp.async arrives. And in a cluster,

meeting  Mbarriers that are initialised have to be announced to the cluster, and its programs have to meet, before one
         of them arrives at another's or copies to all. A kernel that copies to all has clusters and such arrivals.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

WARPGROUP = 128  # threads
EVENTS = {
    "copies landed": r"cp\.async\.wait_(?:group|all)",
    "arrived": r"mbarrier\.(?:try|test)_wait",
    "fence": r"fence\.proxy\.async",
    "product": r"wgmma\.mma_async",
    "products done": r"wgmma\.wait_group",
    "initialised": r"mbarrier\.init",
    "announced": r"fence\.mbarrier_init\.release\.cluster",
    "met": r"barrier\.cluster\.wait",
    "arrival elsewhere": r"mbarrier\.arrive\S*shared::cluster",
    "multicast": r"cp\.async\.bulk\.tensor\S*multicast::cluster",
    "barrier": r"(?:bar|barrier)(?:\.cta)?\.(?:sync|red)",
    "write": r"cp\.async\.c[ag]\.shared|cp\.async\.bulk\.tensor\S*shared\S*global|st\.(?:\w+\.)*shared|stmatrix",
}
MULTICAST_NEEDS = {"a cluster": ".reqnctapercluster", "arrivals elsewhere": "mbarrier.arrive.shared::cluster"}
PATTERN = re.compile("|".join(f"(?P<{name.replace(' ', '_')}>\\b(?:{pattern}))" for name, pattern in EVENTS.items()))
LABEL = re.compile(r"(\$\w+):")
BRANCH = re.compile(r"(@!?%\w+\s+)?bra(?:\.uni)?\s+(\$\w+)")
TABLE = re.compile(r"(\$\w+):\s*\.branchtargets\s+([^;]+)")
INDEXED = re.compile(r"brx\.idx(?:\.uni)?\s+%\w+,\s*(\$\w+)")
END = re.compile(r"(?:ret|exit|trap)\b")


@dataclass(kw_only=True)
class Block:
    """A stretch of code without branches: (line, event) pairs, and the numbers of the blocks that may follow."""

    events: list[tuple[int, str]] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    falls_through: bool = True


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`begin` opens what only `between` closes; `end` in the open is a fault."""

    begin: Sequence[str]
    between: str
    end: Sequence[str]
    fault: str


def order_faults(ptx: str) -> list[str]:
    """Where a kernel's PTX breaks a rule, in words; [] where nothing is wrong."""
    is_specialized = "setmaxnreg" in ptx
    landed = ["copies landed", *(["arrived"] if "cp.async.mbarrier.arrive" in ptx else [])]
    rules = [Rule(begin=landed, between="fence", end=["product"], fault="no proxy fence before the product")]
    if threads(ptx) > WARPGROUP and not is_specialized:
        fault = "no barrier between products and the next write"
        rules.append(Rule(begin=["products done"], between="barrier", end=["write", "multicast"], fault=fault))
    fault = "mbarriers are not announced before the cluster meets"
    rules.append(Rule(begin=["initialised"], between="announced", end=["met"], fault=fault))
    fault = "the cluster does not meet before a program uses another's mbarrier"
    rules.append(Rule(begin=["initialised"], between="met", end=["arrival elsewhere", "multicast"], fault=fault))
    blocks, places = split(ptx)
    found = [f"{rule.fault} (PTX line {line})" for rule in rules for line in broken(rule, blocks, places)]
    if "multicast::cluster" in ptx:
        found += [f"a multicast without {what}" for what, pattern in MULTICAST_NEEDS.items() if pattern not in ptx]
    return found


def threads(ptx: str) -> int:
    found = re.search(r"\.(?:req|max)ntid\s+(\d+)", ptx)
    return int(found.group(1)) if found else 0


def split(ptx: str) -> tuple[list[Block], dict[str, int]]:
    """The blocks of a kernel in the order of the text, and the block of every label.

    A branch to a label without a dollar sign stays within one wait for an mbarrier: it is no branch here.
    """
    blocks, places, tables = [Block()], {}, dict(TABLE.findall(ptx))
    for number, line in enumerate(ptx.splitlines(), 1):
        code = line.split("//")[0].strip()
        if code.startswith(".loc") or ".branchtargets" in code:
            continue
        if label := LABEL.match(code):
            blocks.append(Block())
            places[label.group(1)] = len(blocks) - 1
        blocks[-1].events += [(number, event) for event in events(code)]
        branch, indexed = BRANCH.search(code), INDEXED.search(code)
        if branch is not None:
            blocks[-1].targets.append(branch.group(2))
            blocks[-1].falls_through = branch.group(1) is not None
        elif indexed is not None:
            blocks[-1].targets += [target.strip() for target in tables[indexed.group(1)].split(",")]
            blocks[-1].falls_through = False
        elif END.match(code):
            blocks[-1].falls_through = False
        if branch is not None or not blocks[-1].falls_through:
            blocks.append(Block())
    return blocks, places


def events(code: str) -> Iterator[str]:
    for found in PATTERN.finditer(code):
        yield str(found.lastgroup).replace("_", " ")


def broken(rule: Rule, blocks: Sequence[Block], places: dict[str, int]) -> list[int]:
    """The lines of the `end` events that some path reaches while the rule is open."""
    faults: set[int] = set()
    seen: set[tuple[int, bool]] = set()
    left = [(0, False)]  # (block, whether the rule is open where it begins)
    while left:
        number, is_open = left.pop()
        if (number, is_open) in seen or number >= len(blocks):
            continue
        seen.add((number, is_open))
        for line, event in blocks[number].events:
            if event in rule.begin:
                is_open = True
            elif event == rule.between:
                is_open = False
            elif event in rule.end and is_open:
                faults.add(line)
        left += [(places[target], is_open) for target in blocks[number].targets if target in places]
        if blocks[number].falls_through:
            left.append((number + 1, is_open))
    return sorted(faults)
