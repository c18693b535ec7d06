"""Files that are made once for a content, written whole or not at all."""
