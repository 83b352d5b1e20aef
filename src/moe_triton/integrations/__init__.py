"""Other people's models: transformers' experts interface, and `swap` for whole models."""
