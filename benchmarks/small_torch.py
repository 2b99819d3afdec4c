"""The steps of `small` in PyTorch, for `./run bench small`: run by a Python that has torch, told what to do by lines.

    python small_torch.py FOLDER THREADS WAY

FOLDER/start.npz: images uint8 [N, S, S, 3], labels int64 [N], mean, std, and the weights w0, w1, ... as Keras has them.
A line {"chosen": [[...]], "rate": r, "augment": bool} is answered by {"losses": [...], "seconds": s}. WAY: eager or
compiled. Channels last, as oneDNN likes images; the update is PyTorch's fused one.
"""

import json
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

DECAY, SMOOTHING, MOVED = 5e-3, 0.1, 2  # of the recipe; pixels up to which images are moved


class Small(nn.Module):
    """`networks._compact` from its weights."""

    def __init__(self, weights, mean, std):
        super().__init__()
        self.register_buffer("factor", torch.tensor(1 / (255 * std), dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("offset", torch.tensor(-mean / std, dtype=torch.float32).view(1, 3, 1, 1))
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        for at in range(0, len(weights) - 2, 5):
            kernel, gamma, beta, running, variance = map(torch.from_numpy, weights[at:at + 5])
            side, _, inputs, outputs = kernel.shape
            stride = side // 2 if at == 0 else 1
            convolution = nn.Conv2d(inputs, outputs, side, stride, (side - stride) // 2 if at == 0 else 1, bias=False)
            norm = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.2)
            with torch.no_grad():
                convolution.weight.copy_(kernel.permute(3, 2, 0, 1))
                for into, values in ((norm.weight, gamma), (norm.bias, beta), (norm.running_mean, running),
                                     (norm.running_var, variance)):
                    into.copy_(values)
            self.convolutions.append(convolution)
            self.norms.append(norm)
        kernel, bias = map(torch.from_numpy, weights[-2:])
        self.head = nn.Linear(*kernel.shape)
        with torch.no_grad():
            self.head.weight.copy_(kernel.T)
            self.head.bias.copy_(bias)

    def forward(self, images):
        x = images.permute(0, 3, 1, 2).float() * self.factor + self.offset
        for number, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = norm(convolution(x))
            x = F.max_pool2d(F.relu(x), 2) if number else F.relu(x)
        return self.head(x.permute(0, 2, 3, 1).flatten(1))


def moved(images):
    """Shifts and flips by two gathers, nearest at the edges, as ours."""
    count, size = images.shape[:2]
    across = torch.arange(size)
    shift = torch.randint(-MOVED, MOVED + 1, (count, 2))
    flip = torch.rand(count) < 0.5
    rows = (across + shift[:, :1]).clamp(0, size - 1)
    columns = (torch.where(flip[:, None], across.flip(0), across) + shift[:, 1:]).clamp(0, size - 1)
    return images[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def main(folder, threads, way):
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    held = np.load(f"{folder}/start.npz")
    images, labels = torch.from_numpy(held["images"]), torch.from_numpy(held["labels"])
    weights = [held[f"w{i}"] for i in range(sum(name.startswith("w") for name in held.files))]
    model = Small(weights, held["mean"], held["std"]).to(memory_format=torch.channels_last)
    kernels = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, fused=True)

    def forward(batch, truth):
        return F.cross_entropy(model(batch), truth, label_smoothing=SMOOTHING)

    loss_of = torch.compile(forward) if way == "compiled" else forward

    def step(rows, rate, augment):
        batch, truth = images[rows], labels[rows]
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(moved(batch) if augment else batch, truth)
        loss.backward()
        with torch.no_grad():
            torch._foreach_mul_(kernels, 1 - rate * DECAY)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        return loss.detach()

    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        chosen = torch.tensor(asked["chosen"])
        began = time.perf_counter()
        losses = [step(rows, asked["rate"], asked["augment"]) for rows in chosen]
        seconds = time.perf_counter() - began
        print(json.dumps({"losses": [float(loss) for loss in losses], "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
