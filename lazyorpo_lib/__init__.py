"""LazyORPO: fine-tune a language model with ORPO (arXiv 2403.07691) from a notebook or a terminal."""

import logging
import os

__version__ = "0.1.0"

# Imported by transformers, it warns on some CPUs that it misses a package which nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
# Rows differ in length, and torch's CPU library keeps every length's kernels: 17 MiB a step of the demo, in two caches of 1,024.
# A step uses some 50 of them again and again. Read when torch is imported, which happens after this.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "128")
