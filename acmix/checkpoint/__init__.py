"""What a run leaves on disk to go on from: written whole or not at all, checked before use, executed never.

Writing: `store` saves a `snapshot` of the run in the background and prunes old ones; it builds on `safetensors_writer`,
`manifest` (the hash of every file) and `atomic` (file operations that survive a kill at any instant).
Reading: `read` finds a checkpoint and checks its files against the `manifest`; `weights` loads weights into a network.
Between them: `layout` knows the names in `checkpoints/`; `untrusted` reads weights of any origin without running code,
and `pickle_scan` says what a refused file asked for.
"""
