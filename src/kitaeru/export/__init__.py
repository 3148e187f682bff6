"""What leaves the house: chat, adapters, merged models."""
