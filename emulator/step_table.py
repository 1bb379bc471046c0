#!/usr/bin/env python3
"""The work of one training step by kind of operation: launches, floating-point operations, bytes, and the time that an H200
needs for them at least, from the launches that the host code makes.

    step_table.py --emulator FOLDER --python PYTHON --program PROGRAM [MODEL LAYERS [MILLISECONDS]]
    step_table.py --log FILE [MODEL LAYERS [MILLISECONDS]]

PROGRAM is device_check, whose `speed MODEL LAYERS` is run on the emulated device without executing anything (EMU_DRY);
FILE is a log of such a run. MILLISECONDS is the measured time of a step.

Bytes are those of the operands, each read or written once. The least time of an operation is the larger of its
operations at the rate below and its bytes at the bandwidth of the memory.
"""
import argparse
import collections
import os
import re
import struct
import subprocess

HERE = os.path.dirname(os.path.abspath(__file__))
KERNELS = f"{HERE}/../crates/llara/src/backend/cuda/kernels"
BANDWIDTH = 4.8e12  # bytes/s, H200
PEAK = 989e12  # FLOP/s of dense bf16 products, H200
MEASURED_PRODUCTS = 765e12  # FLOP/s of cuBLASLt on such shapes: docs/performance.md
PASSAGE, PASSAGES, QUERY, QUERIES = 128, 128, 32, 8  # the batch of `device_check speed`

FORMATS = {"u64": "Q", "u32": "I", "float": "f", "double": "d"}


def structs():
    """The argument structs of the kernel files: fields and their format for `struct`."""
    found = {}
    for name in os.listdir(KERNELS):
        with open(f"{KERNELS}/{name}") as file:
            text = file.read()
        for kind, body in re.findall(r"struct (\w+Args) \{\n(.*?)\n\};", text, re.S):
            fields = [line.split("//")[0].strip().rstrip(";").rsplit(" ", 1) for line in body.splitlines()]
            fields = [(kind, name) for kind, name in (field for field in fields if len(field) == 2)]
            found[kind] = ([name for _, name in fields], "@" + "".join("Q" if kind.endswith("*") else FORMATS[kind] for kind, _ in fields))
    return found


STRUCTS = structs()


def arguments(kind, digits):
    names, layout = STRUCTS[kind]
    data = bytes.fromhex(digits)
    return dict(zip(names, struct.unpack_from(layout, data)))


def size_of(dtype):
    return 2 if dtype == "bf16" else 4


def kernel_work(name, digits):
    """Kind of operation, floating-point operations that count, and bytes of a launch."""
    parts = name.split("_")
    if name.startswith("rms_norm_backward"):
        a, (dy, x, dx) = arguments("NormBackwardArgs", digits), (size_of(t) for t in parts[3:6])
        return "norms", 0, a["groups"] * a["group"] * (dy + x + dx * (2 if a["add"] else 1))
    if name.startswith("rms_norm_weight"):
        a = arguments("NormWeightArgs", digits)
        return "norms", 0, a["groups"] * a["group"] * (size_of(parts[3]) + size_of(parts[4]))
    if name.startswith("rms_norm"):
        a = arguments("NormArgs", digits)
        return "norms", 0, a["groups"] * a["group"] * (size_of(parts[2]) + size_of(parts[3]))
    if name.startswith("rope"):
        a = arguments("RopeArgs", digits)
        return "rope", 0, a["rows"] * a["heads"] * 2 * a["half"] * 2 * size_of(parts[1])
    if name.startswith("swiglu"):
        a = arguments("SwigluArgs", digits)
        # Forward: gate and up read, y written. Backward: all three read and written.
        return "SwiGLU", 0, a["rows"] * a["cols"] * size_of(parts[-1]) * (6 if "backward" in name else 3)
    if name.startswith("dropout"):
        a = arguments("DropoutArgs", digits)
        return "dropout", 0, a["rows"] * a["cols"] * size_of(parts[1]) * (3 if a["add"] else 2)
    if name.startswith("attention_delta"):
        a = arguments("AttentionArgs", digits)
        return "attention", 0, 2 * a["query_rows"] * a["heads"] * a["head_dim"] * 2
    if name.startswith("attention"):
        a = arguments("AttentionArgs", digits)
        # Half of all pairs; in the last layer only some rows are queries.
        pairs = (PASSAGES * PASSAGE * (PASSAGE + 1) + QUERIES * QUERY * (QUERY + 1)) / 2
        if a["query_rows"] != a["key_rows"]:
            pairs = a["query_rows"] * PASSAGE
        products = {"forward": 2, "queries": 2, "keys": 3}[re.search("forward|queries|keys", name)[0]]
        q = a["query_rows"] * a["heads"] * a["head_dim"] * 2
        kv = a["key_rows"] * a["kv_heads"] * a["head_dim"] * 2
        return "attention", 2 * products * pairs * a["heads"] * a["head_dim"], {"forward": 2 * q + 2 * kv}.get(parts[1], 3 * q + 2 * kv)
    if name.startswith("copy"):
        a = arguments("CopyArgs", digits)
        return "copies and sums of rows", 0, a["rows"] * a["cols"] * (size_of(parts[1]) + size_of(parts[2]))
    if name == "add_scaled":
        a = arguments("AddScaledArgs", digits)
        return "copies and sums of rows", 0, a["rows"] * a["cols"] * 12
    if name.startswith("gather"):
        a = arguments("GatherArgs", digits)
        return "copies and sums of rows", 0, a["n"] * a["cols"] * 2 * size_of(parts[1])
    if name == "adamw":
        a = arguments("AdamWArgs", digits)
        return "AdamW and gradient norm", 0, a["count"] * (28 + (2 if a["working"] else 0))
    if name == "sum_of_squares":
        a = arguments("SquaresArgs", digits)
        return "AdamW and gradient norm", 0, a["count"] * 4
    return "others", 0, 0


