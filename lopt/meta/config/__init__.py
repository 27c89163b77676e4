"""A run's configuration: TOML presets, overrides, and what they build."""
