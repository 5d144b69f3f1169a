"""Images in requests: where they come from, decoded in a process of their own, as what a model's tower sees."""
