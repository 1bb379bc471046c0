#!/usr/bin/env python3
"""Upper bounds on the speed of a kernel with tensor cores, computed from its cubin without a GPU.

    bounds.py FILE.cubin KERNEL DYNAMIC_SHARED_BYTES [THREADS [TRIPS]]
    bounds.py attention

The first form prints how many blocks an SM of compute capability 9.0 holds, and for the largest loop with matrix
instructions the cycles that each unit of a quarter of an SM needs for one round of all resident warps. The unit that
needs most bounds the rate. The second figure is an estimate that also counts waiting for operands (schedule.py). What a
kernel reaches is below both: barriers, device memory, masked parts of tiles and the first and last rounds are not counted.
A round is one without masked keys; a loop within the loop is counted TRIPS times.

The second form compiles the attention kernels with NVRTC and prints both figures for each, and for the whole backward
pass: per product executed (seven) and per product needed (five).

Needs nvdisasm and cuobjdump (pip: nvidia-cuda-nvdisasm, nvidia-cuda-cuobjdump).
"""
import glob
import os
import re
import subprocess
import sys
import tempfile

import nvrtc
import schedule

CLOCK, SMS = 1.755e9, 132  # H100 and H200 SXM
MMA_FLOPS = 2 * 16 * 8 * 16
# Cycles of a unit of a quarter SM for one instruction of a warp: 32 lanes divided by the results per cycle that the CUDA
# programming guide gives for compute capability 9.0. mma.sync reaches about 0.63 of the 1024 flops per cycle that
# warpgroup instructions do. Shared memory moves 128 bytes per cycle for all four quarters.
UNITS = {
    "HMMA": ("tensor", MMA_FLOPS / 1024 / 0.63),
    "MUFU": ("exp2", 8),
    "FFMA": ("f32", 1), "FMUL": ("f32", 1), "FADD": ("f32", 1), "FMNMX": ("integer", 2),
    "IMAD": ("integer", 2), "SHFL": ("shared", 4), "LDSM": ("shared", 16),
    "LDGSTS": ("shared", 16), "LDG": ("memory", 4), "STG": ("memory", 4), "LDL": ("memory", 4), "STL": ("memory", 4),
}
CONTROL = ("BRA", "BAR", "NOP", "BSSY", "BSYNC", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "EXIT", "R2UR", "S2UR", "LDC", "S2R")


BRANCH = re.compile(r"(@!?U?P\w+\s+)?BRA (?:!?U?P\w+, )?`\((\.L_x_\d+)\)")
WORK = ("HMMA", "LDSM", "LDGSTS", "LDGDEPBAR", "DEPBAR", "BAR", "SHFL", "STS")


def tool(name):
    found = glob.glob(f"{sys.prefix}/lib/python3*/site-packages/nvidia/*/bin/{name}")
    return found[0] if found else name


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(cubin, kernel):
    """The kernel's instructions, the instruction of each label, and the loops as (first, last) instruction."""
    text = output(tool("nvdisasm"), "-c", cubin).split(f".text.{kernel}:")[1]
    text = re.split(r"\n\.text\.|\n//-+ \.", text)[0]
    code, labels = [], {}
    for line in text.splitlines():
        if m := re.match(r"\s*(\.L_x_\d+):", line):
            labels[m.group(1)] = len(code)
        elif m := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(m.group(1).strip())
    loops = []
    for at, op in enumerate(code):
        if (m := BRANCH.match(op)) and labels.get(m.group(2), len(code)) <= at:
            loops.append((labels[m.group(2)], at))
    return code, labels, loops


def round_of(code, labels, loop, trips):
    """The instructions of one round that is neither the first nor the last, without masked keys: a branch is taken if
    what it skips only computes, without tensor cores. The body of a loop within the loop is repeated `trips` times."""
    at, path = loop[0], []
    while at <= loop[1]:
        path.append(code[at])
        m = BRANCH.match(code[at])
        target = labels.get(m.group(2), -1) if m else -1
        if loop[0] < target <= at and at < loop[1]:
            path += code[target:at + 1] * (trips - 1)
        if at < target <= loop[1] and (not m.group(1) or not any(base_name(op) in WORK for op in code[at:target])):
            at = target
        else:
            at += 1
    return path


