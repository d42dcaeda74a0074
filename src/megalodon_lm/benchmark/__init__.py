"""Speed and memory beside other models and beside the machine's own limits."""
