"""When a block may compute with the weights of a module instead of calling it."""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_plain(module: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> bool:
    """Whether calling `module` would do exactly what `kind.forward` does with its weights, and nothing else.

    Of several kinds it may be any.

    Only then may its weights be used without the call. An adapter, a wrapper, a quantised or a parametrized layer is of
    another type, or its weights are (as torchao's are); hooks and a `forward` set on the instance would never run.
    """
    ordinary = not any(is_traceable_wrapper_subclass(weight) for weight in module._parameters.values())
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return type(module) in kinds and ordinary and not is_observed(module)


def is_observed(module: nn.Module) -> bool:
    """Whether a call of `module` runs more than its class: hooks of its own or of all modules, a replaced `forward`."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )
