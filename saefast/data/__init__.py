"""Activations: text and models (harvest), shards on disk, and the sources training draws its batches from."""
