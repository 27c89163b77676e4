"""Few-shot classification of glyphs: pictures of tasks."""
