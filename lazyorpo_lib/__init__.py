"""LazyORPO: fine-tune a language model with ORPO (arXiv 2403.07691) from a notebook or a terminal."""

__version__ = "0.1.0"
