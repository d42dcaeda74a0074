"""The parts of a Megalodon block as torch modules: parameters and wiring, one concept a file."""
