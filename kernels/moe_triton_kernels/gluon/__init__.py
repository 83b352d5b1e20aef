"""Warp-specialized grouped GEMMs in Gluon, for Hopper: other kernels behind the same functions, off by default.

Gluon is an experimental API of Triton. What plain Triton cannot do, it can: one warpgroup loads, two multiply, and a
tile's loads and stores hide behind the products of another. `Config.gluon` names the schedule in a table's entry:
`moe-triton tune` tries the schedules beside the plain kernels and writes which one won. No shipped entry has one, since
these kernels have been compiled, and run in an emulator of the barrier protocol, but have never run on a GPU. Where
`schedules.why_unsupported` has a reason, the plain kernel runs.

The experts' matrices come by TMA, also where each is a tensor of its own: a table of addresses. One descriptor reaches
all of them, as its first dimension goes through memory in steps of 512 bytes (or 16): an expert's coordinate is how far
its matrix lies from the lowest one. That the dimensions of a descriptor overlap is nothing new: those that Triton makes
of ragged rows (`triton.tools.ragged_tma`) do.

schedules  which schedules there are, and what they can run; imports no Gluon
names      Gluon's names in every supported version of Triton
cluster    what two programs need that share the experts' matrices (TMA multicast); from Triton 3.8 on
pipeline   the ring of stages, its barriers, the producer, the main loop
down, up, d_hidden   kernels and launchers of the operations of these names
"""
