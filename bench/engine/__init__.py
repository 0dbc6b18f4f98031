"""One engine beside llama.cpp's server and vLLM on the same weights, machine and threads."""
