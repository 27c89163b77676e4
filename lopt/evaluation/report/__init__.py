"""An evaluation as tables, curves and one HTML page."""
