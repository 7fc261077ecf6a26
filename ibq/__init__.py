"""Index Backpropagation Quantization: image tokenizers and autoregressive image models.

tokenizer = ibq.load_tokenizer("runs/quickstart/tokenizer")
transformer = ibq.load_transformer("runs/quickstart/transformer")
images = ibq.generate(tokenizer, transformer, classes=[0, 1, 2])
"""

__version__ = "0.1.0"
HUB = ["CardFacts", "from_pretrained", "push_to_hub", "save_pretrained"]
__all__ = ["SAMPLER_VERSION", "generate", "load_tokenizer", "load_transformer", *HUB]


def __getattr__(name: str):
    # Lazily, so that `import ibq` and every --help stay quick.
    if name in HUB:
        from ibq import hub

        return getattr(hub, name)
    if name == "SAMPLER_VERSION":
        from ibq.sampler import SAMPLER_VERSION

        return SAMPLER_VERSION
    if name in __all__:
        from ibq import api

        return getattr(api, name)
    raise AttributeError(f"module 'ibq' has no attribute {name!r}")
