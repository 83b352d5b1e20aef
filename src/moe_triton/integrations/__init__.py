"""Other people's models: transformers' experts interface."""
