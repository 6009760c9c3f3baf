"""The block inside other people's model builders, a file each."""
