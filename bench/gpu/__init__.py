"""What one GPU does with the shapes of Llama-3.1-8B beside what it could: python -m bench.gpu."""
