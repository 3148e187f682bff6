"""From files to micro-batches: read, chat, tokenise, pack, check."""
