#!/usr/bin/env python3
"""Writes the C++ file that compiles a kernel file for the emulator and registers its kernels by name.

    register_kernels.py FILE.cu OUTPUT.cpp

The kernels are found in the preprocessed text, so that those which macros define are found too.
"""
import os
import re
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def kernels(path):
    command = ["g++", "-E", "-P", "-x", "c++", "-std=c++17", "-DEMU_SCAN", f"-I{HERE}/machine"]
    if "KERNELS" in os.environ:
        command.append("-I" + os.environ["KERNELS"])
    text = subprocess.run([*command, path], check=True, capture_output=True, text=True).stdout
    pattern = r'extern "C" EMU_GLOBAL void (?:EMU_BOUNDS\(([^)]*)\) )?(\w+)\s*\('
    return [(name, bounds.split(",")[0] if bounds else "1024") for bounds, name in re.findall(pattern, text)]


def main():
    path, out = sys.argv[1:]
    found = kernels(path)
    if not found:
        raise SystemExit(f"{path}: no kernel found")
    lines = [f'#include "{os.path.abspath(path)}"', "namespace {"]
    lines.append("thread_local volatile char local;")
    lines.append("void touch_locals() { local = 0; }")
    for name, bounds in found:
        lines.append(f'emu::Registration<{name}> registration_{name}("{name}", {bounds}, touch_locals);')
    lines.append("}")
    with open(out, "w") as file:
        file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
