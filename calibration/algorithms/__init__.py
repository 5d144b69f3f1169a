"""GPTQ, AWQ, SmoothQuant and the searches they share."""
