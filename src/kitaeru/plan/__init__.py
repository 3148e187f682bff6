"""What will happen: layouts, memory, choice. Never imports torch."""
