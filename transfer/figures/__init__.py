"""Figures, pages and files that show what the prototypes of a trained model gather."""
