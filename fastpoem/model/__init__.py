"""The model: GPT-2 as a module of our own, its attention, and Hugging Face folders in and out."""
