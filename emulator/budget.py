#!/usr/bin/env python3
"""Checks the registers, spills and static shared memory of every kernel against a budget, on four architectures.

    budget.py [check]   compiles all kernels with NVRTC and compares them with budget.txt; exit code 1 if a
                        kernel needs more than its budget, or has none
    budget.py write     writes budget.txt from what the kernels need now

Needs NVRTC (see nvrtc.py).
"""
import glob
import os
import sys
from concurrent.futures import ProcessPoolExecutor

import nvrtc

HERE = os.path.dirname(os.path.abspath(__file__))
KERNELS = os.environ.get("KERNELS", f"{HERE}/../crates/llara/src/backend/cuda/kernels")
FILE = f"{HERE}/budget.txt"
ARCHS = ["sm_80", "sm_90", "sm_100", "sm_120"]
HEADER = "# kernel architecture registers spilled_bytes static_shared_bytes: the most that each may need\n"


def measure(task):
    path, arch = task
    _, log = nvrtc.compile_file(nvrtc.library(), path, arch)
    kernels, warnings = nvrtc.resources(log)
    return {(name, arch): needs for name, needs in kernels.items()}, [f"{path} {arch}: {w}" for w in warnings]


def main():
    verb = sys.argv[1] if len(sys.argv) > 1 else "check"
    tasks = [(path, arch) for path in sorted(glob.glob(f"{KERNELS}/*.cu")) for arch in ARCHS]
    found, wrong = {}, []
    with ProcessPoolExecutor(2) as pool:
        for kernels, warnings in pool.map(measure, tasks):
            found.update(kernels)
            wrong += warnings
    if verb == "write":
        with open(FILE, "w") as file:
            file.write(HEADER)
            for (name, arch), needs in sorted(found.items()):
                file.write(f"{name} {arch} {' '.join(map(str, needs))}\n")
    else:
        budget = {}
        with open(FILE) as file:
            for line in file:
                if not line.startswith("#"):
                    name, arch, *most = line.split()
                    budget[name, arch] = tuple(map(int, most))
        for key, needs in sorted(found.items()):
            if key not in budget:
                wrong.append(f"{' '.join(key)}: no budget")
            elif any(need > most for need, most in zip(needs, budget[key])):
                wrong.append(f"{' '.join(key)}: needs {needs}, its budget is {budget[key]} "
                             "(registers, bytes spilled, bytes of static shared memory)")
        wrong += [f"{' '.join(key)}: has a budget, but no kernel" for key in sorted(budget.keys() - found.keys())]
    for line in wrong:
        print(line)
    spilling = [key for key, needs in found.items() if needs[1]]
    print(f"{len(found)} kernels compiled, {len(spilling)} spill, {len(wrong)} errors")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
