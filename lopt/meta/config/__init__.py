"""A run's configuration: TOML presets, overrides, and what they build.

`load.py` reads, `run.py`, `sources.py` and `trainer.py` say what may be there, `build.py` makes objects of tables. This
is for runs that are described by a file; whoever has the objects already gives them to `Trainer`.
"""
