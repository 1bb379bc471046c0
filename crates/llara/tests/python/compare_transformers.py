"""Compares embeddings written by llara with those of transformers for the same model folder.

    python compare_transformers.py MODEL VECTORS.safetensors TEXTS.jsonl --role passage --max-len 128

VECTORS has one (n, d) f32 tensor; TEXTS has n lines, each a JSON string or an object with the text in "text", "query" or
"passage" (a "title" is prepended, as in evaluation). Every text is encoded separately, in f32 on the CPU.
MODEL may be a PEFT adapter folder with its base model in --base. The template is LLARA's unless the model folder has a
`llara.json` with a "template". Prints the largest absolute difference; exit code 1 beyond --tolerance.
"""

import argparse
import json
import pathlib
import sys

import torch
import transformers
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer

LLARA = {
    "query": {
        "prefix": '"',
        "suffix": '", predict the following passage within eight words: <s9><s10><s11><s12><s13><s14><s15><s16>',
    },
    "passage": {
        "prefix": '"',
        "suffix": '", summarize the above passage within eight words: <s1><s2><s3><s4><s5><s6><s7><s8>',
    },
    "pooled_tokens": 8,
}


def read_texts(path):
    for line in filter(None, path.read_text(encoding="utf-8").split("\n")):
        row = json.loads(line)
        if isinstance(row, dict):
            text = next(row[k] for k in ("text", "query", "passage") if k in row)
            row = f"{row['title']} {text}" if row.get("title") else text
        yield row


def read_vectors(path, name):
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        if name is None and len(names) != 1:
            sys.exit(f"{path} has several tensors, {names}: select one with --tensor")
        return file.get_tensor(name or names[0])


def read_template(folder):
    path = folder / "llara.json"
    return json.loads(path.read_text()).get("template", LLARA) if path.exists() else LLARA


def load(args):
    """The decoder and its tokenizer."""
    if (args.model / "adapter_config.json").exists():
        from peft import PeftModel

        base = AutoModel.from_pretrained(args.base, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, args.model)
    else:
        model = AutoModel.from_pretrained(args.model, dtype=torch.float32)
    has_tokenizer = (args.model / "tokenizer.json").exists()
    return model.eval(), AutoTokenizer.from_pretrained(args.model if has_tokenizer else args.base)


@torch.inference_mode()
def encode(model, tokenizer, template, text, args):
    part = template[args.role]
    prefix = tokenizer(part["prefix"])["input_ids"]
    suffix = tokenizer(part["suffix"], add_special_tokens=False)["input_ids"]
    room = args.max_len - len(prefix) - len(suffix)
    if room <= 0:
        sys.exit(f"no tokens are left for the text: the template has {len(prefix) + len(suffix)} tokens, --max-len is {args.max_len}")
    ids = prefix + tokenizer(text, add_special_tokens=False)["input_ids"][:room] + suffix
    hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    vector = hidden[-template["pooled_tokens"] :].mean(dim=0)
    return vector if args.raw else torch.nn.functional.normalize(vector, dim=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("vectors", type=pathlib.Path)
    parser.add_argument("texts", type=pathlib.Path)
    parser.add_argument("--role", choices=["query", "passage"], required=True)
    parser.add_argument("--max-len", type=int, required=True)
    parser.add_argument("--raw", action="store_true", help="the embeddings are not normalized")
    parser.add_argument("--tensor", help="name of the tensor in VECTORS, if there are several")
    parser.add_argument("--base", type=pathlib.Path, help="base model of an adapter")
    parser.add_argument("--tolerance", type=float, default=1e-5)
    args = parser.parse_args()

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    texts = list(read_texts(args.texts))
    ours = read_vectors(args.vectors, args.tensor).float()
    if len(texts) != len(ours):
        sys.exit(f"{args.vectors} has {len(ours)} vectors, {args.texts} has {len(texts)} texts")
    model, tokenizer = load(args)
    template = read_template(args.model)
    theirs = torch.stack([encode(model, tokenizer, template, text, args) for text in texts])
    if ours.shape != theirs.shape:
        sys.exit(f"shapes differ: {tuple(ours.shape)} in VECTORS, {tuple(theirs.shape)} in transformers")
    difference = (ours - theirs).abs().amax(dim=1)
    worst = int(difference.argmax())
    print(f"{len(texts)} texts, dimension {ours.shape[1]}: largest difference {difference[worst].item():.2e} (text {worst})")
    # `<=` and not `>`, so that NaN fails.
    sys.exit(0 if bool((difference <= args.tolerance).all()) else 1)


if __name__ == "__main__":
    main()
