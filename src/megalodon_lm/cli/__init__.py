"""The command `megalodon`: one file a command, thin: parse, call the library, show."""
