"""Whole models, and their checkpoints."""
