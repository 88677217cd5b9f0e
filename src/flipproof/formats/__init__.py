"""Quantised weights and inputs: which operands a memory holds, of which bits, and what each pattern of bits stands for.

In reading order: ``spec`` describes the formats and ``operands`` the tensors of a weight in one, which ``stored`` keeps
together; ``codes`` says which number a pattern of bits is; ``quantise`` goes from a weight to a stored one and back.
``fields`` packs codes into words and bytes; ``compressed``, ``nf4_file`` and ``gptq`` are what checkpoints call the
operands and how they pack them; ``pack`` chooses among them; ``inputs`` quantises what comes to a layer; ``linear`` is
a layer that computes with a stored weight; ``config`` is what a checkpoint's config.json says.
"""
