"""Creates the model of the benchmark: a Llama with random weights, and a tokenizer trained on the rows.

    python make_model.py --rows rows.jsonl --output model        (the same rows and seed give the same model)

The tokenizer is a byte-level BPE that encodes <s1> … <s16>, the tokens of the LLARA template, as single ids, and prepends
a BOS token to a text.
"""

import argparse
import json
import pathlib

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast
from transformers.utils import logging

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SPECIAL_TOKENS = [PAD, BOS, EOS] + [f"<s{i}>" for i in range(1, 17)]


def main():
    args = arguments()
    logging.disable_progress_bar()
    tokenizer = train_tokenizer(texts(args.rows), args.vocab_size)
    if len(tokenizer) < args.vocab_size:
        print(f"the vocabulary of the tokenizer has {len(tokenizer):,} entries; the model has {args.vocab_size:,} embeddings")

    torch.manual_seed(args.seed)
    model = LlamaModel(config(args))
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.output}: {parameters:,} parameters, {len(tokenizer):,} tokens")


def texts(paths):
    """Queries and passages of all rows."""
    for path in paths:
        with open(path, encoding="utf-8") as lines:
            for line in filter(str.strip, lines):
                row = json.loads(line)
                yield from (row["query"], *row["pos"], *row["neg"])


def train_tokenizer(texts, vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="left"
    )


def config(args):
    return LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.max_positions,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
    )


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rows", type=pathlib.Path, nargs="+", required=True, help="JSONL with query, pos and neg")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder of the model")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--hidden-size", type=int, default=576)
    parser.add_argument("--intermediate-size", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--max-positions", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
