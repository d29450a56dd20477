"""A local web page over latents.db: `saefast explore`."""
