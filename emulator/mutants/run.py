#!/usr/bin/env python3
"""Mutation test with the emulated device: compiles all defects of a list into one program, where an environment variable
selects one, and prints as a table which test detects each.

    mutants/run.py kernels|host OUT --python PYTHON --program PROGRAM [--built] [PART OF A NAME]...

OUT is the folder of an emulator that has been built (`make fast checked driver`); work is done below OUT/mutants. PYTHON
has nvidia-cuda-nvrtc. PROGRAM is device_check, which runs with broken kernels; with `host` it is only run to show that
all tests pass without a defect. Exit code 1 if a defect passes all tests and has no reason in its list.
"""
import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
CUDA = "crates/llara/src/backend/cuda"
FIXTURES = f"{ROOT}/crates/llara/tests/fixtures"
sys.path.insert(0, HERE)

# The families of the conformance suite that use a file.
FAMILIES = {
    "products.rs": ["products", "mixed"], "blas.rs": ["products", "mixed"], "gemm.cu": ["products", "mixed"],
    "norms.rs": ["norms", "mixed"], "norms.cu": ["norms", "mixed"], "rows.rs": ["rows", "products"],
    "rows.cu": ["rows", "products", "mixed"], "pointwise.rs": ["pointwise"], "pointwise.cu": ["pointwise", "mixed"],
    "objective.rs": ["objective", "products"], "objective.cu": ["objective", "products"], "attention.rs": ["attention", "mixed"],
    "elements.cuh": ["rows", "norms", "objective", "mixed"], "prelude.cuh": ["norms", "objective"],
}
LATE, EAGER = {}, {"EMU_EAGER": "1"}
POOL, RANGE = {"LLARA_CUDA_ALLOCATOR": "pool"}, {"LLARA_CUDA_ALLOCATOR": "range"}


def tests(kind, file):
    """What is run until a test fails: name, build, seed, environment, arguments."""
    families = FAMILIES.get(file, ["rows", "mixed"])
    if kind == "host":
        yield "transfers, work as late as possible", "fast", 0, POOL, ["transfers"]
        yield "transfers, one range of memory", "fast", 0, RANGE, ["transfers"]
        yield "transfers, work as early as possible", "fast", 0, POOL | EAGER, ["transfers"]
    yield "conformance", "fast", 0, POOL, ["conform", *families]
    yield "conformance, random order", "fast", 2, POOL, ["conform", *families]
    yield "conformance with checks", "checked", 0, POOL, ["conform", families[0]]
    for family in families[1:]:
        yield "conformance with checks", "checked", 0, POOL, ["conform", family]
    if kind == "host":
        yield "gradients, one range of memory", "fast", 3, RANGE, ["gradients", f"{FIXTURES}/qwen2"]
        yield "training", "fast", 0, POOL, ["train", f"{FIXTURES}/llama-gqa", "2"]
        yield "conformance, all families", "fast", 1, POOL, ["conform"]


def broken(folder, mutants, condition):
    """Applies the edits of all defects to the files of a folder."""
    texts = {}
    for number, (name, edits, *_) in enumerate(mutants, 1):
        for file, old, new in edits:
            if file not in texts:
                with open(f"{folder}/{file}") as source:
                    texts[file] = source.read()
            if texts[file].count(old) != 1:
                raise SystemExit(f"{name}: {texts[file].count(old)} times in {file}: {old}")
            texts[file] = texts[file].replace(old, new.replace("@", condition(number)))
    for file, text in texts.items():
        with open(f"{folder}/{file}", "w") as target:
            target.write(text)


def built_kernels(out, mutants):
    """The folders of the emulator with broken kernels."""
    work = f"{out}/mutants/kernels"
    shutil.rmtree(f"{work}/kernels", ignore_errors=True)
    shutil.copytree(f"{ROOT}/{CUDA}/kernels", f"{work}/kernels")
    broken(f"{work}/kernels", mutants, lambda number: f"emu::mutant({number})")
    subprocess.run(["make", "-s", "-j2", "-C", f"{ROOT}/emulator", f"OUT={work}/build", f"KERNELS={work}/kernels",
                    "fast", "checked", "driver"], check=True)
    return f"{work}/build"


