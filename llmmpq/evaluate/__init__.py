"""Judge a loaded model: token perplexity, and a sample of its text."""
