"""What the two paths of every block do, measured: pure functions over a model and images, a file for each quantity."""
