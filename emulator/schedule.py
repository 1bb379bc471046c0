"""Estimates the cycles of one round of a loop on a quarter of an SM: its resident warps issue their instructions in
order, each when its operands are ready and its unit is free. This shows waiting that the sums of bounds.py do
not: too few warps or registers to hide the latency of shared memory and of tensor cores.

Not modelled: barriers between warps, misses of the instruction cache, bank conflicts of registers, device memory.
"""
import re

# Cycles from issue to the result, rounded, as measured for compute capability 8.0 to 9.0 in published microbenchmarks.
LATENCY = {"HMMA": 33, "MUFU": 22, "SHFL": 24, "LDSM": 33, "LDS": 29, "S2R": 30, "LDL": 40, "LDG": 300, "LDC": 30}
ALU_LATENCY = 5
# A warp can issue instructions for these units before they are free, up to so many cycles before.
QUEUE = {"shared": 96, "exp2": 16}


def width(name, op):
    """Registers of the destination."""
    if name == "HMMA" or (name == "LDSM" and ".4" in op):
        return 4
    if name in ("LDS", "LDG", "LDL"):
        return 4 if ".128" in op else 2 if ".64" in op else 1
    return 2 if ".WIDE" in op or ".64" in op.split()[0] or name == "CS2R" else 1


def operands(op):
    """The name of an instruction, and the registers and predicates that it writes and reads."""
    guard = re.match(r"@!?(U?P\d)\s+", op)
    text = op[guard.end():] if guard else op
    full, _, rest = text.partition(" ")
    name = full.split(".")[0]
    writes, reads = set(), {guard.group(1)} if guard else set()
    writes_none = name.startswith(("ST", "LDGSTS", "BRA", "BAR", "DEPBAR"))
    for at, part in enumerate(rest.split(",")):
        for kind, number in re.findall(r"\b(UR|R|UP|P)(\d+)", part):
            # The destination is first; SHFL and comparisons begin with a predicate and may have two.
            first = at == 0 or (at == 1 and (name == "SHFL" or (kind in ("P", "UP") and "SETP" in full)))
            if first and not writes_none and "[" not in part:
                count = width(name, text) if kind in ("R", "UR") else 1
                writes |= {f"{kind}{int(number) + i}" for i in range(count)}
                continue
            count = 1
            if kind == "R" and name == "HMMA":
                count = (4, 4, 2, 4)[at]
            elif kind == "R" and name in ("STS", "STG") and "[" not in part:
                count = 4 if ".128" in full else 2 if ".64" in full else 1
            elif kind == "R" and ".64" in part:
                count = 2
            reads |= {f"{kind}{int(number) + i}" for i in range(count)}
    return name, writes, reads


def cycles(body, warps, cost, rounds=6):
    """Cycles of a round in which each of `warps` warps executes the instructions `body`. `cost` returns the unit of an
    instruction and the cycles that it occupies the unit."""
    decoded = []
    for op in body:
        name, writes, reads = operands(op)
        unit, busy = cost(op)
        decoded.append((unit, busy, writes, reads | writes, LATENCY.get(name, ALU_LATENCY)))
    at, ready, ends = [0] * warps, [{} for _ in range(warps)], [[] for _ in range(warps)]
    # Warps of separate blocks do not run in step.
    start = [warp * len(body) * 0.7 for warp in range(warps)]
    free, clock = {}, 0.0
    order = list(range(warps))
    while any(len(end) < rounds for end in ends):

        def earliest(warp):
            unit, _, _, needed, _ = decoded[at[warp]]
            operands_ready = max((ready[warp].get(x, 0.0) for x in needed), default=0.0)
            return max(clock, start[warp], free.get(unit, 0.0) - QUEUE.get(unit, 0), operands_ready)

        # The same warp as long as it is not later than another, like the hardware's scheduler.
        warp = min((w for w in order if len(ends[w]) < rounds + 2), key=earliest)
        when = earliest(warp)
        unit, busy, writes, _, latency = decoded[at[warp]]
        begins = max(when, free.get(unit, 0.0))
        for x in writes:
            ready[warp][x] = begins + max(latency, busy)
        free[unit] = begins + busy
        clock = when + 1
        order.remove(warp)
        order.insert(0, warp)
        at[warp] += 1
        if at[warp] == len(body):
            at[warp] = 0
            ends[warp].append(when)
    return sum((end[-1] - end[1]) / (len(end) - 2) for end in ends) / warps
