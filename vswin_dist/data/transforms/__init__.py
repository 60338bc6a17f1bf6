"""What happens to a clip after decoding: augmentation, normalisation, mixing."""