def product_work(fields):
    dtype, out, sizes, beta = fields
    m, n, k = map(int, sizes.split(","))
    operands = (m * k + k * n) * size_of(dtype) + m * n * size_of(out) * (2 if float(beta) else 1)
    kind = "products of adapters" if min(n, k, m) <= 64 else "products of the model"
    if dtype == "f32":
        kind = "others"
    return kind, 2 * m * n * k, operands


def step_of(log):
    """The lines of one step: those between two updates' ends."""
    with open(log) as file:
        lines = file.read().splitlines()
    ends = [i for i, line in enumerate(lines) if line.startswith("kernel adamw ")]
    last_of_step = [i for i, following in zip(ends, ends[1:] + [len(lines)]) if following - i > 100 or following == len(lines)]
    return lines[last_of_step[-2] + 1:last_of_step[-1] + 1]


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--log")
    options.add_argument("--emulator")
    options.add_argument("--python")
    options.add_argument("--program")
    options.add_argument("run", nargs="*", default=["llama-7b", "32", "921.7"])
    options = options.parse_args()
    log = options.log
    model, layers, measured = (options.run + [None] * 3)[:3]
    if not log:
        log = f"{options.emulator}/step.log"
        python = os.path.abspath(options.python) if "/" in options.python else options.python
        nvrtc = subprocess.run([python, "-c", "import os, nvrtc; print(os.path.dirname(nvrtc.path()))"], cwd=HERE, check=True,
                               capture_output=True, text=True).stdout.strip()
        environment = {"EMU_DRY": "1", "EMU_LOG": log, "EMU_MEMORY": str(130 << 30), "LLARA_CUDA_ALLOCATOR": "range",
                       "LD_LIBRARY_PATH": f"{os.path.abspath(options.emulator)}/fast:{nvrtc}"}
        fixture = f"{HERE}/../crates/llara/tests/fixtures/llama-gqa"
        subprocess.run([options.program, "speed", model, layers, fixture, "lora"], env=os.environ | environment, check=True)
    rows = collections.defaultdict(lambda: [0, 0.0, 0.0, 0.0, 0.0])
    for line in step_of(log):
        word, *fields = line.split()
        if word == "kernel":
            kind, flops, size = kernel_work(fields[0], fields[4] if len(fields) > 4 else "")
        elif word == "product":
            kind, flops, size = product_work(fields)
        else:
            kind, flops, size = "transfers and zeros", 0, int(fields[0])
        row = rows[kind]
        row[0] += 1
        row[1] += flops
        row[2] += size
        row[3] += max(flops / PEAK, size / BANDWIDTH)
        row[4] += max(flops / MEASURED_PRODUCTS, size / BANDWIDTH)
    total = [sum(row[i] for row in rows.values()) for i in range(5)]
    print("| operations | launches | TFLOP | GB | ms at 989 TFLOP/s and 4.8 TB/s | ms at the measured rate of products | share |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for kind, row in sorted(rows.items(), key=lambda item: -item[1][4]) + [("all", total)]:
        print(f"| {kind} | {row[0]} | {row[1] / 1e12:.1f} | {row[2] / 1e9:.1f} | {row[3] * 1e3:.1f} | {row[4] * 1e3:.1f} | "
              f"{row[4] / total[4]:.1%} |")
    if measured:
        measured = float(measured) / 1e3
        print(f"\nMeasured: {measured * 1e3:.1f} ms, {measured / total[3]:.2f} times the least and {measured / total[4]:.2f} times the time at the measured rate.")


if __name__ == "__main__":
    main()
