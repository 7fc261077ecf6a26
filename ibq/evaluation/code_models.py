"""Simple models of code sequences: what a transformer has to beat."""

import numpy as np


def unigram_nll(codes: np.ndarray, num_codes: int) -> float:
    """Entropy in nats a token of the codes' own frequencies: the best that any model without context can do."""
    counts = np.bincount(codes.reshape(-1), minlength=num_codes)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def bigram_nll(train: np.ndarray, validation: np.ndarray, num_codes: int, columns: int) -> float:
    """NLL in nats a token of validation codes [N, T] under the left neighbour, counted on training codes [M, T].

    `columns`: codes in a row of an image.

    Interpolates bigram and unigram frequencies (Jelinek-Mercer); the weight is the one that suits the validation
    set best, which favours this baseline. The first column has no left neighbour and takes the unigram.
    """
    grid = train.reshape(-1, columns).astype(np.int64)  # one row of an image each
    unigram = np.bincount(grid.reshape(-1), minlength=num_codes) + 0.5
    unigram = unigram / unigram.sum()
    pairs = (grid[:, :-1] * num_codes + grid[:, 1:]).reshape(-1)
    pair_values, pair_counts = np.unique(pairs, return_counts=True)
    left_counts = np.bincount(grid[:, :-1].reshape(-1), minlength=num_codes)

    rows = validation.reshape(-1, columns).astype(np.int64)
    left, right = rows[:, :-1].reshape(-1), rows[:, 1:].reshape(-1)
    wanted = left * num_codes + right
    position = np.minimum(np.searchsorted(pair_values, wanted), len(pair_values) - 1)
    counts = np.where(pair_values[position] == wanted, pair_counts[position], 0)
    bigram = counts / np.maximum(left_counts[left], 1)
    seen = left_counts[left] > 0
    first = -np.log(unigram[rows[:, 0]]).sum()
    totals = []
    for weight in np.linspace(0.02, 0.98, 49):
        mixed = np.where(seen, weight * bigram + (1 - weight) * unigram[right], unigram[right])
        totals.append(first - np.log(mixed).sum())
    return float(min(totals) / rows.size)
