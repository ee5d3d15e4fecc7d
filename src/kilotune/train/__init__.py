"""Fine-tuning on one's own data: recipes that drive transformers' Trainer. Importing this needs no extra."""
