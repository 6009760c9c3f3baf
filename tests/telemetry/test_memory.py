import torch
from torch import nn

from acmix.telemetry.memory import SavedActivations, step_memory


def test_saved_activations_count_each_storage_once_and_no_weights() -> None:
    model = nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    with SavedActivations(model) as saved:
        y = model(x)  # keeps x and the weight
        loss = (y * y).sum() + y.view(2, 16).square().sum()  # keeps y several times, once as a view
    assert saved.bytes == (x.numel() + y.numel()) * 4
    loss.backward()  # the hooks hand back what they were given
    assert x.grad is not None


def test_a_step_counts_weights_gradients_and_optimiser_state() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8))
    model[1].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    memory = step_memory(model, optimizer, activations=1000)
    assert memory.weights == 4 * (64 + 8 + 8 + 8 + 8) + 8  # two running statistics, and an int64 counter of batches
    assert memory.gradients == 4 * (64 + 8)
    assert memory.optimizer == 2 * 4 * (64 + 8) + 2 * 4  # two moments, and a step counter for each tensor
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + 1000
