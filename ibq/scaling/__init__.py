"""Arithmetic of sizes: parameters, FLOPs, memory, communication and time of a run, without making or running it."""
