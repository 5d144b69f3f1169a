"""Text and a model in; scales, integers and a quality report out. Offline: may be slow, must be exact."""
