"""The LLARA training step and encoding in PyTorch, as in the reference implementation: transformers, peft, padded batches.

    python pytorch_baseline.py --model model --rows rows.jsonl --dtype bf16
    python pytorch_baseline.py --model model --encode corpus.jsonl --dtype bf16

Rows are used in file order, repeatedly: the first positive, the first G − 1 negatives. Queries and passages are encoded
separately, each batch padded on the left to a multiple of 8. A step is timed from the texts to the updated weights.
Prints one JSON object.
"""

import argparse
import contextlib
import json
import pathlib
import resource
import statistics
import sys
import time

import peft
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModel, AutoTokenizer

from flops import Shape, Work

POOLED = 8
TEMPERATURE = 0.02
PREFIX = '"'
SUFFIX = {
    "query": '", predict the following passage within eight words: ' + "".join(f"<s{i}>" for i in range(9, 17)),
    "passage": '", summarize the above passage within eight words: ' + "".join(f"<s{i}>" for i in range(1, 9)),
}
LORA = {"r": 64, "lora_alpha": 16, "lora_dropout": 0.1}
TORCH_DTYPE = {"f32": torch.float32, "bf16": torch.bfloat16}


def main():
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    prompts = Prompts(AutoTokenizer.from_pretrained(args.model, padding_side="left"))
    result = encode(args, prompts) if args.encode else train(args, prompts)
    result["threads"] = torch.get_num_threads()
    result["versions"] = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    json.dump(result, sys.stdout, indent=1)
    print()


class Prompts:
    """Texts in the LLARA template, as padded batches. Prefix, text and suffix are tokenized separately; only the text is truncated."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.prefix = tokenizer(PREFIX)["input_ids"]
        self.suffix = {role: self._bare(text) for role, text in SUFFIX.items()}

    def ids(self, role, texts, max_len):
        suffix = self.suffix[role]
        room = max_len - len(self.prefix) - len(suffix)
        return [self.prefix + ids[:room] + suffix for ids in self._bare(texts)]

    def padded(self, sequences):
        return self.tokenizer.pad({"input_ids": sequences}, pad_to_multiple_of=8, return_tensors="pt")

    def _bare(self, texts):
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]


class Rows:
    """Training rows in file order, starting again after the last row."""

    def __init__(self, path, batch_size, group_size):
        self.rows = jsonl(path)
        self.batch_size, self.group_size = batch_size, group_size

    def batch(self, step):
        """Queries and passages of a step, the positive first in every group."""
        queries, passages = [], []
        for i in range(step * self.batch_size, (step + 1) * self.batch_size):
            row = self.rows[i % len(self.rows)]
            queries.append((row.get("prompt") or "") + row["query"])
            negatives = [row["neg"][j % len(row["neg"])] for j in range(self.group_size - 1)]
            passages += [row["pos"][0], *negatives]
        return queries, passages


# Training


def train(args, prompts):
    model = AutoModel.from_pretrained(args.model, dtype=torch.float32, attn_implementation=args.attention)
    shape = Shape.of(model.config.to_dict())
    model.config.use_cache = False
    if args.lora:
        adapters = peft.LoraConfig(
            task_type=peft.TaskType.FEATURE_EXTRACTION, target_modules=list(shape.matrices()), **LORA
        )
        model = peft.get_peft_model(model, adapters)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    # The default optimizer of transformers' Trainer.
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0, fused=True)
    decoder = torch.compile(model) if args.compile else model
    autocast = torch.autocast("cpu", torch.bfloat16) if args.dtype == "bf16" else contextlib.nullcontext()
    work = Work(shape, lora_rank=LORA["r"] if args.lora else 0, pooled=POOLED)

    rows = Rows(args.rows, args.batch_size, args.group_size)
    steps = []
    for number in range(args.warmup + args.steps):
        faults, start = page_faults(), time.perf_counter()
        queries, passages = rows.batch(number)
        queries = prompts.ids("query", queries, args.query_max_len)
        passages = prompts.ids("passage", passages, args.passage_max_len)
        batches = prompts.padded(queries), prompts.padded(passages)
        with autocast:
            q, p = (vectors(decoder, batch) for batch in batches)
            loss = info_nce(q, p)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        model.zero_grad()
        loss = loss.item()
        seconds = time.perf_counter() - start
        lengths = [len(ids) for ids in queries + passages]
        distinct = lengths if args.lora else distinct_lengths(queries) + distinct_lengths(passages)
        steps.append({
            "step": number + 1,
            "seconds": seconds,
            "loss": loss,
            "real_tokens": sum(lengths),
            "padded_tokens": sum(batch["input_ids"].numel() for batch in batches),
            "needed_flops": work.needed(distinct),
            "plain_flops": work.plain(lengths),
            "page_faults": page_faults() - faults,
        })

    timed = steps[args.warmup :]
    peak = peak_memory()  # before the products below are measured
    tokens = int(statistics.median(step["real_tokens"] for step in timed))
    return {
        "seconds_per_step": statistics.median(step["seconds"] for step in timed),
        "real_tokens": tokens,
        "padded_tokens": int(statistics.median(step["padded_tokens"] for step in timed)),
        "real_tokens_per_second": statistics.median(step["real_tokens"] / step["seconds"] for step in timed),
        "losses": [step["loss"] for step in steps],
        "peak_memory_bytes": peak,
        "product_flops_per_second": product_rates(shape, tokens),
        "warmup": args.warmup,
        "steps": steps,
    }


def vectors(decoder, batch):
    """Mean of the last 8 hidden states, L2-normalized; padding is on the left, so they are at the end."""
    hidden = decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return F.normalize(hidden[:, -POOLED:].mean(dim=1), dim=-1)


def info_nce(queries, passages):
    scores = queries @ passages.T / TEMPERATURE
    targets = torch.arange(len(queries)) * (len(passages) // len(queries))
    return F.cross_entropy(scores, targets)


def distinct_lengths(sequences):
    return [len(ids) for ids in set(map(tuple, sequences))]


# Encoding


def encode(args, prompts):
    model = AutoModel.from_pretrained(
        args.model, dtype=TORCH_DTYPE[args.dtype], attn_implementation=args.attention
    ).eval()
    shape = Shape.of(model.config.to_dict())
    model.config.use_cache = False
    decoder = torch.compile(model) if args.compile else model
    texts = [passage_text(row) for row in jsonl(args.encode)]

    start = time.perf_counter()
    sequences = prompts.ids("passage", texts, args.passage_max_len)
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    embeddings = torch.empty(len(sequences), shape.hidden)
    padded_tokens = 0
    with torch.inference_mode():
        for first in range(0, len(order), args.encode_batch_size):
            of = order[first : first + args.encode_batch_size]
            batch = prompts.padded([sequences[i] for i in of])
            padded_tokens += batch["input_ids"].numel()
            embeddings[of] = vectors(decoder, batch).float()
    seconds = time.perf_counter() - start

    lengths = [len(ids) for ids in sequences]
    work = Work(shape, train=False, pooled=POOLED)
    result = {
        "texts": len(texts),
        "seconds": seconds,
        "texts_per_second": len(texts) / seconds,
        "real_tokens": sum(lengths),
        "padded_tokens": padded_tokens,
        "real_tokens_per_second": sum(lengths) / seconds,
        "needed_flops": work.needed(lengths),
        "plain_flops": work.plain(lengths),
        "peak_memory_bytes": peak_memory(),
        "product_flops_per_second": product_rates(shape, sum(sorted(lengths)[-args.encode_batch_size :])),
    }
    if args.check_vectors:
        others = F.normalize(read_npy(args.check_vectors), dim=-1)
        result["lowest_cosine"] = (F.normalize(embeddings, dim=-1) * others).sum(dim=-1).min().item()
    return result


def passage_text(row):
    return f"{row['title']} {row['text']}" if row.get("title") else row["text"]


def read_npy(path):
    """A matrix of little-endian f32 in NumPy's format, version 1."""
    data = bytearray(path.read_bytes())
    header_len = int.from_bytes(data[8:10], "little")
    header = data[10 : 10 + header_len].decode("latin1")
    if data[:7] != b"\x93NUMPY\x01" or "'<f4'" not in header:
        sys.exit(f"{path}: expected an f32 matrix in .npy version 1, got {header.strip()!r}")
    rows, columns = header.split("(")[1].split(")")[0].split(",")[:2]
    return torch.frombuffer(data, dtype=torch.float32, offset=10 + header_len).view(int(rows), int(columns))


