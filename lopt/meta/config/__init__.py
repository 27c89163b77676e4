"""A run's configuration: TOML presets, overrides, and what they build.

`load.py` reads, `overrides.py` changes what is read, `effect.py` refuses what nobody would read; `run.py`, `sources.py`
and `trainer.py` say what may be there, `build.py` makes objects of tables. This is for runs that are described by a
file; whoever has the objects already gives them to `Trainer`.
"""
