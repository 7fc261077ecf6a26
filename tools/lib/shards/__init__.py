"""Parts of tools/make_shards.py and tools/encode_shards.py."""
