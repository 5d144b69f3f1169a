"""What starts a served model, for `octavo serve` and `octavo.LLM`: options, engines, and the text side."""
