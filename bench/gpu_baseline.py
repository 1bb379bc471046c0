"""The LLARA training step on PyTorch, transformers and peft on one GPU: the baseline of `device_check speed`.

    python gpu_baseline.py --model llama-7b --layers 4
    python gpu_baseline.py --model qwen3-0.6b --layers 8 --only lora

Random weights and token ids; 8 queries of 32 tokens and 128 passages of 128, as in `device_check speed`. All
passages have the same length, so that no padding is computed: the best case for this baseline. bf16 autocast,
scaled-dot-product attention (PyTorch selects its flash kernel), fused AdamW; with and without torch.compile and
gradient checkpointing. LoRA: rank 64 on all projections, dropout 0.1, the frozen base in bf16. Full: weights in f32.
Prints one JSON object per line.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F
import transformers

SHAPES = {
    "llama-7b": ("LlamaConfig", dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32,
                                     num_key_value_heads=32, head_dim=128, vocab_size=32016), 32),
    "qwen3-0.6b": ("Qwen3Config", dict(hidden_size=1024, intermediate_size=3072, num_attention_heads=16,
                                       num_key_value_heads=8, head_dim=128, vocab_size=151936), 28),
}
POOLED = 8
TEMPERATURE = 0.02
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="llama-7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--only", choices=["lora", "full"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--only-compile", action="store_true")
    parser.add_argument("--no-checkpointing", action="store_true")
    args = parser.parse_args()
    for lora in [True, False]:
        if args.only and (args.only == "lora") != lora:
            continue
        for compiled in [False] if args.no_compile else [True] if args.only_compile else [False, True]:
            for checkpointing in [False] if args.no_checkpointing or compiled else [False, True]:
                setting = dict(lora=lora, compile=compiled, checkpointing=checkpointing)
                try:
                    result = measure(args, **setting)
                except torch.cuda.OutOfMemoryError:
                    result = {"error": "out of memory"}
                torch.cuda.empty_cache()
                print(json.dumps({"model": args.model, "layers": args.layers, **setting, **result}), flush=True)


def measure(args, lora, compile, checkpointing):
    torch.manual_seed(1)
    torch.cuda.reset_peak_memory_stats()
    name, sizes, layers = SHAPES[args.model]
    config = getattr(transformers, name)(**sizes, num_hidden_layers=args.layers or layers, attention_dropout=0.0,
                                         use_cache=False)
    config._attn_implementation = "sdpa"
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16 if lora else torch.float32)
        model = transformers.AutoModel.from_config(config)
        torch.set_default_dtype(torch.float32)
    if lora:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=64, lora_alpha=16, lora_dropout=0.1,
                                                           target_modules=PROJECTIONS))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    encode = torch.compile(model) if compile else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    queries = torch.randint(0, sizes["vocab_size"], (8, 32), device="cuda")
    passages = torch.randint(0, sizes["vocab_size"], (128, 128), device="cuda")
    times = []
    for step in range(args.steps + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            q, p = (embed(encode, ids) for ids in (queries, passages))
        scores = q @ p.T / TEMPERATURE
        loss = F.cross_entropy(scores, torch.arange(8, device="cuda") * 16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        if step >= 3:
            times.append(time.perf_counter() - start)
    tokens = queries.numel() + passages.numel()
    seconds = statistics.median(times)
    return {"ms": round(seconds * 1e3, 1), "tokens_per_second": round(tokens / seconds),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2), "loss": round(loss.item(), 4)}


def embed(model, ids):
    hidden = model(input_ids=ids, attention_mask=None).last_hidden_state[:, -POOLED:]
    return F.normalize(hidden.float().mean(1), dim=-1)


if __name__ == "__main__":
    main()
