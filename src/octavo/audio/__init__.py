"""Sound: files to samples, samples to pieces, and pieces to what a speech model reads. Knows no model and no HTTP."""
