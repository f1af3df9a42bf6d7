"""Every equation again, in float64 NumPy with plain loops, written from the published description alone.

Nothing here imports `models`, `data` or `utils`: a mistake there cannot hide in here. Slow on purpose.
"""
