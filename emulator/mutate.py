#!/usr/bin/env python3
"""Mutation test of the kernels: applies known defects and prints which test detects each: results compared with f64, random thread orders, checks.

    mutate.py OUT [PART OF A NAME]...    builds below the folder OUT

Exit code 1 if a broken kernel passes all tests and is not listed as one that must.
"""
import os
import re
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
KERNELS = f"{HERE}/../crates/llara/src/backend/cuda/kernels"
SHARED, FORWARD, BACKWARD, PLAIN = "attention.cuh", "attention_forward.cu", "attention_backward.cu", "attention_plain.cu"

# Name, file, text, replacement, number of the occurrence (0: all); then the reason, if no test can detect it.
MUTANTS = [
    ("forward: no barrier before values are overwritten", FORWARD,
     "        __syncthreads(); // the keys have been loaded, the values of the last round have been read\n", "", 0),
    ("forward: no barrier before keys are overwritten", FORWARD,
     "        __syncthreads(); // the values have been loaded, the keys have been read\n", "", 0),
    ("forward: no barrier before the kept queries are read", FORWARD, "    __syncthreads(); // the queries have been loaded\n", "", 0),
    ("forward: keys not waited for", FORWARD, "        cp_async_wait<0>();\n        __syncthreads(); // the keys",
     "        cp_async_wait<1>();\n        __syncthreads(); // the keys", 0),
    ("forward: values not waited for", FORWARD, "        cp_async_wait<0>();\n        __syncthreads(); // the values",
     "        cp_async_wait<1>();\n        __syncthreads(); // the values", 0),
    ("forward: causal mask off by one", FORWARD, "distance = block.lowest + row", "distance = block.lowest + 1 + row", 0),
    ("forward: window off by one", FORWARD, "block.reach = attention_reach(a.window);", "block.reach = attention_reach(a.window) + 1;", 0),
    ("forward: rounds start too late", FORWARD, "(lowest + 1 - a.window) / KEYS * KEYS", "(lowest + KEYS - a.window) / KEYS * KEYS", 0),
    ("forward: the last round is missing", FORWARD, "base <= highest; base += KEYS", "base + 1 <= highest; base += KEYS", 0),
    ("forward: old sums not rescaled", FORWARD, "sum[m][h] *= shrink;", "", 0),
    ("forward: old output not rescaled", FORWARD, "o[m][n][2 * h] *= shrink, o[m][n][2 * h + 1] *= shrink;", "o[m][n][2 * h] *= shrink;", 0),
    ("forward: one row decides whether the output is rescaled", FORWARD, "grows |= larger", "grows = larger", 0),
    ("forward: maximum over half of a row's lanes", FORWARD, "top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2)) * scale;", "top *= scale;", 0),
    ("forward: sum over half of a row's lanes", FORWARD, "total += __shfl_xor_sync(FULL_WARP, total, 2);", "", 0),
    ("forward: log-sum-exp in base 2", FORWARD, "(shift[m][h] + log2_approx(total)) / LOG2_E", "shift[m][h] + log2_approx(total)", 0),
    ("forward: log-sum-exp of rows past the end", FORWARD, "lane % 4 == 0 && at < again.queries", "lane % 4 == 0", 0),
    ("forward: a row without visible keys in a round", FORWARD, "NO_SCORE = -1e38f", "NO_SCORE = -INFINITY", 0),
    ("forward: wrong key head of a group", FORWARD, "kv_head = head / (a.heads / a.kv_heads);", "kv_head = head % a.kv_heads;", 0),
    ("forward: masking skipped in edge rounds", FORWARD, "base + KEYS + 16 * M - 1 > warp_end ||", "base > warp_end ||", 0),
    ("tiles: rows past the end fetched", SHARED, "first + row + i * STEP < end); // reads", "true); // reads", 0),
    ("tiles: every thread copies the first rows", SHARED, "cp_async16(to + i * STEP * HD * 2, from,", "cp_async16(to, from,", 0),
    ("tiles: no swizzle", SHARED, "HD == 96 ? c ^ (row / 2 % 4) : c ^ (row % 8)", "c", 0),
    ("tiles: half of the swizzle for 96", SHARED, "c ^ (row / 2 % 4) :", "c ^ (row % 4) :", 0,
     "the results are right, and the bank conflicts are two-way, which the checks allow"),
    ("tiles: rows past the end stored", SHARED, "if (first + r < end) store16", "store16", 0),
    ("tiles: no barrier before the rows are staged", SHARED, "    __syncwarp();\n#pragma unroll\n    for (int m = 0; m < M; m++)\n#pragma unroll\n        for (int h", "#pragma unroll\n    for (int m = 0; m < M; m++)\n#pragma unroll\n        for (int h", 0),
    ("tiles: no barrier before the staged rows are read", SHARED, "    __syncwarp();\n    for (int i = lane", "    for (int i = lane", 0),
    ("tiles: rows stored a column at a time", SHARED, "const int r = row + i / Tile<HD>::CHUNKS, c = i % Tile<HD>::CHUNKS;", "const int r = row + i % (16 * M), c = i / (16 * M);", 0),
    ("products: halves of the left operand swapped", SHARED, "s[m][2 * k + i / 2][i % 2 * 2], s[m][2 * k + i / 2][i % 2 * 2 + 1]", "s[m][2 * k + i / 2][i % 2 * 2 + 1], s[m][2 * k + i / 2][i % 2 * 2]", 0),
    ("products: wrong rows of the right operand", SHARED, "lane % 8 + lane / 16 * 8, lane / 8 % 2", "lane % 16, lane / 16", 0),
    ("products: a part of the left operand used twice", SHARED, "for (int k = KEPT; k < HD / 16; k++)", "for (int k = KEPT ? KEPT - 1 : 0; k < HD / 16; k++)", 0),
    ("search: the last sequence is never found", SHARED, "at < count &&", "at + 1 < count &&", 0),
    ("search: a tile of two sequences", SHARED, "tile * ROWS < rows}", "tile * ROWS < rows + ROWS}", 0),
    ("tiles numbered by sequence: the sequences in another order", SHARED, "per_sequence ? number / per_sequence :", "per_sequence ? number % sequences :", 0),
    ("queries: no barrier before keys are overwritten", BACKWARD, "        __syncthreads(); // the keys and values of this round have been loaded, those of the last round have been read\n", "", 0),
    ("queries: keys not waited for", BACKWARD, "        cp_async_wait<0>();\n        __syncthreads(); // the keys and values of this round", "        cp_async_wait<1>();\n        __syncthreads(); // the keys and values of this round", 0),
    ("queries: no barrier before the kept queries are read", BACKWARD, "    __syncthreads(); // the queries have been loaded\n", "", 0),
    ("queries: causal mask off by one", BACKWARD, "distance = block.lowest + row", "distance = block.lowest + 1 + row", 0),
    ("queries: window off by one", BACKWARD, "block.reach = attention_reach(a.window);", "block.reach = attention_reach(a.window) + 1;", 0),
    ("queries: masking skipped in edge rounds", BACKWARD, "base + KEYS + 16 * M - 1 > warp_end ||", "base > warp_end ||", 0),
    ("queries: delta not subtracted", BACKWARD, "(ds[m][n][i] - delta[m][i / 2])", "ds[m][n][i]", 0),
    ("queries: dq not scaled", BACKWARD, "factor[m][0] = factor[m][1] = a.scale;", "factor[m][0] = factor[m][1] = 1.0f;", 0),
    ("keys: the block's values read before they are written", BACKWARD, "    __syncthreads(); // it has been written\n", "", 0),
    ("keys: no barrier before queries are overwritten", BACKWARD, "        __syncthreads(); // the queries of this round have been loaded, those of the last round have been read\n", "", 0),
    ("keys: queries not waited for", BACKWARD, "        cp_async_wait<0>();\n        __syncthreads(); // the queries of this round", "        cp_async_wait<1>();\n        __syncthreads(); // the queries of this round", 0),
    ("keys: keys and values not waited for", BACKWARD, "    cp_async_wait<0>();\n    __syncthreads(); // the keys and values have", "    cp_async_wait<1>();\n    __syncthreads(); // the keys and values have", 0),
    ("keys: no barrier after the keys and values", BACKWARD, "    __syncthreads(); // the keys and values have been loaded\n", "", 0),
    ("keys: no barrier before the weights are read", BACKWARD, "        __syncthreads(); // the weights have been written\n", "", 0),
    ("keys: both pairs of warps use the same weights", BACKWARD, "all_weights + pair * PARTS * 32 + lane", "all_weights + lane", 0),
    ("keys: causal mask off by one", BACKWARD, "distance = lowest + lane % 4 * 2 -", "distance = lowest + 1 + lane % 4 * 2 -", 0),
    ("keys: window off by one", BACKWARD, "reach = attention_reach(a.window), offset", "reach = attention_reach(a.window) + 1, offset", 0),
    ("keys: masking skipped in edge rounds", BACKWARD, "warp_first + 16 * M - 1 > lowest ||", "warp_first > lowest ||", 0),
    ("forward: a warp at the edge skips a round", FORWARD, "active = base < warp_end &&", "active = base + 8 < warp_end &&", 0),
    ("queries: a warp at the edge skips a round", BACKWARD, "base + KEYS - 1 + 16 * M + reach <= warp_end", "base + 16 * M + reach <= warp_end", 0),
    ("keys: a warp at the edge skips a round", BACKWARD, "lowest + QUERIES > warp_first &&", "lowest > warp_first &&", 0),
    ("keys: first queries skipped", BACKWARD, "first > s.first_position() ? first - s.first_position() : 0", "first > s.first_position() ? first - s.first_position() + 1 : 0", 0),
    ("keys: one head of a group only", BACKWARD, "rounds = rounds_per_head * group;", "rounds = rounds_per_head;", 0),
    ("keys: window ends too early", BACKWARD, "const u32 beyond = last + a.window;", "const u32 beyond = first + a.window;", 0),
    ("keys: dk not scaled", BACKWARD, "is_second ? a.scale : 1.0f", "1.0f", 0),
    ("keys: lse of the other buffer", BACKWARD, "lse = *(const Floats2*)(saved + buffer * QUERIES", "lse = *(const Floats2*)(saved + (buffer ^ 1) * QUERIES", 0),
    ("keys: delta of the wrong columns", BACKWARD, "bf16_high(w) * (x[m][n][2 * h + 1] - delta.x[1])", "bf16_high(w) * (x[m][n][2 * h + 1] - delta.x[0])", 0),
    ("keys: queries past the end read", BACKWARD, "query + i < end);", "true);", 0),
    ("plain: weights overwritten while they are read", PLAIN, "        __syncwarp(); // the weights have been read\n", "", 0),
    ("plain: the last row is forgotten", PLAIN, "position + 1 - first < 32 ? position + 1 - first : 32;", "position - first < 32 ? position - first : 32;", 1),
    ("plain: delta of half of the columns", PLAIN, "c < n; c += 64) {", "c < n; c += 128) {", 0),
    ("plain: dk from the wrong weights", PLAIN, "add_rows(dk, weights[warp][1], q +", "add_rows(dk, weights[warp][0], q +", 0),
]


