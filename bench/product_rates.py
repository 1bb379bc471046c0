"""The products of crates/llara/benches/products.rs in PyTorch (oneDNN, MKL), in GFLOP/s: python product_rates.py [TOKENS]"""

import sys
import time

import torch

torch.set_num_threads(2)
RUNS = 11
LAYERS = [(576, 576), (576, 192), (576, 1536), (1536, 576), (64, 576), (576, 64), (2048, 5632)]


def main():
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    print("form      m     n     k    f32   bf16")
    for i, o in LAYERS:
        forms = {"y ": (tokens, o, i), "dx": (tokens, i, o), "dw": (o, i, tokens)}
        for name, (m, n, k) in forms.items():
            work, seconds = {}, {}
            for dtype in (torch.float32, torch.bfloat16):
                x, w = torch.rand(tokens, i).to(dtype), torch.rand(o, i).to(dtype)
                dy = torch.rand(tokens, o).to(dtype)
                work[dtype] = {
                    "y ": lambda x=x, w=w: torch.nn.functional.linear(x, w),
                    "dx": lambda dy=dy, w=w: dy @ w,
                    "dw": lambda dy=dy, x=x: dy.T @ x,
                }[name]
                work[dtype]()
                seconds[dtype] = []
            for _ in range(RUNS):
                for dtype, run in work.items():
                    start = time.perf_counter()
                    run()
                    seconds[dtype].append(time.perf_counter() - start)
            rates = [2 * m * n * k / sorted(s)[RUNS // 2] / 1e9 for s in seconds.values()]
            print(f"{name}   {m:5} {n:5} {k:5} {rates[0]:6.0f} {rates[1]:6.0f}")


main()
