#!/usr/bin/env python3
"""Upper bounds on the speed of a kernel with tensor cores, computed from its cubin without a GPU.

    bounds.py FILE.cubin KERNEL DYNAMIC_SHARED_BYTES [THREADS]

prints how many blocks an SM of compute capability 9.0 holds, and for the largest loop with matrix instructions
the cycles that each unit of a quarter of an SM needs for one round of all resident warps. The unit that needs
most bounds the rate; what a kernel reaches is below. Needs nvdisasm and cuobjdump (pip: nvidia-cuda-nvdisasm,
nvidia-cuda-cuobjdump).
"""
import glob
import os
import re
import subprocess
import sys

CLOCK, SMS = 1.755e9, 132  # H100 and H200 SXM
MMA_FLOPS = 2 * 16 * 8 * 16
# Cycles of a unit of a quarter SM for one instruction of a warp: 32 lanes divided by the results per cycle that the CUDA
# programming guide gives for compute capability 9.0. mma.sync reaches about 0.63 of the 1024 flops per cycle that
# warpgroup instructions do. Shared memory moves 128 bytes per cycle for all four quarters.
UNITS = {
    "HMMA": ("tensor", MMA_FLOPS / 1024 / 0.63),
    "MUFU": ("exp2", 8),
    "FFMA": ("f32", 1), "FMUL": ("f32", 1), "FADD": ("f32", 1), "FMNMX": ("integer", 2),
    "IMAD": ("integer", 2), "SHFL": ("shared", 4), "LDSM": ("shared", 16), "LDS": ("shared", 4), "STS": ("shared", 4),
    "LDGSTS": ("shared", 16), "LDG": ("memory", 4), "STG": ("memory", 4), "LDL": ("memory", 4), "STL": ("memory", 4),
}
CONTROL = ("BRA", "BAR", "NOP", "BSSY", "BSYNC", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "EXIT", "R2UR", "S2UR", "LDC", "S2R")


def tool(name):
    found = glob.glob(f"{sys.prefix}/lib/python3*/site-packages/nvidia/*/bin/{name}")
    return found[0] if found else name


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(cubin, kernel):
    """The kernel's instructions, without predicates, and its loops as (first, last) instruction."""
    text = output(tool("nvdisasm"), "-c", cubin).split(f".text.{kernel}:")[1]
    text = re.split(r"\n\.text\.|\n//-+ \.", text)[0]
    code, labels = [], {}
    for line in text.splitlines():
        if m := re.match(r"\s*(\.L_x_\d+):", line):
            labels[m.group(1)] = len(code)
        elif m := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line):
            code.append(m.group(1).strip())
    loops = []
    for at, op in enumerate(code):
        if (m := re.search(r"^BRA.*`\((\.L_x_\d+)\)", op)) and labels.get(m.group(1), len(code)) <= at:
            loops.append((labels[m.group(1)], at))
    return code, loops


def main():
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    cubin, kernel, shared = sys.argv[1], sys.argv[2], int(sys.argv[3])
    warps = int(sys.argv[4] if len(sys.argv) > 4 else 128) // 32
    usage = output(tool("cuobjdump"), "--dump-resource-usage", cubin)
    m = re.search(rf"Function {kernel}:\s*\n\s*REG:(\d+) STACK:\d+ SHARED:(\d+) LOCAL:\d+", usage)
    registers, static = int(m.group(1)), int(m.group(2))
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = (228 << 10) // (-(-(shared + static + 1024) // 128) * 128)
    blocks = min(by_registers, by_shared, 64 // warps)
    print(f"{kernel}: {registers} registers; {blocks} blocks per SM (registers allow {by_registers}, shared memory {by_shared})")
    code, loops = instructions(cubin, kernel)
    count = lambda loop: sum(op.startswith("HMMA") for op in code[loop[0]:loop[1] + 1])
    loop = max(loops, key=count)
    body = code[loop[0]:loop[1] + 1]
    needs = {}
    for op in body:
        name = op.split()[0].split(".")[0]
        unit, cycles = UNITS.get(name, ("control", 1) if name.startswith("U") or name in CONTROL else ("integer", 2))
        number, total = needs.get(unit, (0, 0))
        needs[unit] = (number + 1, total + cycles)
    needs["issue"] = (len(body), len(body))
    resident = warps * blocks / 4
    for unit, (number, cycles) in sorted(needs.items(), key=lambda x: -x[1][1]):
        print(f"    {unit:8} {number:5} instructions {cycles * resident:8.0f} cycles")
    unit, (_, cycles) = max(needs.items(), key=lambda x: x[1][1])
    rate = count(loop) * MMA_FLOPS / cycles * 4 * SMS * CLOCK / 1e12
    print(f"    bound by {unit}: {rate:.0f} TFLOP/s of the products executed")


if __name__ == "__main__":
    main()
