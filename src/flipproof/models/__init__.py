"""Models of ``transformers``: found, loaded into shards, made faulty, spread over processes, written again.

In reading order: ``flavors``, ``hub``, ``tokenizer`` and ``limits`` say what a model is; ``weights``, ``save`` and
``load`` move it between files and processes; ``peft_format`` and ``adapter`` its adapters; ``loss`` and ``recompute``
are how it is computed with, ``parallelize`` how it is spread, ``build`` all of it in order.
"""
