"""LazyORPO: fine-tune a language model with ORPO (arXiv 2403.07691) from a notebook or a terminal."""

import logging

__version__ = "0.1.0"

# Imported by transformers, it warns on some CPUs that it misses a package which nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
