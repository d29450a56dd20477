"""What every latent responds to: one pass over rows into latents.db, and that file read again."""