def base_name(op):
    return re.sub(r"^@!?U?P\w+\s+", "", op).split()[0].split(".")[0]


def cost(op):
    """The unit of an instruction and the cycles that it occupies the unit."""
    name = base_name(op)
    if name in ("LDS", "STS"):
        return "shared", 16 if ".128" in op else 8 if ".64" in op else 4
    return UNITS.get(name, ("control", 1) if name.startswith("U") or name in CONTROL else ("integer", 2))


def analyze(cubin, kernel, shared, threads=128, trips=1):
    """Prints what bounds the kernel. Returns both rates, in TFLOP/s of the products executed."""
    warps = threads // 32
    usage = output(tool("cuobjdump"), "--dump-resource-usage", cubin)
    m = re.search(rf"Function {kernel}:\s*\n\s*REG:(\d+) STACK:\d+ SHARED:(\d+) LOCAL:\d+", usage)
    registers, static = int(m.group(1)), int(m.group(2))
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = (228 << 10) // (-(-(shared + static + 1024) // 128) * 128)
    blocks = min(by_registers, by_shared, 64 // warps)
    print(f"{kernel}: {registers} registers; {blocks} blocks per SM (registers allow {by_registers}, shared memory {by_shared})")
    code, labels, loops = instructions(cubin, kernel)
    products = lambda ops: sum(base_name(op) == "HMMA" for op in ops)
    body = round_of(code, labels, max(loops, key=lambda loop: products(code[loop[0]:loop[1] + 1])), trips)
    needs = {}
    for op in body:
        unit, cycles = cost(op)
        number, total = needs.get(unit, (0, 0))
        needs[unit] = (number + 1, total + cycles)
    needs["issue"] = (len(body), len(body))
    resident = warps * blocks // 4
    for unit, (number, cycles) in sorted(needs.items(), key=lambda x: -x[1][1]):
        print(f"    {unit:8} {number:5} instructions {cycles * resident:8.0f} cycles")
    rate = lambda cycles: products(body) * MMA_FLOPS * resident / cycles * 4 * SMS * CLOCK / 1e12
    unit, (_, most) = max(needs.items(), key=lambda x: x[1][1])
    issued = schedule.cycles(body, resident, cost)
    print(f"    bound by {unit}: {rate(most * resident):.0f} TFLOP/s of the products executed")
    print(f"    issued in order: {issued:.0f} cycles, {rate(issued):.0f} TFLOP/s of the products executed")
    return rate(most * resident), rate(issued)


def attention():
    """All attention kernels, with the shared memory that their files name."""
    kernels = f"{os.path.dirname(os.path.abspath(__file__))}/../crates/llara/src/backend/cuda/kernels"
    with tempfile.TemporaryDirectory() as folder:
        for name in ("forward", "backward"):
            cubin, _ = nvrtc.compile_file(nvrtc.library(), f"{kernels}/attention_{name}.cu", "sm_90")
            with open(f"{folder}/{name}", "wb") as file:
                file.write(cubin)
        for head in (64, 96, 128):
            analyze(f"{folder}/forward", f"attention_forward_{head}", 512 * head)
            queries = analyze(f"{folder}/backward", f"attention_backward_queries_{head}", 768 * head)
            keys = analyze(f"{folder}/backward", f"attention_backward_keys_{head}", 512 * head + 4608)
            # Three of the seven products are computed at the first rate, four at the second.
            executed = [7 / (3 / q + 4 / k) for q, k in zip(queries, keys)]
            for what, rate in zip(("bound", "issued in order"), executed):
                print(f"backward {head}, {what}: {rate:.0f} TFLOP/s of the products executed, {rate * 5 / 7:.0f} of those needed")


def main():
    if sys.argv[1:] == ["attention"]:
        attention()
    elif len(sys.argv) < 4:
        raise SystemExit(__doc__)
    else:
        analyze(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))


if __name__ == "__main__":
    main()
