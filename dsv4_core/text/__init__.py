"""Text and tokens: tokenizer and chat encoding. Nothing here knows the model."""
