"""Linear layers behind one seam: a model asks a factory for each of them, and never sees how its weight is kept."""
