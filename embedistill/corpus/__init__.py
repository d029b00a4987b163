"""Read texts, prepare them, split them."""
