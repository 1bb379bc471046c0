#!/usr/bin/env python3
"""Compiles kernel files with NVRTC, without a GPU.

    nvrtc.py OUTPUT_FOLDER FILE.cu ARCH...

writes OUTPUT_FOLDER/NAME.ARCH.cubin and prints the registers, spills and shared memory of each kernel, as
ptxas reports them. NVRTC is found in the virtual environment of the running Python (package
nvidia-cuda-nvrtc), or named by the variable NVRTC. Exit code 1 if a file does not compile without warnings.
"""
import ctypes
import glob
import os
import re
import sys

OPTIONS = ["--std=c++17", "-default-device"]


def path():
    """The path of the library."""
    named = os.environ.get("NVRTC")
    pattern = f"{sys.prefix}/lib/python3*/site-packages/nvidia/*/lib/libnvrtc.so.1[0-9]"
    found = [named] if named else sorted(glob.glob(pattern))
    if not found:
        raise SystemExit("NVRTC not found: pip install nvidia-cuda-nvrtc, or set NVRTC=/path/to/libnvrtc.so.13")
    return found[-1]


def library():
    found = path()
    for builtins in glob.glob(os.path.dirname(found) + "/libnvrtc-builtins.so*"):
        ctypes.CDLL(builtins, mode=ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(found)
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    return nvrtc


def read(path):
    with open(path, "rb") as file:
        return file.read()


def compile_file(nvrtc, path, arch, more=()):
    """Returns the cubin and the compiler's log."""
    headers = {os.path.basename(h): read(h) for h in glob.glob(os.path.dirname(path) + "/*.cuh")}
    texts = (ctypes.c_char_p * len(headers))(*headers.values())
    names = (ctypes.c_char_p * len(headers))(*[name.encode() for name in headers])
    program = ctypes.c_void_p()

    def check(code, doing):
        if code:
            raise SystemExit(f"{path}: cannot {doing}: {nvrtc.nvrtcGetErrorString(code).decode()}")

    name = os.path.basename(path).encode()
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), read(path), name, len(headers), texts, names), "create")
    options = [f"--gpu-architecture={arch}", *OPTIONS, "--ptxas-options=-v", *more]
    code = nvrtc.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
    )
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    text = log.value.decode()
    if code:
        print(text)
    check(code, f"compile for {arch}")
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    image = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, image)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return image.raw, text


def resources(log):
    """Kernel -> (registers, bytes spilled, bytes of static shared memory), and the log's other lines."""
    kernels, rest, name, spilled = {}, [], None, 0
    for line in log.splitlines():
        if m := re.search(r"Compiling entry function '(\w+)'", line):
            name = m.group(1)
        elif m := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(m.group(1)) + int(m.group(2))
        elif m := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[name] = (int(m.group(1)), spilled, int(shared.group(1)) if shared else 0)
        elif "warning" in line or "error" in line:
            rest.append(line)
    return kernels, rest


def main():
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    folder, path, archs = sys.argv[1], sys.argv[2], sys.argv[3:]
    nvrtc, failed = library(), False
    os.makedirs(folder, exist_ok=True)
    for arch in archs:
        image, log = compile_file(nvrtc, path, arch)
        out = f"{folder}/{os.path.basename(path)[:-3]}.{arch}.cubin"
        with open(out, "wb") as file:
            file.write(image)
        kernels, warnings = resources(log)
        for name, (registers, spilled, shared) in sorted(kernels.items()):
            print(f"{arch} {name}: {registers} registers, {spilled} bytes spilled, {shared} bytes shared")
        for line in warnings:
            print(line)
        failed |= bool(warnings)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
