"""Text in and out: tokenizers obtained from engines, chat templates, incremental decoding, stop strings."""
