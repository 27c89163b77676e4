"""Few-shot classification of texts: `ngrams.py` is what people do without learning to learn, `pictures.py` draws it."""
