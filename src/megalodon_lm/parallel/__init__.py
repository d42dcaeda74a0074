"""Many devices: a mesh of ranks, and what is applied to a model from outside so that they share its work."""
