"""Meshes, textures and scenes that simulators need and their packages lack: where they are, and getting them."""
