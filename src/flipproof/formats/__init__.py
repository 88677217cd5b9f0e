"""Quantised weights: which operands a memory holds for one, of which bits, and what each pattern of bits stands for.

In reading order: ``spec`` describes the formats, ``stored`` is a weight in one of them, ``codes`` says which number a
pattern of bits is, ``quantise`` makes weights of numbers and numbers of weights. ``fields`` packs codes into words and
bytes, ``compressed``, ``nf4_file`` and ``gptq`` are what checkpoints call and how they pack the operands, ``pack``
chooses among them, ``config`` is what a checkpoint's config.json says of them.
"""