def broken(text, old, new, number):
    if not number:
        assert text.count(old) >= 1, f"not found: {old}"
        return text.replace(old, new)
    parts = text.split(old)
    assert len(parts) > number, f"occurrence {number} not found: {old}"
    return old.join(parts[:number]) + new + old.join(parts[number:])


def copy_kernels(to):
    """Copies the attention kernels with their modification times, so that make rebuilds only what changes."""
    os.makedirs(to)
    for name in os.listdir(KERNELS):
        if name.startswith(("attention", "prelude")):
            shutil.copy2(f"{KERNELS}/{name}", to)


def make_command(out, *targets):
    return ["make", "-s", "-j2", "-C", HERE, f"OUT={out}/build", f"KERNELS={out}/kernels", *targets]


def seen_by(base, out, mutant):
    """The first test that detects the defect: its name and its message."""
    name, file, old, new, number = mutant[:5]
    shutil.rmtree(out, ignore_errors=True)
    os.makedirs(out)
    subprocess.run(["cp", "-a", f"{base}/kernels", f"{base}/build", out], check=True)
    kernels = f"{out}/kernels"
    with open(f"{kernels}/{file}") as source:
        text = source.read()
    with open(f"{kernels}/{file}", "w") as target:
        target.write(broken(text, old, new, number))
    few = "plain" if file == PLAIN else "hd 96"  # the cases that detect most defects, to save time
    for build, command, what in (
        ("fast", ["attention", "1", few], "results"),
        ("fast", ["attention", "3"], "random orders"),
        ("checked", ["attention", "1"], "checks"),
    ):
        made = subprocess.run(make_command(out, f"{out}/build/{build}/attention"), capture_output=True, text=True)
        if made.returncode:
            return "the compiler", made.stderr.strip().splitlines()[-1]
        try:
            run = subprocess.run([f"{out}/build/{build}/{command[0]}", *command[1:]], capture_output=True, text=True,
                                 timeout=120)
        except subprocess.TimeoutExpired:
            return what, "timeout"
        if run.returncode:
            lines = (run.stdout + run.stderr).splitlines()
            told = [line for line in lines if re.search("WRONG|emulator:|ABOVE", line)]
            return what, (told or ["exit code " + str(run.returncode)])[0]
    return None, ""


def main():
    out, parts = os.path.abspath(sys.argv[1]), sys.argv[2:] or [""]
    base = f"{out}/base"
    shutil.rmtree(base, ignore_errors=True)
    copy_kernels(f"{base}/kernels")
    targets = [f"{base}/build/{build}/attention" for build in ("fast", "checked")]
    subprocess.run(make_command(base, *targets), check=True)
    for target in targets:
        subprocess.run([target], check=True, capture_output=True)  # what is not broken passes
    chosen = [mutant for mutant in MUTANTS if any(part in mutant[0] for part in parts)]
    missed = unexplained = 0
    for mutant in chosen:
        test, told = seen_by(base, f"{out}/mutant", mutant)
        missed += test is None
        reason = mutant[5] if len(mutant) > 5 else ""
        unexplained += test is None and not reason
        print(f"{mutant[0]:52} {'detected by ' + test if test else 'NOT DETECTED: ' + reason:28} {told[:140]}", flush=True)
    print(f"{len(chosen)} mutants, {len(chosen) - missed} detected")
    raise SystemExit(1 if unexplained else 0)


if __name__ == "__main__":
    main()
