"""Measure what was made: perplexity, divergence, size and speed, as a report."""
