"""The mathematics of the conversion: torch and scipy only, float64, one layer at a time."""
