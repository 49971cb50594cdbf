"""Every link from a prediction to its loss, as text, as a table for notebooks, as a picture."""