def built_program(out, mutants):
    """device_check with broken host code."""
    work = f"{out}/mutants/host"
    shutil.rmtree(work, ignore_errors=True)
    os.makedirs(work)
    for name in ("Cargo.toml", "Cargo.lock"):
        shutil.copy2(f"{ROOT}/{name}", work)
    shutil.copytree(f"{ROOT}/crates", f"{work}/crates")
    broken(f"{work}/{CUDA}", mutants, lambda number: f"crate::backend::cuda::mutant({number})")
    with open(f"{work}/{CUDA}/mod.rs", "a") as file:
        file.write("""
/// Whether the defect of this number is active.
pub(crate) fn mutant(number: u32) -> bool {
    static ACTIVE: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
    let active = || std::env::var("EMU_MUTANT").map_or(0, |text| text.parse().unwrap_or(0));
    *ACTIVE.get_or_init(active) == number
}
""")
    # A target folder of its own: cargo would take this copy for the project itself.
    target = f"{out}/mutants/target"
    subprocess.run(["cargo", "build", "--workspace", "--example", "device_check"], cwd=work, check=True,
                   env=os.environ | {"CARGO_TARGET_DIR": target})
    return shutil.copy2(f"{target}/debug/examples/device_check", f"{work}/device_check")


def main():
    options = argparse.ArgumentParser()
    options.add_argument("kind", choices=["kernels", "host"])
    options.add_argument("out")
    options.add_argument("--python", default=sys.executable)
    options.add_argument("--program", required=True)
    options.add_argument("--built", action="store_true", help="use what an earlier run has built")
    options.add_argument("parts", nargs="*", default=[""])
    options = options.parse_intermixed_args()
    out = os.path.abspath(options.out)
    mutants = __import__(options.kind).MUTANTS
    libraries, program = out, os.path.abspath(options.program)
    if options.kind == "kernels":
        libraries = f"{out}/mutants/kernels/build" if options.built else built_kernels(out, mutants)
    else:
        program = f"{out}/mutants/host/device_check" if options.built else built_program(out, mutants)
    code = "import os, nvrtc; print(os.path.dirname(nvrtc.path()))"
    python = os.path.abspath(options.python) if "/" in options.python else options.python
    nvrtc = subprocess.run([python, "-c", code], cwd=f"{ROOT}/emulator", check=True, capture_output=True,
                           text=True).stdout.strip()

    def failure(number, test):
        """None if a test passes with a defect, else its message."""
        _, build, seed, environment, arguments = test
        environment = os.environ | environment | {
            "LD_LIBRARY_PATH": f"{libraries}/{build}:{nvrtc}", "EMU_SEED": str(seed), "EMU_MUTANT": str(number),
            "LLARA_CUDA_CACHE": f"{out}/cubins"}
        try:
            run = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, errors="replace",
                                 timeout=600)
        except subprocess.TimeoutExpired:
            return "does not end"
        if run.returncode == 0:
            return None
        lines = (run.stdout + run.stderr).splitlines()
        told = [line.strip() for line in lines if re.search(r"^FAILED|^emulator:|^emulated|panicked|assertion|CUDA:", line.strip())]
        return (told or [f"exit code {run.returncode}"])[0]

    def seen_by(numbered):
        number, mutant = numbered
        for test in tests(options.kind, mutant[1][0][0]):
            message = failure(number, test)
            if message is not None:
                return test[0], message
        return None, ""

    intact = [test for test in tests(options.kind, "") if test[1] == "fast"]
    with concurrent.futures.ThreadPoolExecutor(2) as workers:
        for test, message in zip(intact, workers.map(lambda test: failure(0, test), intact)):
            if message is not None:
                raise SystemExit(f"without a defect, {test[0]} fails with {test[4]}: {message}")
    chosen = [(n, m) for n, m in enumerate(mutants, 1) if any(part in m[0] for part in options.parts or [""])]
    missed = unexplained = 0
    print("| defect | detected by | message |\n|---|---|---|")
    with concurrent.futures.ThreadPoolExecutor(2) as workers:
        for (_, mutant), (test, message) in zip(chosen, workers.map(seen_by, chosen)):
            missed += test is None
            unexplained += test is None and len(mutant) < 3
            by = test or "not detected" + (": " + mutant[2] if len(mutant) > 2 else "")
            message = re.sub(r"/\S*/", "", message).replace("|", "/")[:110]
            print(f"| {mutant[0]} | {by} | {message} |", flush=True)
    print(f"\n{len(chosen)} defects, {len(chosen) - missed} detected")
    raise SystemExit(1 if unexplained else 0)


if __name__ == "__main__":
    main()
