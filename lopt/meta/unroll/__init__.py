"""The inner loop: slots, horizons, and three ways of making its steps."""
