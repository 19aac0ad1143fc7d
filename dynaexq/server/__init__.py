"""Transformers' own server around a model whose precision is managed, and what there is to see of that."""
