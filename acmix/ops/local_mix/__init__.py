"""Both paths of the ACmix block over one map of q, k and v."""

from acmix.ops.local_mix.op import local_mix, local_mix_refusal

__all__ = ["local_mix", "local_mix_refusal"]
