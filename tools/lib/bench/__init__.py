"""One module a bench, and what they share."""