# Rates and memory of the machine


def product_rates(shape, tokens, repeats=5):
    """FLOP/s of the products behind `linear` on the shapes of a block, into allocated buffers: `forward` alone, and
    `all` three, with the gradients of input and weight. That is the most that PyTorch's linear layers reach here."""
    rates = {}
    for name, dtype in TORCH_DTYPE.items():
        flops, seconds = 0, {"forward": 0.0, "backward": 0.0}
        for inputs, outputs in shape.matrices().values():
            x, dy = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, outputs).to(dtype)
            w = torch.randn(outputs, inputs).to(dtype)
            y, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(w)
            flops += 2 * tokens * inputs * outputs
            seconds["forward"] += median_time(repeats, lambda: torch.mm(x, w.t(), out=y))
            seconds["backward"] += median_time(repeats, lambda: torch.mm(dy, w, out=dx))
            seconds["backward"] += median_time(repeats, lambda: torch.mm(dy.t(), x, out=dw))
        rates[name] = {"forward": flops / seconds["forward"], "all": 3 * flops / sum(seconds.values())}
    return rates


def median_time(repeats, run):
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_memory():
    """Largest resident size of this process so far, in bytes."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def jsonl(path):
    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    return rows or sys.exit(f"{path}: the file has no rows")


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", type=pathlib.Path, required=True, help="folder of the model to start from")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--rows", type=pathlib.Path, help="training rows: JSONL with query, pos and neg")
    what.add_argument("--encode", type=pathlib.Path, help="texts to encode as passages: JSONL with text, or title and text")
    parser.add_argument("--dtype", choices=TORCH_DTYPE, default="f32", help="bf16: autocast in training, weights in encoding")
    parser.add_argument("--lora", action="store_true", help="adapters of rank 64 on all seven matrices of a block")
    parser.add_argument("--compile", action="store_true", help="use torch.compile; needs warm-up steps")
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--threads", type=int, help="number of threads; default: that of torch")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=1, help="warm-up steps before the timed steps")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--query-max-len", type=int, default=64)
    parser.add_argument("--passage-max-len", type=int, default=160)
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="constant")
    parser.add_argument("--encode-batch-size", type=int, default=32, help="texts encoded at a time")
    parser.add_argument("--check-vectors", type=pathlib.Path, help="with --encode: compare with the vectors in this .npy")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 1 or args.warmup < 0:
        parser.error("--steps must be at least 1, --warmup at least 0")
    return args


if __name__ == "__main__":
    main()
