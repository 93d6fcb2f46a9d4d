"""HTML reports, plots and text tables."""
