"""Images of prompts: how they are cut for a tower, the towers, and their embeddings in place of placeholder tokens."""
