"""What the tests read, and how they write."""

from megalodon_lm.data.books import bundled
from megalodon_lm.generation.sampling import Sampling

GREEDY = Sampling(max_tokens=40, temperature=0)
SEEDED = Sampling(max_tokens=40, temperature=0.9, top_p=0.95, seed=3)
TEXT = bundled("validation")["dracula"][5000:12000]


def written(generator, context, sampling):
    return [delta.token for delta in generator.stream([context], sampling)]


def in_blocks(raw, size):
    return (raw[i : i + size] for i in range(0, len(raw), size))
