"""Reports of a quantization: figures, verdict, HTML page, model card."""
