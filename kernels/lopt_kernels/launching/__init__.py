"""What every kernel needs: ops, segments, the user's parameters, tiles, clocks."""
