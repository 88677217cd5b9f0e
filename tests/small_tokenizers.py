"""Small tokenizers made as those of well-known models are, and text of every sort for them."""

import random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# Code, prose, lists, blank lines, runs of spaces, CRLF, accents, digits, other scripts with and without spaces.
LINES = [
    "def rows(values, name):  # it's 12345 of them",
    "\treturn [value for value in values if value]",
    "Naïve façades cost 1,000.50 € – or more… don't they?",
    " = = A title = = ",
    "",
    "    indented,   with   runs of spaces   ",
    "слово за словом, и ещё одно",
    "汉字没有空格。下一句也没有，对吗？",
    "e\u0301 combining, \u00a0no-break, emoji 👩‍🚀 end",
    "x=1;y=2;z='a\\n'",
]


def text(lines=400, seed=0):
    return "\n".join(random.Random(seed).choices(LINES, k=lines)) + "\n"


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def trained(kind, apart=False):
    """Made as that of the named model is; ``apart``: no token holds both a letter and punctuation."""
    lines, special = text(800, seed=1).split("\n\n"), ["<unk>", "</s>"]
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special)
    elif kind == "t5":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.Replace(Regex(r"\s{1,}"), " ")])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>")
    elif kind in ("llama2", "metaspace-first", "gemma"):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        # a vocabulary as SentencePiece makes it: no token holds white space but at its beginning
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        words = r"▁*[\p{L}\p{M}\p{N}]+|▁+|\n+|[^▁\n\p{L}\p{M}\p{N}]+" if apart else "▁+[^▁\n]*|\n+|[^▁\n]+"
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(words), "isolated")
        fallback = [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special + fallback)
    else:
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(GPT2 if kind.startswith("gpt2") else LLAMA3), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=kind == "gpt2-prefix", use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(lines, trainer)
    if kind == "llama2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    elif kind == "metaspace-first":
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif kind == "gemma":
        tokenizer.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
