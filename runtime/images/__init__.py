"""Pictures: files, canvases, tiles, enlargement, previews."""
