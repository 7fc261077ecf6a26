"""Parts of tools/convert.py."""
