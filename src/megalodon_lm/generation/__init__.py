"""Reading a prompt of any length and writing on from it."""
