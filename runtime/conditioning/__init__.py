"""Prompts become what the UNet attends to."""
