"""Language models of other kinds, as decoders of their own blocks: the same trainer, evaluators and generator."""
