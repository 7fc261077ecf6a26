"""Parts of tools/inspect_codebook.py."""
