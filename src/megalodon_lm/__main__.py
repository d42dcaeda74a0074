"""python -m megalodon_lm: the command `megalodon`."""

from .cli.main import main

if __name__ == "__main__":
    main()
