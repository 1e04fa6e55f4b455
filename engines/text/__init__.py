"""Text in, text out: tokenizer, chat templates, stop strings and conversations, and what of them an engine carries."""
