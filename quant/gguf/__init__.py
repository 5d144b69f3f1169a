"""GGUF files (llama.cpp) as checkpoints: header, blocks of numbers, names, config and tokenizer."""
