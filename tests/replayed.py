"""What a CUDA graph of a model's pass gives when it is launched again."""

import torch

import flipproof


def assert_a_cuda_graph_replays(root, *shape):
    """A recorded pass over inputs of this shape gives at each tick what launching it gives: its result, and the
    gradient of the first adapter. Returns both of each of three ticks."""
    x, layer = torch.randn(shape, device="cuda"), next(layer for layer in root.modules() if hasattr(layer, "lora_A"))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(2):
            root(x).sum().backward()
    torch.cuda.synchronize()
    root.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = root(x)
        y.sum().backward()
    flipproof.set_tick(root, 7)
    replayed = []
    for _ in range(3):
        layer.lora_A.grad.zero_()
        graph.replay()
        replayed.append((y.detach().clone(), layer.lora_A.grad.clone()))
    for tick, (value, grad) in enumerate(replayed, start=7):
        flipproof.set_tick(root, tick)
        layer.lora_A.grad = None
        eager = root(x)
        eager.sum().backward()
        assert torch.equal(value.nan_to_num(), eager.nan_to_num())
        assert torch.equal(grad.nan_to_num(), layer.lora_A.grad.nan_to_num())
    assert not torch.equal(*(value.nan_to_num() for value, _ in replayed[:2]))
    return replayed
