"""Parts of tools/plan.py and tools/fit_scaling.py."""
