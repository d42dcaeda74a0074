"""Text: tokenizers, the bundled novels, and batches for training."""
