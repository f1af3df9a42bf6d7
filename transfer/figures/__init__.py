"""Figures, an HTML page and exported files that show the slots of a trained model."""
